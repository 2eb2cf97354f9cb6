"""A resumed run's curves are those of a run that was never stopped, wherever the checkpoint was written."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.fake_run import FakeRun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsrl_async.run.checkpoints import KEPT, SUMMED
from dsrl_async.shm.counters import EPISODE_LOG, HISTORY_POINTS, SUCCESS_EPISODES, counter_fields
from dsrl_async.shm.episodes import export_episodes, finished_episodes, import_episodes
from dsrl_async.telemetry.curves import BLOCK_BYTES, take_back
from dsrl_async.telemetry.monitor import History

LANES = 3
CURVES = ("env/episode_len", "env/return", "env/reward", "env/success_once", "async/success_rate")
FIGURES = ("wall_s", "env_steps", "decisions", "updates", "episodes", "success_rate", "success_episodes")


class Work(NamedTuple):
    """What happens between two moments: decisions of 5 steps per lane, and the episodes that end then."""

    decisions: list[int]
    episodes: list[tuple[int, int]]
    """(lane, 1 if it succeeded)."""


def with_steps(decisions: list[int], episodes: list[tuple[int, int]]) -> Work:
    """An episode ends with a decision of its lane."""
    ended = {lane for lane, _ in episodes}
    return Work([max(count, int(lane in ended)) for lane, count in enumerate(decisions)], episodes)


WORK = st.builds(
    with_steps,
    st.lists(st.integers(0, 4), min_size=LANES, max_size=LANES),
    st.lists(st.tuples(st.integers(0, LANES - 1), st.integers(0, 1)), max_size=40),
)


def do(run: FakeRun, work: Work) -> None:
    c = run.counters
    c["actor_decisions"] += work.decisions
    c["actor_env_steps"] += 5 * np.array(work.decisions)
    c["learner_updates"] += sum(work.decisions)
    for lane, success in work.episodes:
        number = int(c["actor_episodes"].sum())
        run.finish_episode(lane, -float(number), 5 + number % 7, bool(success))
        c["actor_successes"][lane] += success


def checkpoint(run: FakeRun) -> str:
    counters = {name: run.counters[name].tolist() for name in (*KEPT, *SUMMED)}
    return json.dumps({"counters": counters, "episodes": export_episodes(run.snapshot())})


def resume(run_dir: Path, saved: str) -> FakeRun:
    """As `Session` does it."""
    state = json.loads(saved)
    run = FakeRun(run_dir, LANES)
    for name, values in state["counters"].items():
        run.counters[name][:] = values
    import_episodes(run.shared, state["episodes"])
    run.resumed_wall_s = take_back(run_dir, run.snapshot())
    return run.start(unseen=True)


def curves(run: FakeRun) -> dict[str, dict[int, float]]:
    """The last value at each step."""
    scalars = run.scalars()
    return {tag: dict(scalars.get(tag, [])) for tag in CURVES}


def figures(run: FakeRun) -> list[dict[str, Any]]:
    return [{name: line[name] for name in FIGURES} for line in run.lines()]


@given(
    before=st.lists(WORK, min_size=1, max_size=6),
    between=WORK,
    lost=st.lists(WORK.filter(lambda work: sum(work.decisions) > 0), max_size=4),
    after=st.lists(WORK, min_size=1, max_size=4),
)
@example(before=[Work([1, 0, 0], [(0, 0)])], between=Work([1, 0, 0], []), lost=[], after=[Work([0, 0, 0], [])])
@settings(max_examples=int(os.environ.get("DSRL_FUZZ_EXAMPLES", "25")), deadline=None)
def test_the_curves_of_a_resumed_run_are_those_of_one_that_never_stopped(
    before: list[Work], between: Work, lost: list[Work], after: list[Work]
) -> None:
    """`before` ends with a tick; the checkpoint holds `between` too; `lost` is done after it and taken back."""
    with tempfile.TemporaryDirectory() as directory:
        runs = [FakeRun(Path(directory) / name, LANES).start() for name in ("whole", "stopped")]
        for run in runs:
            for work in before:
                do(run, work)
                run.tick()
            do(run, between)
        whole, stopped = runs
        saved = checkpoint(stopped)
        for work in lost:
            do(stopped, work)
            stopped.tick()
        stopped.monitor.close()
        resumed = resume(stopped.run_dir, saved)
        for work in after:
            do(whole, work)
            do(resumed, work)
            assert resumed.tick().success_history == whole.tick().success_history
        assert figures(resumed) == figures(whole)
        assert curves(resumed) == curves(whole)


def test_points_of_what_was_taken_back_are_gone_and_none_is_double(tmp_path: Path) -> None:
    """As TensorBoard reads it, with the steps and times in order; the last point at the joint stays."""
    run = FakeRun(tmp_path, LANES).start()
    work = Work([2, 2, 2], [(0, 1), (1, 0)])
    for _ in range(3):
        do(run, work)
        run.tick()
    saved = checkpoint(run)
    for _ in range(4):
        do(run, work)
        run.tick()
    run.monitor.close()
    resumed = resume(tmp_path, saved)
    for _ in range(5):
        resumed.tick()  # it is loading its policy
    do(resumed, work)
    resumed.tick()
    resumed.monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for tag in ("env/success_once", "async/success_rate", "train/replay_buffer/size", "time/decisions_per_s"):
        points = events.Scalars(tag)
        assert [point.step for point in points] == [30, 60, 90, 120], tag
        assert [point.wall_time for point in points] == sorted(point.wall_time for point in points)
    lines = resumed.lines()
    assert [line["decisions"] for line in lines] == [6, 12, 18, 18, 18, 18, 18, 18, 24]
    assert [line["wall_s"] for line in lines] == list(range(1, 10))
    assert [line["success_episodes"] for line in lines] == [2, 4, 6, 6, 6, 6, 6, 6, 8]


def test_the_last_line_of_a_run_that_ended_is_not_repeated(tmp_path: Path) -> None:
    """The last checkpoint is written before the last tick, which takes in the last episodes."""
    run = FakeRun(tmp_path, LANES).start()
    do(run, Work([2, 0, 0], [(0, 1)]))
    run.tick()
    do(run, Work([1, 0, 0], [(0, 1), (1, 0)]))
    saved = checkpoint(run)
    run.tick(9.0)
    run.monitor.close()
    resumed = resume(tmp_path, saved)
    assert resumed.resumed_wall_s == 10.0  # nothing that took this time is taken back
    resumed.tick()
    assert [(line["episodes"], line["success_episodes"], line["wall_s"]) for line in resumed.lines()] == [
        (1, 1, 1.0),
        (3, 3, 11.0),
    ]
    assert resumed.scalars()["env/success_once"] == [(10, 1.0), (15, 0.5)]


# ---- what a checkpoint keeps


@pytest.mark.parametrize("lanes", [1, 2, 5, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64])
def test_unseen_episodes_come_back_in_order_for_any_number_of_lanes(tmp_path: Path, lanes: int, count: int) -> None:
    run = FakeRun(tmp_path, 8)
    for number in range(count):
        run.finish_episode(number % 8, float(number), number, number % 2 == 1)
    kept = json.loads(json.dumps(export_episodes(run.snapshot())))
    assert len(kept["unseen"]) == count
    other = FakeRun(tmp_path, lanes)
    other.counters["actor_episodes"][0] = count  # as a checkpoint of more lanes is restored
    import_episodes(other.shared, kept)
    snapshot = other.snapshot()
    found = finished_episodes(snapshot, snapshot["control_episodes_seen"])
    assert [list(episode) for episode in found] == kept["unseen"]


def test_more_unseen_episodes_than_the_logs_hold_leave_the_newest(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, 2)
    run.counters["actor_episodes"][:] = [500, 0]
    unseen = [[float(number), number, 0] for number in range(500)]
    kept = {"successes": [1] * 300, "history": [0.0] * HISTORY_POINTS, "history_length": 0, "unseen": unseen}
    import_episodes(run.shared, kept)
    snapshot = run.snapshot()
    found = finished_episodes(snapshot, snapshot["control_episodes_seen"])
    assert [episode.length for episode in found] == list(range(500 - 2 * EPISODE_LOG, 500))
    assert (snapshot["control_outcomes"] == 2).sum() == SUCCESS_EPISODES


@given(st.lists(st.floats(0, 1), max_size=400), st.integers(0, 400))
@settings(max_examples=50, deadline=None)
def test_a_history_goes_on_where_it_was(values: list[float], stop: int) -> None:
    whole, first = History(), History()
    for value in values[:stop]:
        first.add(value)
    padded = [*first.points, *[0.0] * (HISTORY_POINTS - len(first.points))]
    second = History(padded, first.length)
    for value in values[stop:]:
        second.add(value)
    for value in values:
        whole.add(value)
    assert second.points == whole.points
    assert len(whole.points) <= HISTORY_POINTS
    assert whole.points[-1:] == values[-1:]


# ---- metrics.jsonl


def start(decisions: int, wall_s: float = 0.0) -> dict[str, np.ndarray]:
    counters = {name.replace("/", "_"): np.zeros(shape, dtype) for name, (shape, dtype) in counter_fields(1).items()}
    counters["actor_decisions"][0], counters["control_wall_s"][0] = decisions, wall_s
    return counters


def line(decisions: int, more: str = "") -> str:
    figures = {"decisions": decisions, "env_steps": 0, "updates": 0, "wall_s": decisions / 10, "more": more}
    return json.dumps(figures) + "\n"


def test_lines_are_cut_where_the_checkpoint_was_however_long_they_are(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [line(number, "x" * (number * 37 % (BLOCK_BYTES // 2))) for number in range(200)]
    for kept in (200, 150, 3, 0):
        path.write_text("".join(lines))
        assert take_back(tmp_path, start(kept - 1)) == pytest.approx(max(0, kept - 1) / 10)
        assert path.read_text() == "".join(lines[:kept])


@pytest.mark.parametrize("rest", ['{"decisions": 5', "\0" * 300, "nonsense\n", "[]\n", '{"decisions": null}\n', "\n\n"])
def test_what_a_crash_left_at_the_end_is_cut_off_and_kept_where_one_says(tmp_path: Path, rest: str) -> None:
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "aside"
    aside.mkdir()
    path.write_text(line(1) + line(2) + line(3) + rest)
    assert take_back(tmp_path, start(2, wall_s=0.15), aside) == 0.2
    assert path.read_text() == line(1) + line(2)
    assert (aside / "metrics.jsonl").read_text() == line(3) + rest


def test_a_run_without_the_file_begins_one(tmp_path: Path) -> None:
    assert take_back(tmp_path, start(5, wall_s=7.0)) == 7.0
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"metrics\.jsonl cannot be read: it is not a regular file"):
        take_back(tmp_path, start(5))
