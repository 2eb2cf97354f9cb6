"""Many environment workers on one machine, and what they cost when they only sleep and answer.

A run of the real processes and memory makes --decisions decisions (by default as many as an H100 serves in an hour:
see `bench pipeline`), in compressed time: chunks, resets and batches take --compression times less. The figures for a
number of workers (--actors) are the medians of
  start, start_per_actor    seconds from the first process to the first decision of the last worker
  actor_memory              MB of private memory of a worker
  supervisor                share of a core that the supervisor takes for watching, counting, TensorBoard and display
  decisions_per_s           decisions per second of compressed time
  inference_cpu, actor_cpu  CPU-microseconds per decision
  stop                      seconds from the request to stop until no process is left
  killed, left_over         processes that did not end by themselves, or not at all; 0 is expected

Not measured: simulation, rendering, policies, learning, anything on a GPU; with a real environment a worker has its
simulator's memory as well.
"""

from __future__ import annotations

import argparse

from dsrl_async.bench.figures import Figure, JsonLines, Metrics, add_output_arguments, medians, require_positive
from dsrl_async.bench.pipeline import h100
from dsrl_async.config.settings import InferenceConfig
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
    parser.add_argument("--seconds", type=float, default=10.0, help="shortest length of a repeat (default: 10)")
    parser.add_argument(
        "--compression", type=float, default=100.0, help="factor by which time is compressed (default: 100)"
    )
    add_output_arguments(parser, repeats=1)


def measure(actors: int, arguments: argparse.Namespace) -> Metrics:
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
        "actor_memory": run.worker_memory / 1e6,
        "supervisor": run.supervisor.running / run.seconds,
        "decisions_per_s": run.decisions / run.seconds,
        "inference_cpu": 1e6 * run.inference.running / run.decisions,
        "actor_cpu": 1e6 * run.workers.running / run.decisions,
        "stop": run.stop_s,
        "killed": run.killed,
        "left_over": run.left_over,
    }


def run(arguments: argparse.Namespace) -> None:
    require_positive(arguments, "actors", "repeats", "compression")
    if arguments.decisions < 0:
        raise ValueError("--decisions must not be negative")
    lines = JsonLines("scale", arguments)
    for actors in arguments.actors:
        lines.case(f"{actors} actors, time compressed {arguments.compression:g} times")
        values = medians([measure(actors, arguments) for _ in range(arguments.repeats)])
        lines.add(Figure(OWN, metric, values[metric], unit) for metric, unit in UNITS.items())
