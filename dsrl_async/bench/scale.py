"""Many environment processes on one machine, and what they cost when they do nothing: they sleep, then answer.

A run of the real processes and memory makes --decisions decisions (by default as many as an H100 serves in an hour:
see `bench pipeline`), in compressed time: chunks, resets and batches take --compression times less. Per number of
actors, the medians of
  start, start_per_actor    seconds from the first process to the first decision of the last actor
  actor_memory              MB of private memory of an actor
  supervisor                share of a core that the supervisor takes: watching, counting, TensorBoard, display
  decisions_per_s           in compressed time
  inference_cpu, actor_cpu  CPU-microseconds per decision
  stop                      seconds from the wish to end until no process is left
  killed, left_over         processes that did not end by themselves, or not at all: 0

Not measured: simulation, rendering, policies, learning, anything on a GPU; an actor of a real environment has its
simulator's memory as well.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

from dsrl_async.bench.report import Report
from dsrl_async.config.settings import InferenceConfig
from dsrl_async.plan.gpus import h100
from dsrl_async.plan.simulation import EnvironmentTimes

OWN = "dsrl_async"
HOUR_DECISIONS = 752_000
UNITS = {
    "start": "s",
    "start_per_actor": "s",
    "actor_memory": "MB",
    "supervisor": "share of a core",
    "decisions_per_s": "decisions/s",
    "inference_cpu": "CPU-us per decision",
    "actor_cpu": "CPU-us per decision",
    "stop": "s",
    "killed": "processes",
    "left_over": "processes",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--actors", nargs="+", type=int, default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--decisions", type=int, default=HOUR_DECISIONS, help=f"(default: {HOUR_DECISIONS})")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a repeat, at least (default: 10)")
    parser.add_argument("--compression", type=float, default=100.0, help="of time (default: 100)")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a file to which the JSON lines are written as well")


def measure(actors: int, arguments: argparse.Namespace) -> dict[str, float]:
    from dsrl_async.bench.simulated import run as simulation

    real = EnvironmentTimes()
    times = EnvironmentTimes(
        real.chunk_s / arguments.compression,
        real.sigma,
        real.reset_s / arguments.compression,
        real.reset_probability,
    )
    service = {size: h100(size) / arguments.compression for size in InferenceConfig().buckets}
    wanted = simulation.Simulation(actors, times, service, record=False)
    run = simulation.measure(wanted, 0.5, arguments.seconds, arguments.decisions)
    return {
        "start": run.start_s,
        "start_per_actor": run.start_s / actors,
        "actor_memory": run.actor_memory / 1e6,
        "supervisor": run.supervisor.running / run.seconds,
        "decisions_per_s": run.decisions / run.seconds,
        "inference_cpu": 1e6 * run.inference.running / run.decisions,
        "actor_cpu": 1e6 * run.actors.running / run.decisions,
        "stop": run.stop_s,
        "killed": run.killed,
        "left_over": run.left_over,
    }


def summarise(samples: list[dict[str, float]]) -> Iterator[tuple[str, str, float, str]]:
    """(system, metric, value, unit)"""
    for metric, unit in UNITS.items():
        yield OWN, metric, statistics.median(sample[metric] for sample in samples), unit


def run(arguments: argparse.Namespace) -> None:
    """Measures what the options ask for; see `Report` for what is written."""
    if min(*arguments.actors, arguments.repeats) < 1 or arguments.decisions < 0 or arguments.compression <= 0:
        raise ValueError("--actors, --repeats and --compression must be positive, --decisions not negative")
    report = Report("scale", arguments.repeats, arguments.out)
    for actors in arguments.actors:
        report.case(f"{actors} actors, time compressed {arguments.compression:g} times")
        for figure in summarise([measure(actors, arguments) for _ in range(arguments.repeats)]):
            report.add(*figure)
