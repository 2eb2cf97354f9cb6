"""Evaluation in whole runs: a serial one, which learns the same with it and without, and one of processes."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.commands import call
from support.launched import SMALL, Launched
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsrl_async.run import checkpoints
from dsrl_async.run.evaluation.files import evaluations, find_best

EPISODES = 3
SHORT = [*SMALL, "--env.max-episode-steps", "20"]  # episodes of four decisions
EVALUATED = [
    *("--evaluation.every-decisions", "20", "--evaluation.episodes", str(EPISODES)),
    *("--evaluation.actors", str(EPISODES)),
]


def hashes(run_dir: Path) -> dict[str, str]:
    """The agent and the rows of the last checkpoint."""
    found = checkpoints.find(run_dir)
    assert found is not None
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found.rglob("*.safetensors"))}


def points(run_dir: Path) -> list[dict[str, Any]]:
    return [files.result() for files in evaluations(run_dir) if files.finished]


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


class Serial(NamedTuple):
    run_dir: Path
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Serial:
    run_dir = tmp_path_factory.mktemp("serial") / "run"
    done = call("launch", "--serial", *SHORT, *EVALUATED, "--max-decisions", "66", "--run-dir", str(run_dir))
    return Serial(run_dir, done.result)


def test_a_serial_run_learns_the_same_with_evaluation_and_without(serial: Serial, tmp_path: Path) -> None:
    """Nothing of an evaluation gets into the agent, the replay buffer or a counter, to the last bit."""
    call("launch", "--serial", *SHORT, "--max-decisions", "66", "--run-dir", str(tmp_path / "run"))
    assert hashes(serial.run_dir) == hashes(tmp_path / "run")
    states = []
    for run_dir in (serial.run_dir, tmp_path / "run"):
        found = checkpoints.find(run_dir)
        assert found is not None
        counters = checkpoints.read_state(found)["counters"]
        states.append({name: counts for name, counts in counters.items() if name != "control_wall_s"})
    assert states[0] == states[1]
    for name in ("success_episodes", "success_rate", "episodes", "decisions", "updates", "replay_ratio"):
        assert serial.summary[name] == json.loads((tmp_path / "run/summary.json").read_text())[name]


def test_a_serial_run_is_reproducible_also_when_it_goes_on(serial: Serial, tmp_path: Path) -> None:
    assert [point["decisions"] for point in points(serial.run_dir)] == [0, 20, 40]
    pending = [files for files in evaluations(serial.run_dir) if not files.finished]
    assert [files.planned.decisions for files in pending] == [60]
    ended = []
    for name in ("one", "other"):
        run_dir = Path(shutil.copytree(serial.run_dir, tmp_path / name))
        call("launch", "--resume", str(run_dir), "--max-decisions", "100")
        ended.append(points(run_dir))
    assert [point["decisions"] for point in ended[0]] == [0, 20, 40, 60, 80]
    assert ended[0] == ended[1]
    assert scalars(tmp_path / "one", "eval/success_rate") == [
        (point["env_steps"], pytest.approx(point["success_rate"])) for point in ended[0]
    ]


def test_points_are_at_the_env_steps_of_the_snapshot_and_the_best_can_be_evaluated(serial: Serial) -> None:
    found = points(serial.run_dir)
    assert [point["policy"] for point in found] == ["base", "agent", "agent"]
    for name in ("success_rate", "ci95_low", "return", "episode_len"):
        expected = [(point["env_steps"], pytest.approx(point[name])) for point in found]
        assert scalars(serial.run_dir, f"eval/{name}") == expected
    best = find_best(serial.run_dir)
    assert best is not None
    directory, result = best
    assert result in found
    assert serial.summary["evaluation"]["best"]["checkpoint"] == str(directory)
    checkpoints.check(directory)
    seed = ("--seed", "0", "--episodes", str(EPISODES), "--processes", "1")
    evaluated = call("evaluate", "--checkpoint", str(serial.run_dir), "--best", *seed).result
    assert evaluated["policy"] == str(directory)
    assert evaluated["successes"] == result["successes"]
    assert evaluated["mean_episode_len"] == pytest.approx(result["episode_len"], abs=0.01)


def test_best_without_a_best_one_is_a_sentence(tmp_path: Path, serial: Serial) -> None:
    run_dir = Path(shutil.copytree(serial.run_dir, tmp_path / "run"))
    shutil.rmtree(run_dir / "best")
    done = call("evaluate", "--checkpoint", str(run_dir), "--best")
    assert done.code == 2
    assert "has no best checkpoint" in done.stderr
    assert "give that as --checkpoint" in call("evaluate", "--best").stderr


def test_kills_lose_no_point(tmp_path: Path) -> None:
    """A worker of the evaluation and the inference process are killed; the points are those of the same snapshots."""
    run = Launched(tmp_path / "run", *SHORT, *EVALUATED, "--max-minutes", "3")
    run.wait_learning()
    run.wait_for(lambda figures: figures["evaluation"]["decisions"] == 0)
    for kind in ("evaluation", "inference"):
        run.children(kind)[0].kill()
        time.sleep(0.5)
    decisions = run.figures()["decisions"]
    run.wait_for(lambda figures: (figures["evaluation"]["decisions"] or 0) > decisions)
    run.signal(signal.SIGTERM)
    summary = run.finish()
    assert summary["exit_reason"] == "terminated"
    assert summary["restarts"]["evaluation"] == 1
    assert summary["restarts"]["inference"] == 1
    assert summary["restarts"]["actor"] == 0
    assert run.left_over() == []
    found = points(run.run_dir)
    assert all(point["episodes"] == EPISODES for point in found)
    curve = scalars(run.run_dir, "eval/success_rate")
    assert curve == [(point["env_steps"], pytest.approx(point["success_rate"])) for point in found]
    state = checkpoints.read_state(checkpoints.find(run.run_dir))  # type: ignore[arg-type]
    assert len(state["counters"]["actor_decisions"]) == 2
    assert sum(state["counters"]["actor_episodes"]) == summary["episodes"]
