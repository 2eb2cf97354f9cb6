"""What every benchmark writes: a JSON object per figure."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Report:
    """Prints figures as JSON lines with `benchmark, case, system, metric, value, unit, repeats, load`.

    `load` is the machine's 1-minute average when `case` was called, before its measurement. `repeats` is how many
    samples a figure is the median of, where `add` is not told otherwise. With `out`, the lines go to that file as well.
    Raises ValueError if it cannot be written.
    """

    def __init__(self, benchmark: str, repeats: int, out: Path | None) -> None:
        self._fields: dict[str, Any] = {"benchmark": benchmark}
        self._repeats, self._out = repeats, out
        if out is not None:
            try:
                out.write_text("")
            except OSError as error:
                raise ValueError(f"--out {out} cannot be written: {error.strerror}") from error

    def case(self, name: str) -> None:
        """What the figures from now on are about."""
        self._fields["case"], self._load = name, round(os.getloadavg()[0], 2)

    def add(self, system: str, metric: str, value: float, unit: str, repeats: int | None = None) -> None:
        figure: dict[str, Any] = {"system": system, "metric": metric, "value": float(f"{value:.6g}"), "unit": unit}
        figure |= {"repeats": self._repeats if repeats is None else repeats, "load": self._load}
        line = json.dumps(self._fields | figure)
        print(line, flush=True)
        if self._out is not None:
            with self._out.open("a") as file:
                file.write(line + "\n")
