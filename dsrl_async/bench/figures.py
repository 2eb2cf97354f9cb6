"""What the benchmarks share: the figures that they print as JSON lines, and their options, checks and medians."""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
Metrics = dict[str, float]
"""Metric -> value of one sample."""


class Figure(NamedTuple):
    """A measured quantity, as it is printed."""

    system: str
    metric: str
    value: float
    unit: str
    repeats: int | None = None
    """Number of samples that `value` is the median of; None means --repeats."""


def add_output_arguments(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Add the options that `JsonLines` reads; `repeats` is the default of --repeats."""
    parser.add_argument("--repeats", type=int, default=repeats, help=f"samples of each system (default: {repeats})")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON lines to this file, too")


def require_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raises ValueError if one of the options is not positive, or has a value that is not."""
    for name in names:
        value = getattr(arguments, name)
        if min(value if isinstance(value, list) else [value]) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive")


def take_turns(systems: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """`repeats` samples of each system. The systems take turns, so that other load disturbs all of them alike."""
    samples: dict[str, list[T]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name, measure in systems.items():
            samples[name].append(measure())
    return samples


def medians(samples: Sequence[Metrics]) -> Metrics:
    return {metric: statistics.median(sample[metric] for sample in samples) for metric in samples[0]}


class JsonLines:
    """Prints figures as JSON lines with `benchmark, case, system, metric, value, unit, repeats, load`.

    `load` is the machine's 1-minute average when `case` was called, before its measurement. With --out, the lines go
    to that file as well; raises ValueError if it cannot be written.
    """

    def __init__(self, benchmark: str, arguments: argparse.Namespace) -> None:
        self._repeats, self._out = arguments.repeats, arguments.out
        self._fields: dict[str, Any] = {"benchmark": benchmark}
        if self._out is not None:
            try:
                self._out.write_text("")
            except OSError as error:
                raise ValueError(f"--out {self._out} cannot be written: {error.strerror}") from error

    def case(self, name: str) -> None:
        """Name what the next figures are about."""
        self._fields["case"], self._load = name, round(os.getloadavg()[0], 2)

    def add(self, figures: Iterable[Figure]) -> None:
        for figure in figures:
            fields = figure._asdict() | {"value": float(f"{figure.value:.6g}"), "load": self._load}
            fields["repeats"] = self._repeats if figure.repeats is None else figure.repeats
            line = json.dumps(self._fields | fields)
            print(line, flush=True)
            if self._out is not None:
                with self._out.open("a") as file:
                    file.write(line + "\n")
