"""CPU time of processes, as the kernel's scheduler counts it.

Needs nothing but Python, since the environments of projects that this one is compared with use it, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """How long processes or threads ran and waited, in seconds."""

    running: float
    waiting: float
    """Time in which they were ready to run while others ran."""

    def since(self, before: Usage) -> Usage:
        """What has been added to an earlier `Usage`."""
        return Usage(self.running - before.running, self.waiting - before.waiting)


def thread_usage(pid: int, thread: int) -> Usage:
    """The usage of a thread.

    Raises:
        ValueError: the kernel does not count it.
        FileNotFoundError: the thread has ended.
    """
    path = Path(f"/proc/{pid}/task/{thread}/schedstat")
    try:
        running, waiting, _ = path.read_text().split()
    except FileNotFoundError:
        if not Path("/proc/self/schedstat").exists():
            raise ValueError("this kernel does not count the CPU time of threads (CONFIG_SCHED_INFO)") from None
        raise
    return Usage(int(running) * 1e-9, int(waiting) * 1e-9)


def usage(pids: Iterable[int]) -> Usage:
    """The usage of all threads that processes have now; raises FileNotFoundError if one of the processes has ended."""
    running = waiting = 0.0
    for pid in pids:
        for thread in os.listdir(f"/proc/{pid}/task"):
            try:
                one = thread_usage(pid, int(thread))
            except FileNotFoundError:
                continue
            running, waiting = running + one.running, waiting + one.waiting
    return Usage(running, waiting)
