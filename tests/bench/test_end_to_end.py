"""Whole runs side by side: the order of a run in lock step, and the figures that are made of run directories."""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.commands import Done, call

from dsrl_async.bench import end_to_end
from dsrl_async.bench.systems.barrier import serve_in_lock_step
from dsrl_async.bench.systems.lock_step_process import learn_what_is_due
from dsrl_async.config.command_line import load_config
from dsrl_async.config.settings import Config
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.host.device import resolve_device
from dsrl_async.host.signals import StopRequest
from dsrl_async.pi0.config import EMBEDDED_POLICY
from dsrl_async.pi0.files import find_policy
from dsrl_async.policies.pi0 import pi0_record
from dsrl_async.run.inference.policies import load_policies
from dsrl_async.run.replay_ratio import updates_due
from dsrl_async.run.supervisor.serial import join
from dsrl_async.run.worker.worker import Lane, play
from dsrl_async.shm import events
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters, Stop
from dsrl_async.shm.memory import create_memory

HORIZON = 10
TINY = """
actors: 2
replay: {warmup_decisions: 16, capacity: 2000}
sac: {batch_size: 16, hidden_dims: [16, 16], num_q_heads: 2, conv_channels: [4]}
policy: {denoise_steps: 2}
learner: {publish_interval: 2}
log: {interval_s: 0.05}
"""


def bench(*options: str) -> Done:
    return call("bench", "end_to_end", *options)


class SlowLane(Lane):
    """Dawdles over every third decision, as one that resets would."""

    def advance(self) -> None:
        if self.requests % 3 == 0:
            time.sleep(0.03)
        super().advance()


def test_lock_step_waits_for_all_learns_answers_all(
    small_config: Config, spec: EnvironmentSpec, tmp_path: Path
) -> None:
    """Every lane does one decision per barrier, and no one acts while the learner is behind."""
    config = small_config.model_copy(update={"actors": 3, "replay_ratio": 1.5})
    config.replay.warmup_decisions = 17  # within a round
    config.policy.denoise_steps = 1
    config.inference.buckets = [2]  # so that a round takes two batches
    arena = create_memory(config, spec, HORIZON)
    cpu = resolve_device("cpu")
    policies = load_policies(config, spec, cpu, pi0_record(find_policy(EMBEDDED_POLICY)), Counters(arena))
    server, learner = join(config, arena, policies, HORIZON, cpu, tmp_path, lambda lanes: None)
    counters = server.counters
    observation_ready, wake = events.create(), [events.create() for _ in range(3)]
    classes = (Lane, SlowLane, Lane)
    lanes = [make(number, 1, 0, config.env.model_dump(), arena) for number, make in enumerate(classes)]
    threads = [
        threading.Thread(target=play, args=(lane, wake[lane.number], [observation_ready]), daemon=True)
        for lane in lanes
    ]
    done: list[list[int]] = []
    owed: list[int] = []
    acted_on_version: list[list[int]] = []

    def learn() -> None:
        before = counters.actor_decisions.copy()
        acted_on_version.append(server.slots.policy_version.tolist())
        learn_what_is_due(learner)
        assert counters.actor_decisions.tolist() == before.tolist()
        done.append(before.tolist())
        updates = int(counters.learner_updates[0])
        owed.append(updates_due(counters.decisions(), updates, 1.5, config.replay.warmup_decisions))
        if len(done) == 14:
            counters.stop = Stop.EVERYONE

    for thread in threads:
        thread.start()
    serve_in_lock_step(server, {"wake_fds": wake, "observation_ready_fd": observation_ready}, learn)
    for thread, fd in zip(threads, wake, strict=True):
        events.notify(fd)
        thread.join()
    events.close([observation_ready, *wake])
    assert done == [[rounds] * 3 for rounds in range(14)]
    assert owed == [0] * 14
    assert int(counters.learner_updates[0]) == math.floor(1.5 * (39 - 17))
    assert all(len(set(versions)) == 1 for versions in acted_on_version)


