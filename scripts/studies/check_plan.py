"""Compares the throughput that `python -m dsrl_async.plan` predicts with that of real processes in `bench pipeline`.

    python -m dsrl_async.bench pipeline --system dsrl_async --actors 8 16 32 64 --out pipeline.jsonl
    python scripts/studies/check_plan.py pipeline.jsonl

prints a Markdown table. The exit code is 1 if a prediction is off by more than 10 %. The benchmark's lines do not hold
`--sigma`, `--episode-decisions`, `--buckets` and `--batch-wait-ms`; their defaults are assumed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dsrl_async.bench.pipeline import DEVICES, OWN
from dsrl_async.config.settings import InferenceConfig
from dsrl_async.host.command import guard
from dsrl_async.plan.capacity import CapacityInputs, predict
from dsrl_async.plan.simulation import EnvironmentTimes

TOLERANCE = 0.1
CASE = re.compile(r"(\w+) (\d+) actors chunk (\S+) ms reset (\S+) ms")


class Measured(NamedTuple):
    """A case of the benchmark."""

    name: str
    decisions_per_s: float
    cpu_wait: float
    """Share of time that the inference process waited for a core; NaN if the file does not say."""


def read(path: Path) -> Iterator[Measured]:
    """The cases of a file that `bench pipeline --out` wrote. Raises ValueError if it is no such file."""
    cases: dict[str, dict[str, float]] = {}
    try:
        for line in path.read_text().splitlines():
            figure = json.loads(line)
            if (figure["benchmark"], figure["system"]) == ("pipeline", OWN):
                cases.setdefault(figure["case"], {})[figure["metric"]] = float(figure["value"])
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold the JSON lines of `python -m dsrl_async.bench pipeline`") from error
    cases = {name: metrics for name, metrics in cases.items() if "decisions_per_s" in metrics}
    if not cases:
        raise ValueError(f"{path} has no figures of {OWN}; run the benchmark with --system {OWN}")
    for name, metrics in cases.items():
        yield Measured(name, metrics["decisions_per_s"], metrics.get("cpu_wait", math.nan))


def predicted(case: str) -> float:
    """Predicted decisions per second. Raises ValueError for a case that the benchmark does not have."""
    match = CASE.fullmatch(case)
    if match is None or match[1] not in DEVICES:
        raise ValueError(f"not a case of `python -m dsrl_async.bench pipeline`: {case}")
    device, actors, chunk_ms, reset_ms = match.groups()
    sizes = InferenceConfig().buckets
    figures = CapacityInputs(
        environment=replace(EnvironmentTimes(), chunk_s=float(chunk_ms) / 1e3, reset_s=float(reset_ms) / 1e3),
        device_s={size: DEVICES[device](size) for size in sizes},
        batch_sizes=sizes,
        cores=math.inf,  # environments and device sleep
        steps_per_decision=1,
    )
    return predict(figures, int(actors)).decisions_per_s


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="file that the benchmark's --out wrote")
    arguments = parser.parse_args(argv)
    try:
        rows = [(case, predicted(case.name)) for case in read(arguments.pipeline)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("| case | predicted, decisions/s | measured | predicted / measured | cpu_wait |\n|---|---|---|---|---|")
    for case, rate in rows:
        ratio = rate / case.decisions_per_s
        print(f"| {case.name} | {rate:.1f} | {case.decisions_per_s:.1f} | {ratio:.2f} | {case.cpu_wait:.2f} |")
    off = [case.name for case, rate in rows if abs(rate / case.decisions_per_s - 1) > TOLERANCE]
    if off:
        print(f"off by more than {TOLERANCE:.0%}: {'; '.join(off)}", file=sys.stderr)
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(guard(lambda: main(sys.argv[1:])))
