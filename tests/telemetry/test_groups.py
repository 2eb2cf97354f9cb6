"""Figures of groups: metrics, the line of each in the display, lines of a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.fake_run import FakeRun

from dsrl_async.shm.counters import INFERENCE_PHASES
from dsrl_async.telemetry.console import plain_line
from dsrl_async.telemetry.screen import layout


def test_figures_of_groups(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", actors=4, groups=2).start()
    run.monitor.where = {0: "this machine, GPU 0"}
    counters = run.counters
    counters["group_started"][:] = 1, 3
    counters["group_heard_ns"][:] = int((run.now + 0.5) * 1e9), 0
    counters["group_unstored"][:] = 7, 0
    counters["actor_decisions"][:] = 10, 10, 1, 2
    counters["group_inference_phase_s"][:, INFERENCE_PHASES.index("wait_learner")] = 0.25, 0.0
    counters["inference_phase_s"][INFERENCE_PHASES.index("compute")] = 1.0  # of both together
    view = run.tick(pids={"supervisor": [os.getpid()], "downlink": [os.getpid()]})
    assert view.memory_mb["downlink"] > 0
    first, second = view.groups
    assert (first.decisions, first.decisions_per_s, first.waiting) == (20, 20.0, pytest.approx(0.25))
    assert (first.incarnation, first.unstored, first.silent_s) == (1, 7, pytest.approx(0.5))
    assert (second.decisions, second.incarnation, second.silent_s, second.where) == (3, 3, None, "")
    assert view.recent.phases["inference"]["compute"] == pytest.approx(0.5)

    lines = [str(line) for line in layout(run.config, view, 100, 40)]
    of_groups = [line for line in lines if line.startswith("group ")]
    assert len(of_groups) == 1  # the other one is not anywhere yet
    for words in ("group 0", "20.0/s", "waits 25%", "7 unstored", "this machine, GPU 0"):
        assert words in of_groups[0]
    assert "groups 20.0 + 3.0/s" in plain_line(run.config, view)

    counters["group_heard_ns"][0] -= int(9e9)
    assert any("silent 10 s" in str(line) for line in layout(run.config, run.tick(), 100, 40))
    assert run.lines()[0]["groups"][0]["decisions"] == 20
    scalars = run.scalars()
    assert scalars["group/0/waiting"][0][1] == pytest.approx(0.25)
    assert scalars["group/1/incarnation"][0][1] == 3
    assert "group/1/silent_s" not in scalars


def test_a_run_without_groups_says_nothing_of_any(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run").start()
    run.counters["actor_decisions"][:] = 5
    view = run.tick()
    assert view.groups == ()
    assert "group" not in plain_line(run.config, view)
    assert "groups" not in run.lines()[0]
    assert not any(name.startswith("group/") for name in run.scalars())
