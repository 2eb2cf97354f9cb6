"""Real runs that are stopped and resumed: what they show of themselves goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save
from support.commands import call
from support.launched import SMALL, FinishedRun, Launched, checkpoint_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsrl_async.run import checkpoints
from dsrl_async.shm.episodes import last_successes


def test_a_run_whose_supervisor_was_killed_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """It had done more than it had saved: that is taken back, and nothing is shown twice."""
    run_dir = tmp_path / "run"
    run = Launched(run_dir, *SMALL, "--env.max-episode-steps", "20", "--checkpoint.interval-minutes", "0.1")
    run.wait_for(lambda _: checkpoints.find(run_dir) is not None)
    run.wait_for(lambda figures: figures["decisions"] > decisions_of(checkpoint_of(run_dir)) + 40)
    run.signal(signal.SIGKILL)
    run.finish()
    assert run.left_over() == []
    state = json.loads((checkpoint_of(run_dir) / "state.json").read_text())
    window, done = last_successes(state["episodes"]), decisions_of(checkpoint_of(run_dir))
    assert len(window) >= 4
    before = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert before[-1]["decisions"] > done + 40
    resumed = Launched(run_dir, "--resume", str(run_dir), "--max-decisions", str(done + 40))
    resumed.wait_for(lambda figures: figures.get("policies_ready", 0) > 0 and figures["decisions"] > done)
    result = resumed.finish()
    assert result["decisions"] == done + 40
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for name in ("decisions", "env_steps", "updates", "episodes", "wall_s", "time"):
        assert [line[name] for line in lines] == sorted(line[name] for line in lines), name
    kept = [line for line in before if line in lines]
    assert kept == lines[: len(kept)]
    assert len(kept) < len(before)
    assert kept[-1]["decisions"] <= done
    first = lines[len(kept)]
    assert 0 < first["wall_s"] - kept[-1]["wall_s"] < 5
    # The window is what the checkpoint says and what has come since, and never starts anew.
    for line in lines[len(kept) :]:
        assert line["success_episodes"] == min(
            100, len(window) + line["episodes"] - sum(state["counters"]["actor_episodes"])
        )
    assert first["success_episodes"] >= len(window)
    if first["success_episodes"] == len(window):
        assert first["success_rate"] == round(sum(window) / len(window), 4)
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert len(os.listdir(run_dir / "tensorboard")) == 2
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        steps, times = [point.step for point in points], [point.wall_time for point in points]
        assert steps == sorted(steps), tag
        assert times == sorted(times), tag
        assert steps[-1] <= result["env_steps"], tag
        if tag.startswith("env/"):
            assert len(set(steps)) == len(steps), tag


def decisions_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def test_a_run_of_which_few_rows_are_left_warms_up_again(
    tmp_path: Path, finished_run: FinishedRun, caplog: pytest.LogCaptureFixture
) -> None:
    """As from a checkpoint without rows and a much older one with a few."""
    run_dir = finished_run.copy(tmp_path / "run")
    checkpoint = checkpoint_of(run_dir)
    state = json.loads((checkpoint / "state.json").read_text())
    for name in (name for name in state["files"] if name.startswith("replay")):
        rows = {key: column[:4].copy() for key, column in load_file(checkpoint / name).items()}
        rows["complete"][-1] = False
        content = save(rows)
        (checkpoint / name).write_bytes(content)
        state["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "state.json").write_text(checkpoints._to_json(state))
    done = call("launch", "--resume", str(run_dir), "--serial", "--max-decisions", "264")
    assert "the replay buffer holds only 6 decisions: updates begin again after 16 decisions" in caplog.text
    assert done.result["decisions"] == 264
    assert done.result["updates"] == finished_run.result["updates"] + 264 - 240 - 16
