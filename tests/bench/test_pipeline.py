"""The simulated runs: real processes, given times; and the figures that are made of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from support.commands import Done, call

from dsrl_async.bench import pipeline
from dsrl_async.bench.simulated import environment as simulated_environment
from dsrl_async.bench.simulated.run import Simulation, measure
from dsrl_async.plan.simulation import EnvironmentTimes

TIMES = EnvironmentTimes(chunk_s=0.004, sigma=0.3, reset_s=0.02, reset_probability=0.1)
SERVICE = {1: 0.002, 2: 0.004, 4: 0.008}


def bench(*options: str) -> Done:
    return call("bench", *options)


def test_a_run_is_measured_and_leaves_nothing_behind() -> None:
    run = measure(Simulation(3, TIMES, SERVICE), warm_s=0.2, seconds=0.5, decisions=40)
    assert run.decisions >= 40
    assert run.seconds >= 0.5
    # nearly: some are being executed, and nobody stops the processes while their counters are read
    assert run.rows == pytest.approx(run.decisions, rel=0.2)
    assert run.batches < 1.1 * run.rows < 1.2 * run.padded_rows
    # every answered request was noted, and waited before it was answered
    assert len(run.latency_s) == pytest.approx(run.rows, rel=0.2)
    assert (run.queue_wait_s >= 0).all()
    assert (run.latency_s >= run.queue_wait_s + min(SERVICE.values())).all()
    # the device was busy for as long as its batches take at least
    assert run.phase_s["compute"] >= 0.9 * run.batches * min(SERVICE.values())
    assert run.supervisor.running > 0
    assert run.inference.running > 0
    assert run.workers.running > 0
    assert 5e6 < run.worker_memory < 60e6
    assert run.left_over == 0


def test_an_evaluation_shares_the_device_and_counts_in_nothing() -> None:
    run = measure(Simulation(2, TIMES, SERVICE, evaluators=2), warm_s=0.3, seconds=0.5, decisions=20)
    assert run.rows > 1.5 * run.decisions  # two more workers, each as quick as those of the training
    assert run.killed == 0
    assert run.left_over == 0


def test_lock_step_serves_all_actors_in_each_round() -> None:
    run = measure(Simulation(4, TIMES, SERVICE, lock_step=True), warm_s=0.3, seconds=0.3, decisions=12)
    assert run.rows == pytest.approx(4 * run.batches, abs=4)  # the two are not read at the same moment


def test_environments_take_the_times_that_the_model_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(simulated_environment, "_sleep", slept.append)
    environment = simulated_environment.SleepingEnvironment(TIMES, seed=pipeline.SEED, lane=2)
    environment.reset(0)
    assert slept == [0.0]
    taken = []
    for _ in range(200):
        slept.clear()
        if environment.step_chunk(np.zeros((10, 7), np.float32)).truncated:
            environment.reset(0)
        taken.append(sum(slept))
    assert taken == list(itertools.islice(TIMES.totals(pipeline.SEED, 2), 200))


def test_device_curve_is_the_roofline() -> None:
    """1.3 x max(5.2, 3.68 B) ms, as worked out by hand."""
    assert 1e3 * pipeline.h100(1) == pytest.approx(1.3 * 5.2, rel=0.03)
    assert 1e3 * pipeline.h100(20) == pytest.approx(1.3 * 3.68 * 20, rel=0.03)


def test_pipeline_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "figures.jsonl"
    options = ["--actors", "2", "--seconds", "0.5", "--warm-seconds", "0.1", "--repeats", "1", "--out", str(out)]
    result = bench("pipeline", *options, "--chunk-ms", "5", "--reset-ms", "20")
    assert result.code == 0, result.stderr
    assert result.stdout == out.read_text()
    value = {(record["system"], record["metric"]): record["value"] for record in map(json.loads, out.open())}
    for system in pipeline.SYSTEMS:
        assert value[system, "decisions_per_s"] > 0
        assert 0 < value[system, "device_busy"] <= 1.2
        assert value[system, "latency_p95"] >= value[system, "latency_p50"] >= value[system, "queue_wait_p50"]
    rates = [value[system, "decisions_per_s"] for system in (pipeline.OWN, pipeline.IDEAL)]
    assert value["dsrl_async/ideal", "decisions_per_s"] == pytest.approx(rates[0] / rates[1], rel=1e-4)
    assert ("dsrl_async/lock step", "decisions_per_s") in value
    assert value["dsrl_async", "memory"] > 0


def test_scale_end_to_end() -> None:
    options = ["--actors", "3", "--seconds", "0.2", "--decisions", "50", "--compression", "20"]
    result = bench("scale", *options)
    assert result.code == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert {record["case"] for record in records} == {"3 actors, time compressed 20 times"}
    for record in records:
        if record["metric"] == "left_over":
            assert record["value"] == 0
        elif record["metric"] != "killed":
            assert record["value"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["pipeline", "--actors", "0"], "must be positive"),
        (["pipeline", "--buckets", "4", "2"], "increasing"),
        (["pipeline", "--episode-decisions", "1"], "above 1"),
        (["scale", "--compression", "0"], "must be positive"),
    ],
)
def test_impossible_options_are_refused(options: list[str], message: str) -> None:
    result = bench(*options)
    assert result.code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stdout == ""


def test_an_actor_that_cannot_start_ends_the_run_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsrl_async.bench.simulated.run.asdict", lambda times: {"hours": 1})
    with pytest.raises(ValueError, match=r"failed: .*hours"):
        measure(Simulation(1, TIMES, SERVICE), warm_s=0.1, seconds=0.1)


def test_groups_take_turns_with_one_machine_and_all_of_it_is_counted() -> None:
    """Two groups of one worker; of the updates that are due, a learner does nearly all meanwhile."""
    options = ("--groups", "2", "--actors", "1", "--buckets", "1", "2", "--device", "flat", "--chunk-ms", "20")
    done = bench("pipeline", *options, "--seconds", "2", "--warm-seconds", "0.5", "--repeats", "1")
    assert done.code == 0, done.stderr
    figures = {}
    for line in map(json.loads, done.stdout.splitlines()):
        assert line["case"] == "flat 2 groups of 1 actors chunk 20 ms reset 600 ms update 1 ms"
        figures[line["system"], line["metric"]] = line["value"]
    for system in ("groups", "one machine"):
        rate = figures[system, "decisions_per_s"]
        assert 2 < rate < 2 / 0.07  # a worker takes 20 ms and waits 50 ms for the device
        assert figures[system, "updates_per_s"] == pytest.approx(rate, rel=0.5)
        assert figures[system, "policy_lag"] >= 0
        assert figures[system, "cpu"] > 0
    assert figures["groups", "link"] > 0
    ratio = figures["groups", "decisions_per_s"] / figures["one machine", "decisions_per_s"]
    assert figures["groups/one machine", "decisions_per_s"] == pytest.approx(ratio, rel=1e-4)


def test_one_group_is_no_comparison() -> None:
    assert "--groups must be at least 2" in bench("pipeline", "--groups", "1").stderr
