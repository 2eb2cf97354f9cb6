"""What the processes of a run tell the harness while they go on: counts in a small file that all have mapped."""

from __future__ import annotations

import mmap
from pathlib import Path

NAMES = (
    *("met_supervisor", "met_template", "met_inference", "met_learner"),
    *("batches", "draws", "rows", "bad_rows", "answers", "bad_answers", "saves", "renames", "weights"),
)
LANES = 16
SIZE = 4096


class Board:
    """Counts that only grow. Each has one writer at a time, so there is no lock."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            path.write_bytes(bytes(SIZE))
        with path.open("r+b") as file:
            self._counts = memoryview(mmap.mmap(file.fileno(), SIZE)).cast("q")

    def __getitem__(self, name: str) -> int:
        return self._counts[NAMES.index(name)]

    def add(self, name: str, count: int = 1) -> None:
        self._counts[NAMES.index(name)] += count

    def decided(self, lane: int) -> None:
        """Count a decision of a lane."""
        self._counts[len(NAMES) + lane] += 1

    def decisions(self, lane: int) -> int:
        return self._counts[len(NAMES) + lane]

    def counts(self) -> dict[str, int]:
        return {name: self[name] for name in NAMES}
