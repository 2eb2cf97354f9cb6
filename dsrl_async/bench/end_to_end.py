"""Whole runs, from the first process to a policy that succeeds: asynchronous, serial and in lock step.

Every system is a program of its own, started as a user starts a run, with the same configuration, actors, replay ratio
and seed. The systems take turns, with a new seed (0, 1, ...) for each repeat:
  asynchronous   `python -m dsrl_async.launch`: a process per environment, one for the policy, one for the learner
  serial         the same with --serial: one process that does everything in turn
  lock step      how programs with vectorised environments run: a process per environment, all of which step at once;
                 when the last one is ready (resets are inside this barrier), one other process does the updates that
                 are due and answers all environments in one batch, and only then do they step again. Workers, memory,
                 policy, learner and supervisor are the run's own; only the order differs
  evaluating     asynchronous, with an evaluation going on all the time (only if --system names it)
Policy and learner have as many threads as `inference.threads` and `learner.threads` say (null: a quarter of the cores,
at least one). Lock step uses the former for both, serial the latter for everything; --threads sets both. A worker has
one thread.

A run ends when --success of its last 100 episodes were successes, or after --max-minutes. The figures are medians of
  env_steps_per_s, decisions_per_s, updates_per_s
                           rates from the first tick of the run's metrics.jsonl (`log.interval_s`) with a gradient
                           update to the last one, without start, warm-up and last checkpoint
  start                    seconds from starting the program to its first decision
  seconds_to_success       wall seconds from the first decision, warm-up included
  start_to_success         wall seconds from starting the program
  decisions_to_success     decisions until then, which shows what the order of acting and learning means for learning
  reached                  number of repeats that succeeded in time
to within `log.interval_s`, and the ratios of asynchronous to the others, and of
evaluating to asynchronous. In a median, repeats that did not succeed
count as longer than all others. If the median is one of them, the line is left out, and stderr says so.

Not measured: how good the policy is on separate episodes (`python -m dsrl_async.evaluate`). Serial runs use no GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dsrl_async.bench.figures import Figure, JsonLines, Metrics, add_output_arguments, medians
from dsrl_async.config.command_line import load_config
from dsrl_async.config.settings import Config
from dsrl_async.host.signals import SIGNALS, StopRequest
from dsrl_async.host.tether import PR_SET_PDEATHSIG
from dsrl_async.run.preflight import check_run
from dsrl_async.shm.counters import SUCCESS_EPISODES

ASYNCHRONOUS, SERIAL, LOCK_STEP, EVALUATING = "asynchronous", "serial", "lock step", "evaluating"
PROGRAMS = {
    ASYNCHRONOUS: ["dsrl_async.launch", "--serial", "false"],
    SERIAL: ["dsrl_async.launch", "--serial", "true"],
    LOCK_STEP: ["dsrl_async.bench.systems.lock_step", "--serial", "false"],
}
"""System -> module and options that override the configuration."""
ON_REQUEST = {EVALUATING: [*PROGRAMS[ASYNCHRONOUS], "--evaluation.every-decisions", "1"]}
"""The same for those that are measured only if they are named."""
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="YAML", help="as for `launch` (default: the embedded task)")
    parser.add_argument("--system", nargs="+", choices=[*PROGRAMS, *ON_REQUEST], default=list(PROGRAMS))
    parser.add_argument("--actors", type=int, help="(default: the configuration's)")
    parser.add_argument("--threads", type=int, help="threads of policy and learner (default: the configuration's)")
    parser.add_argument("--success", type=float, default=0.9, help="success rate that ends a run (default: 0.9)")
    parser.add_argument("--max-minutes", type=float, default=10.0, help="limit of a run without it (default: 10)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the run directories in DIR")
    add_output_arguments(parser, repeats=3)


def options_of(arguments: argparse.Namespace) -> list[str]:
    """The options of every system's program. Raises ValueError for impossible ones."""
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


def metrics_of(run_dir: Path, started: float, success: float) -> Metrics:
    """Metrics of a run that has ended; infinite where it did not succeed. `started` is time.time of its start.

    Raises ValueError if it ended too early to measure.
    """
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    ticks = lines[:-1]  # the last line is written when every process has ended
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
    """Whether a run's `stop_at_success` would end it."""
    return tick["success_episodes"] >= SUCCESS_EPISODES and tick["success_rate"] >= success


def end_with_parent() -> None:
    """Make this child receive SIGTERM when the benchmark is killed; it runs before the child's program."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def measure(system: str, options: list[str], seed: int, run_dir: Path, success: float, stop: StopRequest) -> Metrics:
    """Make a run and measure it.

    Raises:
        ValueError: the run failed.
        KeyboardInterrupt: a stop was requested, and the run has ended.
    """
    module, *own_options = (PROGRAMS | ON_REQUEST)[system]
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
    if process.returncode != 0 or ended in SIGNALS.values():  # somebody ended only this run
        raise ValueError(f"the run ended with exit code {process.returncode}: {ended}")
    return metrics_of(run_dir, started, success)


def summarise(samples: dict[str, list[Metrics]]) -> Iterator[Figure]:
    """Medians, then ratios. Some may be infinite."""
    values = {system: medians(runs) for system, runs in samples.items()}
    for system, runs in samples.items():
        for metric, unit in UNITS.items():
            yield Figure(system, metric, values[system][metric], unit)
        yield Figure(system, "reached", sum(math.isfinite(each["seconds_to_success"]) for each in runs), "runs")
    for system, other in ((ASYNCHRONOUS, SERIAL), (ASYNCHRONOUS, LOCK_STEP), (EVALUATING, ASYNCHRONOUS)):
        if {system, other} <= values.keys():
            for metric in COMPARED:
                ours, theirs = values[system][metric], values[other][metric]
                ratio = ours / theirs if math.isfinite(theirs) else math.inf
                yield Figure(f"{system}/{other}", metric, ratio, "ratio")


def name_of(config: Config) -> str:
    threads = f" {config.learner.threads} threads" if config.learner.threads else ""
    return f"{config.env.name} {config.actors} actors replay ratio {config.replay_ratio:g}{threads}"


def run(arguments: argparse.Namespace) -> None:
    options = options_of(arguments)
    config = load_config(options)
    check_run(config)
    keep: Path | None = arguments.keep
    if keep is not None and keep.exists() and not (keep.is_dir() and not any(keep.iterdir())):
        raise ValueError(f"--keep {keep}: it is there, and is no empty directory; choose another one")
    lines = JsonLines("end_to_end", arguments)
    lines.case(f"{name_of(config)} until {arguments.success:.0%}")
    samples: dict[str, list[Metrics]] = {system: [] for system in arguments.system}
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
    for figure in summarise(samples):
        if math.isfinite(figure.value):
            lines.add([figure])
        else:
            missing.setdefault(figure.system, []).append(figure.metric)
    for system, metrics in missing.items():
        note(f"no {', '.join(metrics)} of {system}: {arguments.success:.0%} success was not reached in time")


def note(text: str) -> None:
    print(f"end_to_end: {text}", file=sys.stderr, flush=True)
