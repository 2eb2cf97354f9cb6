"""The disk of a run: a small file system of its own where one may be mounted, which can be filled and freed again."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

SIZE_MB = 128
LEFT_BYTES = 20_000
"""Where nothing may be mounted, the processes may write no file beyond this while the disk counts as full."""


class Disk:
    """A directory that exists until `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "dsrl_chaos", str(path)]
        self.own = os.geteuid() == 0 and subprocess.run(command, capture_output=True, timeout=20).returncode == 0
        self._filler = path / "filler"

    def fill(self, left_bytes: int, pids: Iterable[int]) -> None:
        """Leave so much room; without a file system of its own, for these processes and those they start."""
        if self.own:
            free = shutil.disk_usage(self.path).free - left_bytes
            with contextlib.suppress(OSError), self._filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free))
        else:
            self._limit(LEFT_BYTES, pids)

    def free(self, pids: Iterable[int]) -> None:
        if self.own:
            self._filler.unlink(missing_ok=True)
        else:
            self._limit(resource.RLIM_INFINITY, pids)

    @staticmethod
    def _limit(size: int, pids: Iterable[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (min(size, hard) if hard >= 0 else size, hard))

    def close(self) -> None:
        if self.own:
            subprocess.run(["umount", "-l", str(self.path)], capture_output=True, timeout=20)
        shutil.rmtree(self.path, ignore_errors=True)