def test_nobody_is_woken_before_all_are_ready(small_config: Config, spec: EnvironmentSpec, memory: Arena) -> None:
    cpu = resolve_device("cpu")
    policies = load_policies(small_config, spec, cpu, pi0_record(find_policy(EMBEDDED_POLICY)), Counters(memory))
    server, _ = join(small_config, memory, policies, HORIZON, cpu, Path(), lambda lanes: None)
    observation_ready, wake = events.create(), [events.create(), events.create()]
    job = {"wake_fds": wake, "observation_ready_fd": observation_ready}
    thread = threading.Thread(target=serve_in_lock_step, args=(server, job), daemon=True)
    thread.start()
    server.slots.request(1, 1, 1)
    events.notify(observation_ready)
    assert not events.wait(wake[1], timeout_s=0.3)
    assert server.slots.ready().tolist() == [1]
    server.slots.request(0, 1, 1)
    events.notify(observation_ready)
    assert events.wait(wake[0], timeout_s=20)
    assert events.wait(wake[1], timeout_s=20)
    assert len(server.slots.ready()) == 0
    server.counters.stop = Stop.EVERYONE
    events.notify(observation_ready)
    thread.join()
    events.close([observation_ready, *wake])


def write_run(directory: Path, ticks: list[tuple[float, ...]]) -> Path:
    names = ("time", "env_steps", "decisions", "updates", "success_rate", "success_episodes")
    lines = [json.dumps(dict(zip(names, tick, strict=True))) for tick in ticks]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return directory


TICKS: list[Any] = [
    (1001.0, 0, 0, 0, None, 0),
    (1004.0, 100, 20, 0, 0.0, 3),  # the first decision
    (1010.0, 2000, 400, 0, 0.25, 60),
    (1012.0, 2100, 420, 10, 0.95, 99),  # learns, and has not finished enough episodes
    (1016.0, 2500, 500, 90, 0.89, 100),
    (1022.0, 3100, 620, 210, 0.9, 100),  # there
    (1032.0, 4100, 820, 410, 0.8, 100),
    (1092.0, 4101, 821, 411, 0.8, 100),  # written at the end, after the last checkpoint
]


def test_rates_leave_out_start_warm_up_and_end(tmp_path: Path) -> None:
    assert end_to_end.metrics_of(write_run(tmp_path, TICKS), 990.0, 0.9) == {
        "env_steps_per_s": 100,
        "decisions_per_s": 20,
        "updates_per_s": 20,
        "start": 14,
        "seconds_to_success": 18,
        "start_to_success": 32,
        "decisions_to_success": 620,
    }


def test_a_run_that_does_not_succeed_has_rates(tmp_path: Path) -> None:
    figures = end_to_end.metrics_of(write_run(tmp_path, TICKS), 990.0, 0.91)
    assert {name for name, value in figures.items() if math.isinf(value)} == {
        *("seconds_to_success", "start_to_success", "decisions_to_success")
    }
    assert figures["updates_per_s"] == 20


def test_a_run_without_learning_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"did 500 decisions and 90 updates, too few to measure; raise --max-minutes"):
        end_to_end.metrics_of(write_run(tmp_path, TICKS[:5]), 990.0, 0.9)


def sample(rate: float, seconds: float) -> end_to_end.Metrics:
    rates = dict.fromkeys(("env_steps_per_s", "decisions_per_s", "updates_per_s"), rate)
    return {**rates, "start": 5.0, "seconds_to_success": seconds, "start_to_success": seconds + 5} | {
        "decisions_to_success": rate * seconds
    }


def test_medians_count_a_run_that_did_not_get_there_as_the_longest() -> None:
    samples = {
        "asynchronous": [sample(20, math.inf), sample(30, 60.0), sample(40, 50.0)],
        "serial": [sample(10, 240.0), sample(10, 230.0), sample(10, 240.0)],
        "lock step": [sample(5, math.inf), sample(15, math.inf), sample(15, 70.0)],
    }
    value = {(system, metric): value for system, metric, value, *_ in end_to_end.summarise(samples)}
    assert value["asynchronous", "seconds_to_success"] == 60
    assert value["asynchronous", "reached"] == 2
    assert value["asynchronous/serial", "seconds_to_success"] == 0.25
    assert value["asynchronous/serial", "decisions_per_s"] == 3
    assert value["asynchronous/lock step", "updates_per_s"] == 2
    assert value["lock step", "reached"] == 1
    for system in ("lock step", "asynchronous/lock step"):
        assert math.isinf(value[system, "seconds_to_success"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"repeats": 0}, "--repeats and --max-minutes must be positive"),
        ({"max_minutes": 0.0}, "must be positive"),
        ({"success": 90.0}, "--success above 0 and at most 1"),
    ],
)
def test_impossible_options_are_refused(changed: dict[str, Any], message: str) -> None:
    parser = argparse.ArgumentParser()
    end_to_end.add_arguments(parser)
    arguments = parser.parse_args([])
    vars(arguments).update(changed)
    with pytest.raises(ValueError, match=message):
        end_to_end.options_of(arguments)


