"""What Ray starts on a machine for each group: a thin actor, whose one child is the group's process.

Nothing of a run is in it: no torch, no rows. It says when the group has ended, and reads its logs. It has one thread,
because the kernel ties a child to the thread that started it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsrl_async import __version__
from dsrl_async.groups.placing import LOG, TOLD, start_member
from dsrl_async.host import processes

PREFIX = "dsrl_async-group-"
WATCH_S = 1.0
LONGEST_PART = 1 << 20
"""Bytes of a log that are fetched at a time."""
LARGEST_FILE = 1 << 22
"""Bytes of another file that is fetched, when the group has ended."""


class Look(NamedTuple):
    """What `Host.watch` has seen."""

    ended: str | None
    """How the group's process has ended, in one sentence; None while it runs."""
    fatal: bool
    """Whether a successor would end likewise."""
    parts: dict[str, bytes]
    """Name of a file in the group's directory -> what follows the bytes that are known already."""


class Host:
    """Ray makes an actor of it. Each of its functions may be called again by one who has not heard the answer."""

    def __init__(self) -> None:
        self._popen: subprocess.Popen[bytes] | None = None
        sweep()
        self._directory = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = _lock(self._directory)
        self._told = 0

    def start(self, version: str, job: Mapping[str, Any]) -> str:
        """Start the group's process; returns where this is, in words.

        Raises ValueError with a sentence if this machine has another version of the package.
        """
        import ray

        address = ray.util.get_node_ip_address()
        if version != __version__:
            raise ValueError(
                f"{address} has dsrl_async {__version__}, and the launched run {version}; install the same"
            )
        if self._popen is None:
            log = self._directory / LOG
            log.parent.mkdir()
            self._popen = start_member({**job, "run_dir": str(self._directory)}, log, os.environ)
        gpus = ", ".join(map(str, ray.get_gpu_ids()))
        return f"node {address}" + (f", GPU {gpus}" if gpus else "")

    def watch(self, known: Mapping[str, int], lines: Sequence[str]) -> Look:
        """Wait for the end of the group's process, a second at most, and read what is new in its files.

        `known` says how many bytes of each log were fetched, and `lines` are all that the group has been told.
        """
        assert self._popen is not None
        if lines[self._told :]:
            with (self._directory / TOLD).open("a") as file:
                file.writelines(f"{line}\n" for line in lines[self._told :])
            self._told = len(lines)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(WATCH_S)
        code = self._popen.poll()
        parts = dict(self._news(known))
        if code is None:
            return Look(None, False, parts)
        how = processes.how_ended(code)
        if code >= 0:
            how = f"{how}: {processes.last_line(self._directory / LOG)}"
        return Look(how, code == processes.FATAL, parts | dict(self._results()))

    def end(self) -> None:
        """Ask the group for a clean end."""
        if self._popen is not None:
            self._popen.send_signal(signal.SIGTERM)

    def leave(self) -> None:
        """Remove what is here of the group, which has ended."""
        _remove(self._directory)

    def _news(self, known: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
        for path in (*(self._directory / LOG).parent.glob("*.log"), *self._directory.glob("*.jsonl")):
            name = str(path.relative_to(self._directory))
            if name == TOLD:
                continue
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(known.get(name, 0))
                if part := file.read(LONGEST_PART):
                    yield name, part

    def _results(self) -> Iterator[tuple[str, bytes]]:
        for path in [*self._directory.glob("*.json"), *self._directory.glob("profile/*")]:
            with contextlib.suppress(OSError):
                if path.is_file() and path.stat().st_size <= LARGEST_FILE:
                    yield str(path.relative_to(self._directory)), path.read_bytes()


def sweep() -> None:
    """Remove the directories of this user's hosts that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.geteuid():
                lock = _lock(path)
                _remove(path)
                os.close(lock)


def _lock(directory: Path) -> int:
    """Lock a directory for as long as this process lives; raises BlockingIOError if another one has it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
