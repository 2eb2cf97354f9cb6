"""Real runs that are stopped and resumed: what they show of themselves goes on where it was."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from support.launched import SMALL, Launched, checkpoint_of
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
