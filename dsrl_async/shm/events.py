"""Wake-ups across processes: `eventfd` counters that a poller can wait on.

Setting one never blocks and holds no lock, so a process that dies can leave nobody waiting on it; every wait has a
deadline.
"""

from __future__ import annotations

import os
import select
from collections.abc import Iterable


def create() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def notify(fd: int) -> None:
    try:  # not contextlib.suppress, which takes longer than the call
        os.eventfd_write(fd, 1)
    except BlockingIOError:  # the counter is full, which wakes the waiter just as well
        return


def clear(fd: int) -> None:
    """Forget wake-ups received so far. Look at the shared state after this, never before."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return


def wait(fd: int, timeout_s: float) -> bool:
    """Wait for a wake-up and clear it; False if `timeout_s` passed without one."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    if not poller.poll(timeout_s * 1000):
        return False
    clear(fd)
    return True


def close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
