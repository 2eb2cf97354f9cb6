"""The display in terminals of every size, and what it says while a run starts."""

from __future__ import annotations

import io
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.fake_run import FakeRun

from dsrl_async.telemetry.console import LiveDisplay, PlainDisplay, plain_line
from dsrl_async.telemetry.monitor import EvaluationView, View, Wait
from dsrl_async.telemetry.screen import WIDE, Screen, layout, short_number

WAITS = (
    Wait("inference", "compiling or capturing the policy", 7.2, "3 of 20 sizes"),
    Wait("template", "making the environment, compiling its scene", 123.4, "120 s are allowed"),
    Wait("workers", "first reset", 4.0, "11 of 2000 ready, try 2 of 3"),
)


def shown(config: Any, view: View, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, record=True, color_system=None)
    console.print(Screen(config, view))
    return console.export_text().splitlines()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[FakeRun, View]]:
    """A run that has learned, one with the largest figures, one that warms up, and one that starts."""
    made = {}
    for name, actors in (("learning", 16), ("huge", 2000), ("warm-up", 2), ("starting", 2)):
        run = FakeRun(tmp_path_factory.mktemp(name), actors, max_minutes=60_000, stop_at_success=0.9).start()
        own = os.getpid()
        pids = {"supervisor": [own], "inference": [own], "learner": [own], "actor": [own] * actors}
        counters, many = run.counters, 10**9 if name == "huge" else 50
        for step in range(3 if name == "warm-up" else 0 if name == "starting" else 60):
            counters["actor_decisions"] += many // actors + 1
            counters["actor_env_steps"] += 5 * many // actors
            counters["actor_phase_s"] += [0.8, 0.1, 0, 0, 0.1]
            counters["inference_batches"] += many // actors + 1
            counters["inference_rows"] += many
            counters["inference_padded_rows"] += many
            counters["inference_phase_s"] += [0.1, 0, 0.6, 0, 0.2, 0, 0]
            counters["learner_replay_size"] += many
            run.finish_episode(0, -3.0, 20, step % 4 > 1 or step > 40)
            if name != "warm-up":
                counters["learner_updates"] += many
                counters["learner_phase_s"] += [0, 0.6, 0, 0.3, 0, 0]
                counters["learner_metrics"][:] = np.arange(16)
                counters["learner_metrics_update"][:] = counters["learner_updates"]
            run.tick(1.0, pids)
        view = run.tick(1.0, pids)
        if name == "huge":
            view = replace(view, evaluation=EvaluationView(5000, 4999, 1.0, 10**9, 1.0, 10**9))
        if name == "starting":
            view = replace(view, waits=WAITS)
        cpu = {} if name == "starting" else {"actor": 12.0, "inference": 9.0}
        made[name] = run, replace(view, cpu_percent=cpu)
    return made


