"""The whole program, started as users do: ends, signals, killed processes, resume. Nothing may be left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors import safe_open
from support.commands import call
from support.launched import SMALL, FinishedRun, Launched, checkpoint_of, state_of
from support.paths import ROOT
from support.planted import Planted, delay
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsrl_async.pi0.config import EMBEDDED_POLICY
from dsrl_async.run import checkpoints

SUMMARY_KEYS = {
    *("run_dir", "exit_reason", "wall_s", "env_steps", "decisions", "updates", "episodes", "success_rate"),
    *("env_steps_per_s", "decisions_per_s", "updates_per_s", "replay_ratio", "policy_lag_mean"),
}
DOCUMENT_NAMES = {
    *("env/episode_len", "env/return", "env/reward", "env/success_once"),
    *("train/sac/critic_loss", "train/critic/grad_norm", "train/sac/actor_loss", "train/actor/entropy"),
    *("train/actor/grad_norm", "train/sac/alpha_loss", "train/sac/alpha"),
    *("train/replay_buffer/size", "train/replay_buffer/utilization"),
}


def test_the_systems_tools_show_which_process_is_which(finished_run: FinishedRun) -> None:
    said = {name: f"dsrl_async: {name}" for name in ("supervisor", "inference", "learner")}
    said |= {"template": "dsrl_async: template of the environment workers"}
    said |= {f"actor-{number}": f"dsrl_async: environment worker {number}" for number in ("000", "001")}
    assert finished_run.titles == {f"{name}: {title}" for name, title in said.items()}


def test_run_to_a_limit_leaves_a_complete_run_directory(finished_run: FinishedRun) -> None:
    run_dir, result = finished_run.run_dir, finished_run.result
    assert len(finished_run.mapped_by_workers) == 2
    for mapped in finished_run.mapped_by_workers:
        assert mapped
        assert not any("libtorch" in path for path in mapped)
    assert result["returncode"] == 0, result["stderr"]
    assert result.keys() >= SUMMARY_KEYS
    assert result["exit_reason"] == "max_decisions"
    assert result["decisions"] == 240
    assert 0 < result["env_steps"] <= 240 * 5
    assert result["replay_ratio"] == pytest.approx(1.0, abs=0.1)
    assert finished_run.left_over == []
    counters = state_of(run_dir)["counters"]
    assert sum(counters["actor_decisions"]) == 240
    assert sum(counters["actor_env_steps"]) == result["env_steps"]
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert names >= DOCUMENT_NAMES
    assert {name.split("/")[0] for name in names} >= {"env", "train", "time", "system", "async"}
    assert (run_dir / "config.yaml").is_file()
    assert (run_dir / "summary.json").is_file()


def test_a_process_that_cannot_capture_is_started_again_without_graphs(tmp_path: Path) -> None:
    """After a capture that failed a process is not to be trusted; its successor does not try it."""
    arguments = [*SMALL, "--max-decisions", "40", "--max-minutes", "2"]
    search = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    module, environment = "support.uncapturable", {"PYTHONPATH": search}
    result = Launched(tmp_path / "run", *arguments, module=module, environment=environment).finish(120)
    assert result["exit_reason"] == "max_decisions", result["stderr"]
    assert result["restarts"]["inference"] == 1
    assert result["cuda_graphs"] == {"policy": "failed", "learner": "none"}
    logs = tmp_path / "run" / "logs"
    assert "CaptureError: no CUDA graphs of anything could be captured: planted" in (logs / "inference.log").read_text()
    told = [line for line in (logs / "supervisor.log").read_text().splitlines() if "CUDA graphs" in line]
    assert len(told) == 1
    assert told[0].endswith(f"the inference process does without CUDA graphs: {logs / 'inference.log'} says why")


def stop(run: Launched, number: signal.Signals) -> dict[str, Any]:
    """End a run that learns by a signal: it ends within seconds, as asked, with a checkpoint, and leaves nothing.

    On a busy machine it may take as long as the start did, but nobody waits for somebody who does not end.
    """
    begin = time.monotonic()
    run.signal(number)
    result = run.finish()
    assert time.monotonic() - begin < max(8.0, run.start_s)
    assert result["exit_reason"] == {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert result["returncode"] == 0
    assert run.left_over() == []
    assert sum(state_of(run.run_dir)["counters"]["actor_decisions"]) == result["decisions"]
    return result


def test_signal_to_all_processes_at_once_as_batch_systems_send_it(tmp_path: Path) -> None:
    run = Launched(tmp_path / "run", *SMALL)
    run.wait_learning()
    for child in run.children():
        child.terminate()
    assert stop(run, signal.SIGTERM)["restarts"] == {"actor": 0, "inference": 0, "learner": 0, "template": 0}


def test_signals_that_were_ignored_before_do_no_harm(tmp_path: Path) -> None:
    """SIGHUP by `nohup`, and SIGCHLD, with which a process would not learn how its children ended."""
    command = [sys.executable, "-m", "dsrl_async.launch", *SMALL, "--run-dir", str(tmp_path / "run")]
    command = ["sh", "-c", 'trap "" HUP CHLD; exec "$@"', "sh", *command, "--max-decisions", "60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").is_file():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["exit_reason"] == "max_decisions"


def test_interrupt_while_starting_stops_cleanly(tmp_path: Path) -> None:
    run = Launched(tmp_path / "run", *SMALL)
    while not run.children():
        time.sleep(0.01)
    run.signal(signal.SIGINT)
    result = run.finish()
    assert result["exit_reason"] == "interrupted", result["stderr"]
    checkpoint_of(run.run_dir)
    assert run.left_over() == []


def test_kill_of_the_supervisor_leaves_nothing(tmp_path: Path) -> None:
    run = Launched(tmp_path / "run", *SMALL)
    run.wait_learning()
    assert len(run.children()) == 5
    run.signal(signal.SIGKILL)
    run.finish()
    assert run.left_over() == []
    assert not any("dsrl" in name for name in os.listdir("/dev/shm"))
    assert len(run.seen) >= 5


def test_killed_processes_are_replaced_and_the_run_goes_on(tmp_path: Path) -> None:
    """One after another; and at last a worker, while the template that should replace it is silent."""
    run = Launched(tmp_path / "run", *SMALL, "--checkpoint.interval-minutes", "0.02")
    run.wait_learning(updates=20)
    run.wait_for(lambda _: checkpoints.find(run.run_dir) is not None)

    def wait_for_progress(decisions: int, updates: int) -> None:
        before = run.figures()
        run.wait_for(
            lambda figures: (
                figures["decisions"] > before["decisions"] + decisions
                and figures["updates"] > before["updates"] + updates
            )
        )

    for kind in ("worker", "inference", "learner", "template"):
        victim = run.children(kind)[0]
        victim.kill()
        wait_for_progress(decisions=100, updates=50)
        assert victim.pid not in [child.pid for child in run.children(kind)], kind
    run.wait_for(lambda _: run.children("template"))
    run.children("template")[0].suspend()
    run.children("worker")[0].kill()
    wait_for_progress(decisions=50, updates=0)
    result = stop(run, signal.SIGINT)
    assert result["restarts"] == {"actor": 2, "inference": 1, "learner": 1, "template": 1}
    assert result["replay_ratio"] == pytest.approx(1.0, abs=0.15)


def test_frozen_process_is_replaced_and_a_frozen_job_goes_on(tmp_path: Path) -> None:
    run = Launched(tmp_path / "run", *SMALL, "--heartbeat-timeout-s", "4")
    run.wait_learning()
    job = [run.process, *run.children()]
    for process in job:
        process.suspend()
    time.sleep(5.5)
    for process in job:  # the supervisor is the first to look
        process.resume()
    updates = run.figures()["updates"]
    run.wait_for(lambda figures: figures["updates"] > updates + 20)
    assert {process.pid for process in job[1:]} == {child.pid for child in run.children()}
    frozen = run.children("worker")[0]
    frozen.suspend()
    run.wait_for(lambda _: not psutil.pid_exists(frozen.pid), timeout_s=20)
    decisions = run.figures()["decisions"]
    run.wait_for(lambda figures: figures["decisions"] > decisions + 50)
    assert stop(run, signal.SIGTERM)["restarts"]["actor"] >= 1


def test_process_that_cannot_start_ends_the_run_with_its_reason_and_a_checkpoint(tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(EMBEDDED_POLICY, policy)
    run = Launched(tmp_path / "run", *SMALL, "--policy.checkpoint", str(policy))
    run.wait_learning()
    (policy / "model.safetensors").write_bytes(b"not weights")
    run.children("inference")[0].kill()
    result = run.finish()
    assert result["returncode"] == 1
    assert result["exit_reason"].startswith("failed: inference ended 3 times")
    assert "model.safetensors" in result["exit_reason"]
    assert run.left_over() == []
    assert state_of(run.run_dir)["counters"]["learner_updates"][0] >= 5


@pytest.mark.parametrize("actors", [3, 1])
def test_resume_continues_counters_and_buffer_without_a_burst(
    tmp_path: Path, finished_run: FinishedRun, actors: int
) -> None:
    """With another number of actors; `test_old_runs.py` has the same number."""
    run_dir, first = finished_run.copy(tmp_path / "run"), finished_run.result
    saved = state_of(run_dir)["counters"]
    rows = 0
    for path in (checkpoint_of(run_dir) / "replay").glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            rows += int(file.get_tensor("complete").sum())
    assert rows == first["decisions"]
    limit = first["decisions"] + 60
    run = Launched(run_dir, "--resume", str(run_dir), "--max-decisions", str(limit), "--actors", str(actors))
    run.wait_for(lambda figures: figures.get("wall_s", 0) > first["wall_s"] and figures.get("replay_size", 0) > 0)
    assert run.figures()["replay_size"] >= first["decisions"]
    second = run.finish()
    assert second["exit_reason"] == "max_decisions"
    assert second["decisions"] == limit
    assert second["env_steps"] > first["env_steps"]
    assert second["wall_s"] > first["wall_s"]
    # 60 more decisions ask for 60 more updates, and what was still due.
    due = first["decisions"] - 16 - saved["learner_updates"][0]
    assert second["updates"] - saved["learner_updates"][0] <= 60 + due
    assert second["replay_ratio"] == pytest.approx(1.0, abs=0.1)


def test_resume_refuses_a_damaged_checkpoint_and_leaves_it_alone(tmp_path: Path, finished_run: FinishedRun) -> None:
    run_dir = finished_run.copy(tmp_path / "run")
    agent = checkpoint_of(run_dir) / "agent.safetensors"
    damaged = agent.read_bytes()[:-100]
    agent.write_bytes(damaged)
    done = call("launch", "--resume", str(run_dir), "--max-decisions", "900")
    assert done.code == 2
    assert "agent.safetensors" in done.stderr
    assert done.stderr.count("\n") == 1
    assert agent.read_bytes() == damaged


def test_serial_mode_is_reproducible_bit_for_bit(tmp_path: Path) -> None:
    """In a process of its own, and in one that has done other things before."""
    arguments = [*SMALL, "--serial", "--max-decisions", "80", "--seed", "3"]
    begun = Launched(tmp_path / "a", *arguments)
    results = [call("launch", *arguments, "--run-dir", str(tmp_path / "b")).result, begun.finish()]
    other = call("launch", *arguments[:-1], "4", "--run-dir", str(tmp_path / "c"))
    assert [result["decisions"] for result in results] == [80, 80]
    assert results[0]["updates"] == results[1]["updates"] == 80 - 16
    weights = [(checkpoint_of(tmp_path / name) / "agent.safetensors").read_bytes() for name in ("a", "b", "c")]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]
    assert other.code == 0


@pytest.mark.parametrize(
    ("module", "function", "seconds", "ratio"),
    [
        ("learner.learner", "dsrl_async.run.learner.updates:Updates.run", 0.015, 2.5),
        ("worker.template", "dsrl_async.envs.tabletop:TabletopEnvironment.step_chunk", 0.03, 0.4),
    ],
    ids=["slow learner", "slow actors"],
)
def test_replay_ratio_is_kept_whichever_side_is_faster(
    tmp_path: Path, module: str, function: str, seconds: float, ratio: float
) -> None:
    planted = Planted(tmp_path, {f"dsrl_async.run.{module}": delay(function, seconds)})
    arguments = [*SMALL, "--replay-ratio", str(ratio), "--max-decisions", "150"]
    result = Launched(tmp_path / "run", *arguments, planted=planted).finish(120)
    assert result["exit_reason"] == "max_decisions", result
    assert result["replay_ratio"] == pytest.approx(ratio, rel=0.05)
