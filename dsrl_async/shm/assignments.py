"""Which episode each environment worker of an evaluation plays next, given out one by one.

The evaluating process writes an episode's number and then counts it; the worker that owns the lane waits for the count
to grow. Nothing is written for a lane before its episode has ended, so there is no lock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from dsrl_async.shm import events, order
from dsrl_async.shm.arena import Arena, Fields
from dsrl_async.shm.counters import Counters, Stop

NONE_LEFT = -1


def assignment_fields(lanes: int) -> Fields:
    return {
        "assignment/episode": ((lanes,), "int64"),  # its number, or NONE_LEFT
        "assignment/film": ((lanes,), "bool"),  # whether to film it
        "assignment/given": ((lanes,), "int64"),  # how many were given so far
    }


class Assignments:
    """Views of the assignment fields; row i belongs to lane i."""

    def __init__(self, arena: Arena) -> None:
        self.episode = arena["assignment/episode"]
        self.film = arena["assignment/film"]
        self.given = arena["assignment/given"]
        self._counters = Counters(arena)

    def give(self, lane: int, episode: int, film: bool = False) -> None:
        """Let a lane, which has finished what it was given, play an episode, or end with NONE_LEFT."""
        self.episode[lane] = episode
        self.film[lane] = film
        order.barrier()
        self.given[lane] += 1

    def take(self, lane: int, wake_fd: int, notify_fds: Sequence[int]) -> Iterator[int]:
        """The numbers of the episodes that the lane is given, each awaited, until there are none left or all stop."""
        taken = 0
        counters = self._counters
        while True:
            for fd in notify_fds:  # the last episode has ended
                events.notify(fd)
            while self.given[lane] == taken:
                if counters.stop >= Stop.WORKERS:
                    return
                events.wait(wake_fd, timeout_s=1.0)
                counters.actor_heartbeat_ns[lane] = time.monotonic_ns()
            order.barrier()
            taken += 1
            if self.episode[lane] == NONE_LEFT:
                return
            yield int(self.episode[lane])