def test_what_no_run_could_be_made_with_is_said_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("actors: 0")
    result = bench("--config", str(tmp_path / "wrong.yaml"))
    assert result.code == 2
    assert result.stderr.startswith("error: actors: ")
    assert len(result.stderr.splitlines()) == 1


def test_the_configuration_does_not_choose_the_system(tmp_path: Path) -> None:
    (tmp_path / "serial.yaml").write_text("serial: true")
    chosen = {
        system: load_config([*own_options, "--config", str(tmp_path / "serial.yaml")]).serial
        for system, (_, *own_options) in end_to_end.PROGRAMS.items()
    }
    assert chosen == {"asynchronous": False, "serial": True, "lock step": False}


def test_runs_of_before_are_not_measured_again(tmp_path: Path) -> None:
    (tmp_path / "serial-0").mkdir()
    (tmp_path / "file").touch()
    for keep in (tmp_path, tmp_path / "file"):
        result = bench("--keep", str(keep))
        assert result.code == 2
        assert result.stderr == f"error: --keep {keep}: it is there, and is no empty directory; choose another one\n"


def test_a_run_that_fails_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    handler = signal.getsignal(signal.SIGINT)
    stop = StopRequest()
    signal.signal(signal.SIGINT, handler)
    with pytest.raises(ValueError, match="ended with exit code 2"):
        end_to_end.measure("serial", [], 0, tmp_path, 0.9, stop)


@pytest.mark.slow
def test_all_systems_end_to_end(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY + "max_decisions: 80\n")
    out, runs = tmp_path / "figures.jsonl", tmp_path / "runs"
    runs.mkdir()
    result = bench(
        *("--config", str(tmp_path / "tiny.yaml"), "--actors", "3", "--threads", "1", "--repeats", "1"),
        *("--max-minutes", "4", "--keep", str(runs), "--out", str(out)),
    )
    assert result.code == 0, result.stderr
    assert result.stdout == out.read_text()
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert {record["case"] for record in records} == {"tabletop 3 actors replay ratio 1 1 threads until 90%"}
    value = {(record["system"], record["metric"]): record["value"] for record in records}
    for system in ("asynchronous", "serial", "lock step"):
        assert value[system, "decisions_per_s"] > 0
        assert value[system, "env_steps_per_s"] == pytest.approx(5 * value[system, "decisions_per_s"], rel=0.2)
        assert value[system, "start"] > 0
        assert value[system, "reached"] == 0
        assert (system, "seconds_to_success") not in value
        assert f"no seconds_to_success, start_to_success, decisions_to_success of {system}: 90%" in result.stderr
        summary = json.loads((runs / f"{system.replace(' ', '-')}-0" / "summary.json").read_text())
        assert summary["decisions"] == 80
        assert summary["replay_ratio"] == pytest.approx(1.0, abs=0.1)
    rates = [value[system, "decisions_per_s"] for system in ("asynchronous", "lock step")]
    assert value["asynchronous/lock step", "decisions_per_s"] == pytest.approx(rates[0] / rates[1], rel=1e-4)


@pytest.mark.slow
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    runs = tmp_path / "runs"
    runs.mkdir()
    command = [sys.executable, "-m", "dsrl_async.bench", "end_to_end", "--system", "lock step", "--keep", str(runs)]
    process = subprocess.Popen([*command, "--config", str(tmp_path / "tiny.yaml")], stderr=subprocess.PIPE, text=True)
    metrics = runs / "lock-step-0" / "metrics.jsonl"
    while not (metrics.is_file() and '"updates": 2' in metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) == 5  # the run, its process in lock step, the template, two actors
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr
    assert not any(child.is_running() for child in started)
    assert json.loads((runs / "lock-step-0" / "summary.json").read_text())["exit_reason"] == "terminated"
