"""Simulates several ways to choose batches and prints them, relative to the ideal, as a Markdown table.

The ideal has every batch size up to the largest. `padded` pads to the next size, `chosen` is `batching.choose_batch`;
`few` sizes are powers of two, `more` are the defaults of `inference.buckets`; `1 ms` waits that long if not all
environments are ready.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from dsrl_async.bench.pipeline import DEVICES, SEED
from dsrl_async.config.settings import InferenceConfig
from dsrl_async.host.command import guard
from dsrl_async.plan.simulation import EnvironmentTimes, simulate
from dsrl_async.run.inference.batching import choose_batch

FEW, MORE = [1, 2, 4, 8, 16, 32], InferenceConfig().buckets
DECISIONS, SKIP = 20_000, 5_000


def pad(ready: int, sizes: Sequence[int]) -> tuple[int, int]:
    ready = min(ready, sizes[-1])
    return ready, next(size for size in sizes if size >= ready)


WAYS = {
    "few, padded, 1 ms": (FEW, pad, 1e-3),
    "few, padded": (FEW, pad, 0.0),
    "few, chosen": (FEW, choose_batch, 0.0),
    "more, padded": (MORE, pad, 0.0),
    "more, chosen, 1 ms": (MORE, choose_batch, 1e-3),
    "more, chosen": (MORE, choose_batch, 0.0),
}


def rate(
    curve: Callable[[int], float],
    actors: int,
    sizes: Sequence[int],
    choose: Callable[[int, Sequence[int]], tuple[int, int]],
    wait_s: float,
) -> float:
    draws = [EnvironmentTimes().totals(SEED, lane) for lane in range(actors)]
    return simulate(draws, curve, sizes, DECISIONS, SKIP, wait_s, choose=choose).decisions_per_s


def main() -> None:
    print("| device | actors | ideal, decisions/s | " + " | ".join(WAYS) + " |")
    print("|---|" + "---|" * (len(WAYS) + 2))
    for device, curve in DEVICES.items():
        for actors in (8, 16, 24, 32, 40, 48, 64, 128):
            ideal = rate(curve, actors, range(1, MORE[-1] + 1), pad, 0.0)
            shares = " | ".join(f"{rate(curve, actors, *way) / ideal:.2f}" for way in WAYS.values())
            print(f"| {device} | {actors} | {ideal:.0f} | {shares} |")


if __name__ == "__main__":
    sys.exit(guard(main))
