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

import psutil
import pytest
from safetensors import safe_open
from support.launched import SMALL, Launched, checkpoint_of, state_of
from support.paths import ROOT
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


def test_run_to_a_limit_leaves_a_complete_run_directory(tmp_path: Path) -> None:
    run = Launched(tmp_path / "run", *SMALL, "--max-decisions", "400", "--max-minutes", "2")
    run.wait_learning()
    environments = run.children("worker")
    assert len(environments) == 2
    for environment in environments:
        assert not any("libtorch" in mapping.path for mapping in environment.memory_maps())
    result = run.finish()
    assert result["returncode"] == 0, result["stderr"]
    assert result.keys() >= SUMMARY_KEYS
    assert result["exit_reason"] == "max_decisions"
    assert result["decisions"] == 400
    assert 0 < result["env_steps"] <= 400 * 5
    assert result["replay_ratio"] == pytest.approx(1.0, abs=0.1)
    assert run.left_over() == []
    counters = state_of(run.run_dir)["counters"]
    assert sum(counters["actor_decisions"]) == 400
    assert sum(counters["actor_env_steps"]) == result["env_steps"]
    events = EventAccumulator(str(run.run_dir / "tensorboard"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert names >= DOCUMENT_NAMES
    assert {name.split("/")[0] for name in names} >= {"env", "train", "time", "system", "async"}
    assert (run.run_dir / "config.yaml").is_file()
    assert (run.run_dir / "summary.json").is_file()


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_within_seconds_with_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    run = Launched(tmp_path / "run", *SMALL)
    run.wait_learning()
    begin = time.monotonic()
    run.signal(number)
    result = run.finish()
    assert time.monotonic() - begin < 8
    assert result["exit_reason"] == {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert result["returncode"] == 0
    assert run.left_over() == []
    assert sum(state_of(run.run_dir)["counters"]["actor_decisions"]) == result["decisions"]


def test_signal_to_all_processes_at_once_as_batch_systems_send_it(tmp_path: Path) -> None:
    run = Launched(tmp_path / "run", *SMALL)
    run.wait_learning()
    for child in run.children():
        child.terminate()
    run.signal(signal.SIGTERM)
    result = run.finish()
    assert result["exit_reason"] == "terminated"
    assert result["restarts"] == {"actor": 0, "inference": 0, "learner": 0, "template": 0}
    checkpoint_of(run.run_dir)
    assert run.left_over() == []


def test_nohup_is_respected(tmp_path: Path) -> None:
    with_hangup_ignored = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.executable, "
    )
    command = [sys.executable, "-m", "dsrl_async.launch", *SMALL, "--run-dir", str(tmp_path / "run")]
    code = with_hangup_ignored + repr([*command, "--max-decisions", "60"]) + ")"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    time.sleep(2)
    process.send_signal(signal.SIGHUP)
    stdout, _ = process.communicate(timeout=60)
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


@pytest.mark.parametrize("module", ["worker", "inference", "learner", "template"])
def test_killed_process_is_replaced_and_the_run_goes_on(tmp_path: Path, module: str) -> None:
    run = Launched(tmp_path / "run", *SMALL, "--checkpoint.interval-minutes", "0.02")
    run.wait_learning(updates=20)
    run.wait_for(lambda _: checkpoints.find(run.run_dir) is not None)
    victim = run.children(module)[0]
    before = run.figures()
    victim.kill()
    run.wait_for(
        lambda figures: figures["decisions"] > before["decisions"] + 100 and figures["updates"] > before["updates"] + 50
    )
    assert victim.pid not in [child.pid for child in run.children(module)]
    run.signal(signal.SIGINT)
    result = run.finish()
    assert result["exit_reason"] == "interrupted"
    assert result["restarts"]["actor" if module == "worker" else module] == 1
    assert result["replay_ratio"] == pytest.approx(1.0, abs=0.15)
    assert run.left_over() == []
    checkpoint_of(run.run_dir)


def test_frozen_process_is_replaced(tmp_path: Path) -> None:
    run = Launched(tmp_path / "run", *SMALL, "--heartbeat-timeout-s", "4")
    run.wait_learning()
    frozen = run.children("worker")[0]
    frozen.suspend()
    run.wait_for(lambda _: not psutil.pid_exists(frozen.pid), timeout_s=20)
    decisions = run.figures()["decisions"]
    run.wait_for(lambda figures: figures["decisions"] > decisions + 50)
    run.signal(signal.SIGINT)
    assert run.finish()["restarts"]["actor"] >= 1
    assert run.left_over() == []


def test_a_silent_template_holds_up_neither_the_run_nor_its_end(tmp_path: Path) -> None:
    run = Launched(tmp_path / "run", *SMALL)
    run.wait_learning()
    run.children("template")[0].suspend()
    victim = run.children("worker")[0]
    victim.kill()
    decisions = run.figures()["decisions"]
    run.wait_for(lambda figures: figures["decisions"] > decisions + 50)
    begin = time.monotonic()
    run.signal(signal.SIGINT)
    result = run.finish()
    assert time.monotonic() - begin < 8
    assert result["exit_reason"] == "interrupted"
    assert result["restarts"]["actor"] == 1
    assert run.left_over() == []
    checkpoint_of(run.run_dir)


def test_child_signals_that_were_ignored_before_do_no_harm(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsrl_async.launch", *SMALL, "--run-dir", str(tmp_path / "run")]
    command = ["sh", "-c", 'trap "" CHLD; exec "$@"', "sh", *command, "--max-decisions", "60"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["exit_reason"] == "max_decisions"


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


@pytest.mark.parametrize("actors", [2, 3, 1])
def test_resume_continues_counters_and_buffer_without_a_burst(tmp_path: Path, actors: int) -> None:
    first = Launched(tmp_path / "run", *SMALL, "--max-decisions", "120").finish()
    assert first["decisions"] == 120
    saved = state_of(tmp_path / "run")["counters"]
    rows = 0
    for path in (checkpoint_of(tmp_path / "run") / "replay").glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            rows += int(file.get_tensor("complete").sum())
    assert rows == 120
    run = Launched(
        tmp_path / "run", "--resume", str(tmp_path / "run"), "--max-decisions", "180", "--actors", str(actors)
    )
    run.wait_for(lambda figures: figures.get("wall_s", 0) > first["wall_s"] and figures.get("replay_size", 0) > 0)
    assert run.figures()["replay_size"] >= 120
    second = run.finish()
    assert second["exit_reason"] == "max_decisions"
    assert second["decisions"] == 180
    assert second["env_steps"] > first["env_steps"]
    assert second["wall_s"] > first["wall_s"]
    # 60 more decisions ask for 60 more updates, and what was still due.
    due = 120 - 16 - saved["learner_updates"][0]
    assert second["updates"] - saved["learner_updates"][0] <= 60 + due
    assert second["replay_ratio"] == pytest.approx(1.0, abs=0.1)


def test_resume_refuses_a_damaged_checkpoint_and_leaves_it_alone(tmp_path: Path) -> None:
    Launched(tmp_path / "run", *SMALL, "--max-decisions", "60").finish()
    agent = checkpoint_of(tmp_path / "run") / "agent.safetensors"
    agent.write_bytes(agent.read_bytes()[:-100])
    result = Launched(tmp_path / "run", "--resume", str(tmp_path / "run"), "--max-decisions", "90").finish()
    assert result["returncode"] == 2
    assert "agent.safetensors" in result["stderr"]
    assert result["stderr"].count("\n") == 1


def test_serial_mode_is_reproducible_bit_for_bit(tmp_path: Path) -> None:
    arguments = [*SMALL, "--serial", "--max-decisions", "80", "--seed", "3"]
    results = [Launched(tmp_path / name, *arguments).finish() for name in ("a", "b")]
    other = Launched(tmp_path / "c", *arguments[:-1], "4").finish()
    assert [result["decisions"] for result in results] == [80, 80]
    assert results[0]["updates"] == results[1]["updates"] == 80 - 16
    weights = [(checkpoint_of(tmp_path / name) / "agent.safetensors").read_bytes() for name in ("a", "b", "c")]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]
    assert other["returncode"] == 0


SITECUSTOMIZE = """
import sys, time
def slow(owner, name, seconds):
    original = getattr(owner, name)
    def delayed(*arguments, **keywords):
        time.sleep(seconds)
        return original(*arguments, **keywords)
    setattr(owner, name, delayed)
if "dsrl_async.run.learner.learner" in sys.orig_argv and {learner_s}:
    from dsrl_async.sac.agent import SacAgent
    slow(SacAgent, "update", {learner_s})
if "dsrl_async.run.worker.template" in sys.orig_argv and {actor_s}:
    from dsrl_async.envs.tabletop import TabletopEnvironment
    slow(TabletopEnvironment, "step_chunk", {actor_s})
"""


@pytest.mark.parametrize(
    ("learner_s", "actor_s", "ratio"), [(0.015, 0.0, 1.0), (0.0, 0.03, 1.0), (0.004, 0.0, 2.5), (0.0, 0.01, 0.4)]
)
def test_replay_ratio_is_kept_whichever_side_is_faster(
    tmp_path: Path, learner_s: float, actor_s: float, ratio: float
) -> None:
    """Artificial delays are put into the real processes through Python's sitecustomize hook."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE.format(learner_s=learner_s, actor_s=actor_s))
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    arguments = [*SMALL, "--replay-ratio", str(ratio), "--max-decisions", "400"]
    result = Launched(tmp_path / "run", *arguments, environment={"PYTHONPATH": path}).finish(120)
    assert result["exit_reason"] == "max_decisions", result
    assert result["replay_ratio"] == pytest.approx(ratio, rel=0.05)
