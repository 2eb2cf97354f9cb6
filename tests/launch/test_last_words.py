"""What a person reads at the end of a run, and that a program still finds the JSON."""

from __future__ import annotations

import io
import json
import os
import pty
import sys
from pathlib import Path
from typing import Any

import pytest
from support.commands import call
from support.fake_run import FakeRun

from dsrl_async.host.output import is_for_a_person
from dsrl_async.launch.last_words import last_words
from dsrl_async.run import checkpoints

FIGURES = {"wall_s": 600.0, "decisions": 12_345, "updates": 12_000, "success_rate": 0.58, "success_episodes": 100}


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a checkpoint and with logs."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "learner.log").write_text("starting\nthe agent's critic is not finite\n")
    (tmp_path / "logs" / "supervisor.log").write_text("")
    monkeypatch.setattr(checkpoints, "latest", lambda run: tmp_path / "checkpoints" / "00012000-00012345")
    return tmp_path


def words(run_dir: Path, reason: str, began: str = "", **figures: Any) -> list[str]:
    return last_words(run_dir, {"exit_reason": reason, **FIGURES, **figures}, began)


def test_a_run_that_reached_a_limit_is_to_be_evaluated(run_dir: Path) -> None:
    came_out, where, following = words(run_dir, "max_decisions", ", 21.0% of the first 100")
    assert came_out == (
        "came out: success 58.0% of the last 100 episodes, 21.0% of the first 100; 12,345 decisions in 10.0 min "
        "(ended by max_decisions)"
    )
    assert where == f"where:    {run_dir}, last checkpoint 00012000-00012345"
    evaluate, go_on = following.removeprefix("next:     ").split("; ")
    assert evaluate == f"to see how good it is: python -m dsrl_async.evaluate --checkpoint {run_dir}"
    assert go_on == f"to go on: python -m dsrl_async.launch --resume {run_dir} --max-decisions MORE"


def test_a_run_that_a_signal_has_ended_is_to_go_on(run_dir: Path) -> None:
    following = words(run_dir, "interrupted")[2]
    assert following.startswith(f"next:     to go on: python -m dsrl_async.launch --resume {run_dir}; to see")
    assert "to see" not in words(run_dir, "interrupted", updates=0)[2]


def test_a_run_that_failed_names_its_log(run_dir: Path) -> None:
    _, where, following = words(run_dir, "failed: the agent's critic is not finite")
    assert where.endswith(f"log {run_dir / 'logs' / 'learner.log'}")
    assert "dsrl_async.doctor" in following
    assert f"--resume {run_dir}" in following
    assert words(run_dir, "failed: something else")[1].endswith(f"log {run_dir / 'logs' / 'supervisor.log'}")
    of_group = run_dir / "groups" / "1" / "logs" / "inference.log"
    of_group.parent.mkdir(parents=True)
    of_group.write_text("no room on this GPU\n")
    assert words(run_dir, "failed: group-1 ended: no room on this GPU")[1].endswith(f"log {of_group}")


def test_a_run_without_anything_says_so(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "latest", lambda run: None)
    came_out, where, following = last_words(run_dir, {"exit_reason": "failed: no"}, "")
    assert came_out == "came out: nothing yet (it failed)"
    assert "no checkpoint" in where
    assert "--resume" not in following


def test_a_path_with_spaces_can_be_copied(run_dir: Path) -> None:
    spaced = run_dir / "my run"
    assert f"--resume '{spaced}'" in words(spaced, "interrupted")[2]


def test_where_the_success_rate_began(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run").start()
    for episode in range(250):
        run.finish_episode(0, 0, 1, episode >= 75)
        run.tick()
        assert bool(run.monitor.began()) is (episode >= 199)
    assert run.monitor.began() == ", 25.0% of the first 100"
    resumed = FakeRun(tmp_path / "resumed", resumed_wall_s=10.0)
    resumed.counters["control_outcomes"][:10] = 1
    resumed.counters["control_outcomes"][0] = 2
    resumed.start()
    assert resumed.monitor.began() == ""
    resumed.finish_episode(0, 0, 1, True)
    resumed.tick()
    assert resumed.monitor.began() == ", 10.0% when it was resumed"


@pytest.mark.parametrize("console", ["plain", "off"])
@pytest.mark.parametrize("person", [False, True])
def test_only_on_a_terminal_the_lines_stand_for_the_json(
    console: str, person: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails is `run`, about which a person is told all the same."""

    def fail(*_: object) -> None:
        raise RuntimeError("it broke")

    monkeypatch.setattr("dsrl_async.launch.command.run", fail)
    monkeypatch.setattr("dsrl_async.launch.command.is_for_a_person", lambda: person)
    done = call("launch", "--run-dir", str(tmp_path / "run"), "--log.console", console)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["exit_reason"] == "failed: it broke"
    assert done.stdout == ("" if person and console != "off" else json.dumps(summary) + "\n")
    lines = ["came out:", "where:", "next:"] if console != "off" else []
    assert [line.split("  ")[0].split(" nothing")[0] for line in done.stderr.splitlines()] == [
        *lines,
        "error: it broke",
    ]


def test_both_must_be_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        assert not is_for_a_person()
        monkeypatch.setattr(sys, "stderr", terminal)
        assert is_for_a_person()
    os.close(ours)
