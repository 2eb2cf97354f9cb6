"""Measures the cost of `--profile`: the CPU time of entering and leaving a phase or stage, and of whole runs.

    python scripts/studies/measure_profile.py
    python scripts/studies/measure_profile.py --runs 5 [OPTIONS OF launch]

Prints JSON lines with medians. `*_us` are the times of empty phases and stages. With `--runs`, pairs of runs follow,
one without and one with the option: `decisions_per_s` and `cpu_ms_per_decision` (of all processes) between the end of
the warm-up and the last line of metrics.jsonl. Other programs disturb the former more than the latter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch

from dsrl_async.host.stages import stages_of
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import counter_fields
from dsrl_async.shm.spans import phases_of, span_fields

SUFFIX = {False: "without", True: "with"}


class Timed(Protocol):
    def __call__(self, name: str, /) -> AbstractContextManager[None]: ...


def passage_us(timed: Timed, name: str, passages: int, repeats: int) -> float:
    """Median CPU time of `with timed(name): pass`."""
    samples = []
    for _ in range(repeats):
        begin = time.thread_time()
        for _ in range(passages):
            with timed(name):
                pass
        samples.append((time.thread_time() - begin) / passages * 1e6)
    return statistics.median(samples)


def measure_passages(passages: int, repeats: int) -> dict[str, float]:
    figures = {}
    for profile, suffix in SUFFIX.items():
        arena = Arena.create(counter_fields(1) | (span_fields(1) if profile else {}))
        phase, stage = phases_of(arena, "inference"), stages_of(arena, "inference", torch.device("cpu"))
        timed: tuple[tuple[str, Timed, str], ...] = (("phase", phase, "gather"), ("stage", stage, "denoise"))
        for what, function, name in timed:
            figures[f"{what}_us_{suffix}"] = round(passage_us(function, name, passages, repeats), 3)
    return figures


def measure_run(profile: bool, decisions: int, options: Sequence[str], directory: Path) -> tuple[float, float]:
    """Decisions per second and CPU milliseconds per decision of a run once it learns."""
    command = [
        sys.executable,
        "-m",
        "dsrl_async.launch",
        "--max-decisions",
        str(decisions),
        "--run-dir",
        str(directory),
    ]
    command += [*options, *(["--profile"] if profile else [])]
    run = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if run.returncode != 0:
        raise SystemExit(f"error: a run failed: {(run.stderr.splitlines() or ['it left no message'])[-1]}")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["updates"]][:-1]  # the last line is written when the run has stopped
    if len(lines) < 2:
        raise SystemExit("error: the run ended before it was seen to learn; give more --decisions")
    made = lines[-1]["decisions"] - lines[0]["decisions"]
    cpu_s = sum(
        (after["wall_s"] - before["wall_s"]) * sum(after["cpu_percent"].values()) / 100
        for before, after in pairwise(lines)
    )
    return made / (lines[-1]["wall_s"] - lines[0]["wall_s"]), 1e3 * cpu_s / made


def measure_runs(pairs: int, decisions: int, options: Sequence[str]) -> dict[str, float]:
    seen: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as directory:
        for pair in range(pairs):
            for profile in (False, True) if pair % 2 == 0 else (True, False):
                seen[profile].append(measure_run(profile, decisions, options, Path(directory) / f"{pair}-{profile}"))
    figures = {}
    for profile, suffix in SUFFIX.items():
        rates, costs = zip(*seen[profile], strict=True)
        figures[f"decisions_per_s_{suffix}"] = round(statistics.median(rates), 1)
        figures[f"cpu_ms_per_decision_{suffix}"] = round(statistics.median(costs), 2)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--runs", type=int, default=0, help="pairs of runs; other options go to launch")
    parser.add_argument("--decisions", type=int, default=2000, help="length of a run")
    given, launch = parser.parse_known_args()
    passages = measure_passages(given.passages, given.repeats)
    print(json.dumps({"load": round(os.getloadavg()[0], 2), "repeats": given.repeats, **passages}), flush=True)
    if given.runs:
        runs = measure_runs(given.runs, given.decisions, launch)
        print(json.dumps({"load": round(os.getloadavg()[0], 2), "repeats": given.runs, **runs}), flush=True)
