"""What `--profile` costs a process: CPU time of one passage through a phase, and through a stage, without and with it.

    python scripts/measure_profile.py

Prints one JSON line; microseconds, medians of the repeats, of passages that hold nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import counter_fields
from dsrl_async.shm.spans import phases_of, span_fields
from dsrl_async.telemetry.stages import stages_of


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    figures: dict[str, float] = {"load": round(os.getloadavg()[0], 2), "repeats": options.repeats}
    for profile in (False, True):
        arena = Arena.create(counter_fields(1) | (span_fields(1) if profile else {}))
        phase, stage = phases_of(arena, "inference"), stages_of(arena, "inference", torch.device("cpu"))
        suffix = "with" if profile else "without"
        timed: tuple[tuple[str, Timed, str], ...] = (("phase", phase, "gather"), ("stage", stage, "denoise"))
        for what, function, name in timed:
            cost = passage_us(function, name, options.passages, options.repeats)
            figures[f"{what}_us_{suffix}"] = round(cost, 3)
    print(json.dumps(figures))
