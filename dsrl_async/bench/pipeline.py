"""Environments and a device of given speeds, with the real processes and memory between them.

The environments sleep for drawn times (lognormal chunk times, long resets now and then), the device for as long as its
latency curve says. The figures for a number of environments (--actors) are the medians of
  decisions_per_s           decisions per second of a run
  device_busy               share of time that the device computes
  queue_wait_p50, _p95      ms from an observation to the start of its batch
  latency_p50, _p95         ms from an observation to its answer
  batch_size, batch_fill    observations per batch, and per row that was computed
  cpu                       CPU-milliseconds per decision of all processes
  memory                    MB of private memory of all environment workers
  cpu_wait                  share of time for which the inference process was ready to run and had no core: if it is
                            not near 0, the machine was too busy to measure on
of these systems, which take turns with the same draws:
  dsrl_async            the processes of a run, batching by readiness
  evaluating            the same with --evaluation-actors workers more, whose evaluation goes on all the time (only if
                        --system names it); what is counted is the training's, and the times are of all rows
  lock step             the same processes with one barrier per decision, resets inside it
  ideal                 a simulation of batching by readiness with every batch size, no wait and no overhead
  ideal lock step       a simulation of the barrier
and the ratios of dsrl_async to the ideal and to lock step (above 1: more decisions),
and of evaluating to dsrl_async.

With --groups G there are, in turns, G groups with --actors each and a device each (`groups`), and one machine with as
many workers and one device (`one machine`), both with a learner that takes --update-ms for each update, one for each
decision. Besides decisions_per_s, cpu and cpu_wait, which are as above, their figures are
  updates_per_s         updates of the learner per second
  policy_lag            mean number of updates by which the weights of a decision were behind the learner's
  link                  CPU-microseconds per decision of the uplinks and the downlink, with publications of weights
and the ratio of groups to one machine (scripts/studies/check_plan.py compares both with what `plan` predicts).

Not measured: policies, learning, simulation, rendering; the times of environments and devices are settings.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from dsrl_async.bench.figures import (
    Figure,
    JsonLines,
    Metrics,
    add_output_arguments,
    medians,
    require_positive,
    take_turns,
)
from dsrl_async.config.settings import InferenceConfig
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.plan.gpus import ABOVE_BOUND, roofline
from dsrl_async.plan.simulation import EnvironmentTimes, Throughput, simulate, simulate_lock_step

OWN, LOCK_STEP, IDEAL, IDEAL_LOCK_STEP = "dsrl_async", "lock step", "ideal", "ideal lock step"
SYSTEMS = (OWN, LOCK_STEP, IDEAL, IDEAL_LOCK_STEP)
EVALUATING = "evaluating"
GROUPS, ONE_MACHINE = "groups", "one machine"
SEED = 0
MODEL_DECISIONS = 20_000
"""Number of decisions of a simulation, after half as many that are not measured."""


def h100(size: int) -> float:
    """Seconds that a batch of Pi0 takes on an H100: what `roofline` says of one observation, or a share of 32."""
    one, full = roofline("h100", Pi0Config(), denoise_steps=10, sizes=(1, 32)).values()
    return max(one, full / 32 * size)


DEVICES: dict[str, Callable[[int], float]] = {
    "h100": h100,
    "launches": lambda size: 0.020 + 0.0048 * size,
    "flat": lambda size: 0.050,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", nargs="+", choices=[*SYSTEMS, EVALUATING], default=list(SYSTEMS))
    parser.add_argument(
        "--device",
        nargs="+",
        choices=list(DEVICES),
        default=["h100"],
        help=f"h100: full-size Pi0 at {ABOVE_BOUND} x its bound (default); launches: 20 ms + 4.8 ms a row; flat: 50 ms",
    )
    parser.add_argument("--actors", nargs="+", type=int, default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--groups", type=int, metavar="G", help="compare G groups of --actors with one machine instead")
    parser.add_argument("--update-ms", type=float, default=1.0, help="with --groups: of the learner (default: 1)")
    parser.add_argument("--evaluation-actors", type=int, default=2, help="of the system `evaluating` (default: 2)")
    parser.add_argument("--chunk-ms", type=float, default=60.0, help="mean time of a chunk (default: 60)")
    parser.add_argument("--sigma", type=float, default=0.3, help="standard deviation of its logarithm (default: 0.3)")
    parser.add_argument("--reset-ms", type=float, default=600.0, help="(default: 600)")
    parser.add_argument("--episode-decisions", type=float, default=25.0, help="mean per episode (default: 25)")
    inference = InferenceConfig()
    parser.add_argument(
        "--buckets", nargs="+", type=int, default=inference.buckets, help="batch sizes (default: a run's)"
    )
    parser.add_argument("--batch-wait-ms", type=float, default=0.0, help="as inference.batch_wait_ms (default: 0)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a repeat (default: 20)")
    parser.add_argument("--warm-seconds", type=float, default=3.0, help="time before it (default: 3)")
    add_output_arguments(parser, repeats=5)


def modelled(throughput: Throughput) -> Metrics:
    return {
        "decisions_per_s": throughput.decisions_per_s,
        "device_busy": throughput.device_busy,
        "batch_size": throughput.batch_size,
        "batch_fill": throughput.batch_fill,
        **quantiles(throughput.queue_wait_s, throughput.latency_s),
    }


def quantiles(queue_wait_s: np.ndarray, latency_s: np.ndarray) -> Metrics:
    return {
        f"{name}_p{percent}": 1e3 * float(np.percentile(seconds, percent))
        for name, seconds in (("queue_wait", queue_wait_s), ("latency", latency_s))
        for percent in (50, 95)
    }


def measured(
    actors: int,
    times: EnvironmentTimes,
    service: dict[int, float],
    system: str,
    arguments: argparse.Namespace,
) -> Metrics:
    from dsrl_async.bench.simulated.run import Simulation, measure

    evaluators = arguments.evaluation_actors if system == EVALUATING else 0
    simulation = Simulation(
        actors, times, service, arguments.batch_wait_ms, lock_step=system == LOCK_STEP, evaluators=evaluators
    )
    run = measure(simulation, arguments.warm_seconds, arguments.seconds)
    return {
        "decisions_per_s": run.decisions / run.seconds,
        "device_busy": run.phase_s["compute"] / run.seconds,
        "batch_size": run.rows / run.batches,
        "batch_fill": run.rows / run.padded_rows,
        **quantiles(run.queue_wait_s, run.latency_s),
        "cpu": 1e3 * run.cpu_s / run.decisions,
        "memory": actors * run.worker_memory / 1e6,
        "cpu_wait": run.inference.waiting / run.seconds,
    }


def measured_learning(
    actors: int,
    groups: int,
    times: EnvironmentTimes,
    service: dict[int, float],
    arguments: argparse.Namespace,
) -> Metrics:
    """Of so many groups with so many actors each."""
    from dsrl_async.bench.simulated.groups import LINK, measure_learning
    from dsrl_async.bench.simulated.run import Simulation

    simulation = Simulation(actors, times, service, arguments.batch_wait_ms, record=False)
    run = measure_learning(simulation, groups, arguments.update_ms / 1e3, arguments.warm_seconds, arguments.seconds)
    if run.left_over:
        raise ValueError(f"the simulated run left {run.left_over} processes behind")
    link = {"link": 1e6 * sum(run.cpu_s[name].running for name in LINK) / run.decisions} if groups > 1 else {}
    return {
        "decisions_per_s": run.decisions / run.seconds,
        "updates_per_s": run.updates / run.seconds,
        "policy_lag": run.policy_lag,
        "cpu": 1e3 * sum(used.running for used in run.cpu_s.values()) / run.decisions,
        **link,
        "cpu_wait": run.cpu_s["inference"].waiting / run.seconds / groups,
    }


UNITS = {
    "decisions_per_s": "decisions/s",
    "device_busy": "share of time",
    "batch_size": "observations",
    "batch_fill": "share of rows",
    "queue_wait_p50": "ms",
    "queue_wait_p95": "ms",
    "latency_p50": "ms",
    "latency_p95": "ms",
    "cpu": "CPU-ms per decision",
    "memory": "MB",
    "cpu_wait": "share of time",
    "updates_per_s": "updates/s",
    "policy_lag": "updates",
    "link": "CPU-microseconds per decision",
}


def summarise(samples: dict[str, list[Metrics]]) -> Iterator[Figure]:
    """Medians, then ratios."""
    rate = {}
    for system, of_system in samples.items():
        values = medians(of_system)
        for metric, value in values.items():
            yield Figure(system, metric, value, UNITS[metric])
        rate[system] = values["decisions_per_s"]
    pairs = [(OWN, IDEAL), (OWN, LOCK_STEP), (OWN, IDEAL_LOCK_STEP), (LOCK_STEP, IDEAL_LOCK_STEP)]
    pairs += [(EVALUATING, OWN), (GROUPS, ONE_MACHINE)]
    for system, against in pairs:
        if {system, against} <= rate.keys():
            yield Figure(f"{system}/{against}", "decisions_per_s", rate[system] / rate[against], "ratio")


def run(arguments: argparse.Namespace) -> None:
    require_positive(arguments, "actors", "evaluation_actors", "buckets", "repeats", "chunk_ms", "seconds")
    if arguments.groups is not None and arguments.groups < 2:
        raise ValueError("--groups must be at least 2: one group is what one machine is")
    if arguments.update_ms < 0:
        raise ValueError("--update-ms must not be negative")
    if arguments.buckets != sorted(set(arguments.buckets)):
        raise ValueError("--buckets must be increasing")
    if arguments.episode_decisions <= 1:
        raise ValueError("--episode-decisions must be above 1")
    times = EnvironmentTimes(
        arguments.chunk_ms / 1e3, arguments.sigma, arguments.reset_ms / 1e3, 1 / arguments.episode_decisions
    )
    real = [system for system in (OWN, EVALUATING, LOCK_STEP) if system in arguments.system]
    lines = JsonLines("pipeline", arguments)
    update = f"update {arguments.update_ms:g} ms"
    every_size = range(1, arguments.buckets[-1] + 1)
    for device in arguments.device:
        curve = DEVICES[device]
        buckets = {size: curve(size) for size in arguments.buckets}
        exact = {size: curve(size) for size in every_size}
        for actors in arguments.actors:
            pace = f"chunk {arguments.chunk_ms:g} ms reset {arguments.reset_ms:g} ms"
            if arguments.groups is not None:
                lines.case(f"{device} {arguments.groups} groups of {actors} actors {pace} {update}")
                sizes = {GROUPS: (actors, arguments.groups), ONE_MACHINE: (arguments.groups * actors, 1)}
                runs = {
                    system: partial(measured_learning, *size, times, buckets, arguments)
                    for system, size in sizes.items()
                }
                lines.add(summarise(take_turns(runs, arguments.repeats)))
                continue
            lines.case(f"{device} {actors} actors {pace}")
            runs = {system: partial(measured, actors, times, buckets, system, arguments) for system in real}
            samples = take_turns(runs, arguments.repeats)
            if IDEAL in arguments.system:
                draws = [times.totals(SEED, lane) for lane in range(actors)]
                ideal = simulate(draws, exact.__getitem__, every_size, MODEL_DECISIONS, MODEL_DECISIONS // 2)
                samples[IDEAL] = [modelled(ideal)]
            if IDEAL_LOCK_STEP in arguments.system:
                draws = [times.totals(SEED, lane) for lane in range(actors)]
                ideal = simulate_lock_step(draws, exact.__getitem__, every_size, MODEL_DECISIONS)
                samples[IDEAL_LOCK_STEP] = [modelled(ideal)]
            lines.add(summarise(samples))
