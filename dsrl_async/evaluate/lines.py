"""A file of JSON lines, read while another process appends to it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any


class Lines:
    """Reads the lines of a file that are whole, each once. The file need not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def new(self) -> list[dict[str, Any]]:
        """What the lines that have come since the last call say."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
            self._read += len(whole) + bool(whole)
            return [json.loads(line) for line in whole.splitlines()]
        return []
