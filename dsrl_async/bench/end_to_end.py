"""Whole runs, from the first process to a policy that succeeds: asynchronous, serial and in lock step.

Every system is a program of its own, started as a user starts a run, with the same configuration, actors, replay ratio
and seed; the systems take turns, with a new seed (0, 1, ...) for each repeat:
  asynchronous   `python -m dsrl_async.launch`: a process per actor, one for the policy, one for the learner
  serial         the same with --serial: one process that does everything in turn
  lock step      how programs with vectorised environments run: a process per actor, all of which step at once; when
                 the last one is ready (resets are inside this barrier) one other process does the updates that are
                 due, then answers all actors in one batch, and only then do they step again. The run's own actors,
                 memory, policy, learner and supervisor are used; only the order is another one
Policy and learner have as many threads as `inference.threads` and `learner.threads` say (null: a quarter of the cores,
one at least), lock step the former for both, serial the latter for everything; --threads sets both. An actor has one.

A run ends when --success of its last 100 episodes were successes, or after --max-minutes. Medians of the repeats:
  env_steps_per_s, decisions_per_s, updates_per_s
                           from the first tick of the run's metrics.jsonl (`log.interval_s`) with a gradient update to
                           the last one: no start, no warm-up, no last checkpoint
  start                    seconds from starting the program to its first decision
  seconds_to_success       wall seconds from the first decision on, warm-up included
  start_to_success         the same from starting the program on
  decisions_to_success     how many it took: what the order of acting and learning means for learning
  reached                  how many of the repeats got there in time
to within `log.interval_s`; and the ratios of asynchronous to the others. Repeats that did not get there count as
longer than all others in a median. Where the median is such a one the line is left out, and stderr says so.

Not measured: how good the policy is on episodes of its own (`python -m dsrl_async.evaluate`). Serial runs use no GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dsrl_async.bench.report import Report
from dsrl_async.config.command_line import load_config
from dsrl_async.config.settings import Config
from dsrl_async.host.processes import PR_SET_PDEATHSIG
from dsrl_async.host.signals import SIGNALS, StopRequest
from dsrl_async.run.preflight.policy import check_policy
from dsrl_async.telemetry.monitor import SUCCESS_EPISODES

ASYNCHRONOUS, SERIAL, LOCK_STEP = "asynchronous", "serial", "lock step"
PROGRAMS = {
    ASYNCHRONOUS: ["dsrl_async.launch", "--serial", "false"],
    SERIAL: ["dsrl_async.launch", "--serial", "true"],
    LOCK_STEP: ["dsrl_async.bench.systems.lock_step", "--serial", "false"],
}
"""Module and options, whatever the configuration says."""
UNITS = {
    "env_steps_per_s": "env steps/s",
    "decisions_per_s": "decisions/s",
    "updates_per_s": "updates/s",
    "start": "s",
    "seconds_to_success": "s",
    "start_to_success": "s",
    "decisions_to_success": "decisions",
}
COMPARED = ("env_steps_per_s", "decisions_per_s", "updates_per_s", "seconds_to_success", "decisions_to_success")
WATCH_INTERVAL_S = 0.2

Figures = dict[str, float]
"""Metric -> value; infinite where the run did not get there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="YAML", help="as of `launch` (default: the embedded task)")
    parser.add_argument("--system", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("--actors", type=int, help="(default: the configuration's)")
    parser.add_argument("--threads", type=int, help="of policy and learner (default: the configuration's)")
    parser.add_argument("--success", type=float, default=0.9, help="rate that ends a run (default: 0.9)")
    parser.add_argument("--max-minutes", type=float, default=10.0, help="of a run without it (default: 10)")
    parser.add_argument("--repeats", type=int, default=3, help="of each system, with as many seeds (default: 3)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the run directories there (default: do not)")
    parser.add_argument("--out", type=Path, help="a file to which the JSON lines are written as well")


def options_of(arguments: argparse.Namespace) -> list[str]:
    """What every system's program is told; raises ValueError for what no run could be made with."""
    if arguments.repeats < 1 or arguments.max_minutes <= 0 or not 0 < arguments.success <= 1:
        raise ValueError("--repeats and --max-minutes must be positive, --success above 0 and at most 1")
    given = {
        "config": arguments.config,
        "actors": arguments.actors,
        "inference.threads": arguments.threads,
        "learner.threads": arguments.threads,
        "max-minutes": arguments.max_minutes,
        "stop-at-success": arguments.success,
        "log.console": "plain",
    }
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def figures(run_dir: Path, started: float, success: float) -> Figures:
    """Of a run that has ended; `started` is when its program was, time.time.

    Raises ValueError if it ended before there was something to measure.
    """
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    ticks = lines[:-1]  # the last one is written when every process has ended
    learning = [tick for tick in ticks if tick["updates"] > 0]
    if len({tick["updates"] for tick in learning}) < 2:
        raise ValueError(
            f"the run did {lines[-1]['decisions']} decisions and {lines[-1]['updates']} updates, too few to measure; "
            "raise --max-minutes"
        )
    first, last = learning[0], learning[-1]
    seconds = last["time"] - first["time"]
    begin = next(tick["time"] for tick in ticks if tick["decisions"] > 0)
    reached = next((tick for tick in ticks if has_reached(tick, success)), {"time": math.inf, "decisions": math.inf})
    return {
        **{f"{name}_per_s": (last[name] - first[name]) / seconds for name in ("env_steps", "decisions", "updates")},
        "start": begin - started,
        "seconds_to_success": reached["time"] - begin,
        "start_to_success": reached["time"] - started,
        "decisions_to_success": reached["decisions"],
    }


def has_reached(tick: dict[str, Any], success: float) -> bool:
    """The same test as that of a run's `stop_at_success`."""
    return tick["success_episodes"] >= SUCCESS_EPISODES and tick["success_rate"] >= success


def end_with_parent() -> None:
    """In a child, before its program: ask it to end, as Ctrl-C does, when the benchmark is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def measure(system: str, options: list[str], seed: int, run_dir: Path, success: float, stop: StopRequest) -> Figures:
    """Make a run and measure it.

    Raises:
        ValueError: it failed.
        KeyboardInterrupt: it was ended, on request; nothing of it is left.
    """
    module, *own_options = PROGRAMS[system]
    command = [sys.executable, "-m", module, *own_options, *options, "--seed", str(seed), "--run-dir", str(run_dir)]
    started = time.time()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=end_with_parent)
    while process.poll() is None:
        if stop.reason:
            process.terminate()
        time.sleep(WATCH_INTERVAL_S)
    if stop.reason:
        raise KeyboardInterrupt
    summary = run_dir / "summary.json"
    ended = json.loads(summary.read_text())["exit_reason"] if summary.is_file() else "see above"
    if process.returncode != 0 or ended in SIGNALS.values():  # somebody ended this run alone
        raise ValueError(f"the run ended with exit code {process.returncode}: {ended}")
    return figures(run_dir, started, success)


def summarise(samples: dict[str, list[Figures]]) -> Iterator[tuple[str, str, float, str]]:
    """(system, metric, value, unit); ratios come last, and infinite values are among them."""
    medians = {
        system: {metric: statistics.median(each[metric] for each in runs) for metric in UNITS}
        for system, runs in samples.items()
    }
    for system, runs in samples.items():
        for metric, unit in UNITS.items():
            yield system, metric, medians[system][metric], unit
        yield system, "reached", sum(math.isfinite(each["seconds_to_success"]) for each in runs), "runs"
    for other in (SERIAL, LOCK_STEP):
        if {ASYNCHRONOUS, other} <= medians.keys():
            for metric in COMPARED:
                ours, theirs = medians[ASYNCHRONOUS][metric], medians[other][metric]
                yield f"{ASYNCHRONOUS}/{other}", metric, ours / theirs if math.isfinite(theirs) else math.inf, "ratio"


def name_of(config: Config) -> str:
    threads = f" {config.learner.threads} threads" if config.learner.threads else ""
    return f"{config.env.name} {config.actors} actors replay ratio {config.replay_ratio:g}{threads}"


def run(arguments: argparse.Namespace) -> None:
    """Measures what the options ask for; see `Report` for what is written."""
    options = options_of(arguments)
    config = load_config(options)
    check_policy(config)
    keep: Path | None = arguments.keep
    if keep is not None and keep.exists() and not (keep.is_dir() and not any(keep.iterdir())):
        raise ValueError(f"--keep {keep}: it is there, and is no empty directory; choose another one")
    report = Report("end_to_end", arguments.repeats, arguments.out)
    report.case(f"{name_of(config)} until {arguments.success:.0%}")
    samples: dict[str, list[Figures]] = {system: [] for system in arguments.system}
    stop = StopRequest()
    with ExitStack() as cleaning:
        directory = keep or Path(cleaning.enter_context(tempfile.TemporaryDirectory(prefix="dsrl_async-")))
        for seed in range(arguments.repeats):
            for system in samples:
                note(f"{system}, repeat {seed + 1} of {arguments.repeats}")
                run_dir = directory / f"{system.replace(' ', '-')}-{seed}"
                try:
                    sample = measure(system, options, seed, run_dir, arguments.success, stop)
                except ValueError as error:
                    raise ValueError(f"{system}, seed {seed}: {error}") from error
                samples[system].append(sample)
                reached = sample["seconds_to_success"]
                when = f"after {reached:.0f} s" if math.isfinite(reached) else "not reached"
                note(f"{system}: {sample['decisions_per_s']:.1f} decisions/s; {arguments.success:.0%} success {when}")
    missing: dict[str, list[str]] = {}
    for system, metric, value, unit in summarise(samples):
        if math.isfinite(value):
            report.add(system, metric, value, unit)
        else:
            missing.setdefault(system, []).append(metric)
    for system, metrics in missing.items():
        note(f"no {', '.join(metrics)} of {system}: {arguments.success:.0%} success was not reached in time")


def note(text: str) -> None:
    print(f"end_to_end: {text}", file=sys.stderr, flush=True)
