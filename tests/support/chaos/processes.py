"""The processes of a run, as /proc shows them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Found(NamedTuple):
    """A process: its number, and when it began, which tells it from a later one of the same number."""

    pid: int
    began: int

    def alive(self) -> bool:
        return _began(self.pid) == self.began and state_of(self.pid) not in "ZX"

    def send(self, number: signal.Signals) -> bool:
        """Whether it was there to get the signal."""
        if not self.alive():
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
            return True
        return False


def find(pid: int) -> Found | None:
    began = _began(pid)
    return None if began is None else Found(pid, began)


def _fields(pid: int) -> list[str]:
    """What follows the name in /proc/PID/stat; empty if there is no such process."""
    with contextlib.suppress(OSError):
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return []


def _began(pid: int) -> int | None:
    fields = _fields(pid)
    return int(fields[19]) if fields else None


def state_of(pid: int) -> str:
    """The letter of its state, `X` if it is gone."""
    return (_fields(pid) or ["X"])[0]


def children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for thread in (PROC / str(pid) / "task").iterdir():
            found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def kind_of(pid: int) -> str | None:
    """The name that the product gives the child process: inference, learner, template, actor-000; None: another."""
    with contextlib.suppress(OSError):
        name = (PROC / str(pid) / "comm").read_text().strip()
        if name.startswith("actor-") or name in ("inference", "learner", "template"):
            return name  # else it has not named itself yet
        command = " ".join(os.fsdecode((PROC / str(pid) / "cmdline").read_bytes()).split("\0")[:3])
        for kind in ("inference", "learner", "template"):
            if f"run.{kind}" in command or f"worker.{kind}" in command:
                return kind
    return None


def named_children(pid: int) -> dict[str, Found]:
    """The living child processes of a supervisor by name; the oldest of a name."""
    named: dict[str, Found] = {}
    for child in sorted(children(pid)):
        found, name = find(child), kind_of(child)
        if found is not None and name is not None and state_of(child) not in "ZX":
            named.setdefault(name, found)
    return named


def marked(variable: str) -> list[Found]:
    """All living processes that have this line in their environment."""
    line, found = variable.encode(), []
    for path in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if line in (path / "environ").read_bytes().split(b"\0") and state_of(int(path.name)) not in "ZX":
                process = find(int(path.name))
                found += [process] if process is not None else []
    return found


def wait_gone(variable: str, seconds: float) -> list[Found]:
    """The marked processes that are left after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := marked(variable)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def open_files(pid: int) -> int:
    try:
        return len(os.listdir(PROC / str(pid) / "fd"))
    except OSError:
        return 0


def private_bytes(pid: int) -> int:
    """Memory of its own, without what it shares."""
    with contextlib.suppress(OSError):
        for line in (PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