@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from(["learning", "huge", "warm-up", "starting"]),
    width=st.integers(20, 260),
    height=st.integers(10, 70),
)
def test_in_a_terminal_of_any_size_nothing_is_cut_and_the_most_important_is_there(
    runs: dict[str, tuple[FakeRun, View]], name: str, width: int, height: int
) -> None:
    run, view = runs[name]
    lines = shown(run.config, view, width, height)
    assert max(map(len, lines)) <= width
    assert len(lines) < height  # else it would scroll
    text = "\n".join(lines)
    assert "…" not in text
    if name == "starting":
        for words in ("inference +.*7 s", "template +.*123 s", "workers +.*4 s"):
            assert re.search(words, text), text
        assert not re.search("success|decisions|updates|–", text)
        return
    assert f"{view.success_rate:.1%}" in text
    decisions = f"{view.decisions:,}", short_number(view.decisions)
    assert any(re.search(rf"decisions +{re.escape(figure)}\b", text) for figure in decisions)
    rate = view.recent.decisions_per_s
    figures = f"{rate:,.1f}/s", f"{rate:,.1f} decisions/s", f"{short_number(rate)}/s"
    assert any(figure in text for figure in figures)
    assert view.remaining_s is not None
    days, hours = divmod(int(view.remaining_s) // 3600, 24)
    assert f"{days * 24 + hours}:" in text or f"{days} d {hours} h" in text
    assert re.search(r"bottleneck +(none|workers)", text)


def test_every_width_has_the_same_figures(runs: dict[str, tuple[FakeRun, View]]) -> None:
    run, view = runs["learning"]
    for width in range(20, 261):
        texts = layout(run.config, view, width, 60)
        assert max(text.cell_len for text in texts) <= width
        assert any("bottleneck" in text.plain for text in texts)


def test_a_wide_terminal_shows_the_processes_beside_the_figures(runs: dict[str, tuple[FakeRun, View]]) -> None:
    run, view = runs["learning"]
    wide, narrow = shown(run.config, view, WIDE, 40), shown(run.config, view, WIDE - 1, 40)
    assert len(wide) < len(narrow)
    assert any("elapsed" in line and "success so far" in line for line in wide)
    assert any(re.search(r"0% .*[▁-█]", line) for line in wide)
    assert any("learner" in line and "wait ratio" in line for line in narrow)


def test_a_low_terminal_leaves_out_the_details_first(runs: dict[str, tuple[FakeRun, View]]) -> None:
    run, view = runs["learning"]
    high, low, lowest = ("\n".join(shown(run.config, view, 100, height)) for height in (40, 14, 6))
    assert all(word in high for word in ("critic loss", "batches", "ratio", "bottleneck"))
    assert "critic loss" not in low
    assert "ratio" in low
    assert "ratio" not in lowest
    assert "bottleneck" in lowest


def test_the_display_follows_the_terminal_when_that_is_resized(runs: dict[str, tuple[FakeRun, View]]) -> None:
    run, view = runs["learning"]
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=150, height=40)
    display = LiveDisplay(run.config, console)
    display.update(view)
    console.size = (30, 12)
    start = out.tell()
    display.update(view)
    display.close()
    frame = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()[start:])
    assert max(map(len, frame.splitlines())) <= 30
    assert "bottleneck" in frame


def starting(run: FakeRun, *waits: Wait) -> View:
    run.monitor.waits = waits
    return run.tick()


def test_plain_lines_tell_each_step_of_a_start_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = FakeRun(tmp_path / "run", max_minutes=1).start()
    display = PlainDisplay(run.config)
    for second in range(40):
        workers = Wait("workers", "waiting for the template", second + 1, "0 of 2 ready")
        inference = Wait("inference", "loading the policy" if second >= 3 else "importing PyTorch", second % 3)
        display.update(starting(run, inference, workers))
    run.counters["actor_decisions"][0] = 10
    display.update(starting(run, Wait("workers", "first reset", 3.0, "1 of 2 ready")))
    for _ in range(5):
        display.update(starting(run))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        "[0:00:01] starting: inference: importing PyTorch, 0 s; workers: waiting for the template, 0 of 2 ready, 1 s"
    )
    assert [line.split()[0] for line in lines] == ["[0:00:01]", "[0:00:04]", "[0:00:34]", "[0:00:41]", "[0:00:46]"]
    assert "loading the policy, 0 s" in lines[1]
    assert not any(word in line for line in lines[:3] for word in ("success", "decisions", "/s", "left"))
    assert re.search(r"decisions 10 .*starting: workers: first reset, 1 of 2 ready, 3 s$", lines[3])
    assert "starting" not in lines[4]


def test_a_warm_up_says_how_many_decisions_it_has(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run").start()
    run.counters["actor_decisions"][0] = 276
    view = run.tick()
    assert "warm-up 276 of 400 decisions before the first update" in plain_line(run.config, view)
    assert any("276 of 400 decisions before the first update" in line for line in shown(run.config, view, 80, 40))
    run.counters["actor_decisions"][0] = run.counters["learner_updates"][0] = 1000
    assert run.tick().warming_up is None
    run.counters["control_warmup_end"][0] = 1300  # resumed without its replay buffer
    assert run.tick().warming_up == (100, 400)


def test_what_is_only_shown_is_no_part_of_the_metrics_file(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run").start()
    starting(run, *WAITS)
    (line,) = run.lines()
    assert not {"waits", "warming_up"} & line.keys()


def test_numbers_in_three_digits() -> None:
    numbers = {0: "0", 999: "999", 1000: "1.0k", 12_345: "12.3k", 12_345_678: "12.3M", 10**10: "10.0G", 4.25: "4.2"}
    assert {number: short_number(number) for number in numbers} == numbers
    assert short_number(123_456) == "123k"
