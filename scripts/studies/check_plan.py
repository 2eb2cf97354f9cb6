"""Compares the throughput that `python -m dsrl_async.plan` predicts with that of real processes in `bench pipeline`.

    python -m dsrl_async.bench pipeline --system dsrl_async --actors 8 16 32 64 --out pipeline.jsonl
    python -m dsrl_async.bench pipeline --groups 2 --actors 16 --out groups.jsonl
    python scripts/studies/check_plan.py pipeline.jsonl groups.jsonl

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

from dsrl_async.bench.pipeline import DEVICES, GROUPS, ONE_MACHINE, OWN
from dsrl_async.config.settings import InferenceConfig
from dsrl_async.host.command import guard
from dsrl_async.plan.capacity import CapacityInputs, predict
from dsrl_async.plan.simulation import EnvironmentTimes

TOLERANCE = 0.1
SYSTEMS = (OWN, GROUPS, ONE_MACHINE)
CASE = re.compile(r"(\w+) (?:(\d+) groups of )?(\d+) actors chunk (\S+) ms reset (\S+) ms(?: update (\S+) ms)?")


class Measured(NamedTuple):
    """What a system did in a case of the benchmark."""

    case: str
    system: str
    decisions_per_s: float
    cpu_wait: float
    """Share of time that the inference process waited for a core; NaN if the file does not say."""

    @property
    def name(self) -> str:
        return self.case if self.system == OWN else f"{self.case}: {self.system}"


def read(path: Path) -> Iterator[Measured]:
    """The cases of a file that `bench pipeline --out` wrote. Raises ValueError if it is no such file."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    try:
        for line in path.read_text().splitlines():
            figure = json.loads(line)
            if figure["benchmark"] == "pipeline" and figure["system"] in SYSTEMS:
                of = found.setdefault((figure["case"], figure["system"]), {})
                of[figure["metric"]] = float(figure["value"])
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold the JSON lines of `python -m dsrl_async.bench pipeline`") from error
    found = {key: metrics for key, metrics in found.items() if "decisions_per_s" in metrics}
    if not found:
        raise ValueError(f"{path} has no figures of {OWN}; run the benchmark with --system {OWN}, or --groups")
    for (case, system), metrics in found.items():
        yield Measured(case, system, metrics["decisions_per_s"], metrics.get("cpu_wait", math.nan))


def predicted(case: str, system: str = OWN) -> float:
    """Predicted decisions per second of a system. Raises ValueError for a case that the benchmark does not have."""
    match = CASE.fullmatch(case)
    if match is None or match[1] not in DEVICES:
        raise ValueError(f"not a case of `python -m dsrl_async.bench pipeline`: {case}")
    device, groups, actors, chunk_ms, reset_ms, update_ms = match.groups(default="0")
    workers = int(actors) * (int(groups) if system == ONE_MACHINE else 1)
    sizes = InferenceConfig().buckets
    figures = CapacityInputs(
        environment=replace(EnvironmentTimes(), chunk_s=float(chunk_ms) / 1e3, reset_s=float(reset_ms) / 1e3),
        device_s={size: DEVICES[device](size) for size in sizes},
        batch_sizes=sizes,
        cores=math.inf,  # environments and device sleep
        steps_per_decision=1,
        update_s=float(update_ms) / 1e3,
        groups=int(groups) if system == GROUPS else 1,
    )
    return predict(figures, workers).decisions_per_s


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, nargs="+", help="file that the benchmark's --out wrote")
    arguments = parser.parse_args(argv)
    try:
        measured = [row for path in arguments.pipeline for row in read(path)]
        rows = [(row, predicted(row.case, row.system)) for row in measured]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("| case | predicted, decisions/s | measured | predicted / measured | cpu_wait |\n|---|---|---|---|---|")
    for row, rate in rows:
        ratio = rate / row.decisions_per_s
        print(f"| {row.name} | {rate:.1f} | {row.decisions_per_s:.1f} | {ratio:.2f} | {row.cpu_wait:.2f} |")
    off = [row.name for row, rate in rows if abs(rate / row.decisions_per_s - 1) > TOLERANCE]
    if off:
        print(f"off by more than {TOLERANCE:.0%}: {'; '.join(off)}", file=sys.stderr)
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(guard(lambda: main(sys.argv[1:])))
