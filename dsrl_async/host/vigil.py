"""Watching for signs of life, by a process that may have been frozen itself."""

from __future__ import annotations

import time


class Vigil:
    """Says how long others have been silent while this process was awake to hear them.

    When a whole job is frozen and goes on later (`docker pause`, SLURM's suspend, a stopped virtual machine), everyone
    has been silent, and nobody hangs. So silence from before this process was held up does not count.

    Args:
        patience_s: how long a silence may be. A quarter of it between two calls of `look` means that this process was
            held up; less than that cannot make much of a silence.
    """

    def __init__(self, patience_s: float) -> None:
        self._held_up_s = patience_s / 4
        self._awake_since = self._looked = time.monotonic()

    def look(self) -> None:
        """To be called, many times while one may be silent, before silences are looked at."""
        now = time.monotonic()
        if now - self._looked > self._held_up_s:
            self._awake_since = now
        self._looked = now

    def silent_s(self, heard: float) -> float:
        """Seconds of silence of somebody who was last heard at `heard`, by time.monotonic."""
        return time.monotonic() - max(heard, self._awake_since)
