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
        "assignment/taker": ((lanes,), "int64"),  # the incarnation of the worker that takes them
    }


class Assignments:
    """Views of the assignment fields; row i belongs to the lane that counts in row i of `counters`.

    Without `counters`, all lanes evaluate. In a run, they are those of the evaluation's lanes.
    """

    def __init__(self, arena: Arena, counters: Counters | None = None) -> None:
        self.episode = arena["assignment/episode"]
        self.film = arena["assignment/film"]
        self.given = arena["assignment/given"]
        self.taker = arena["assignment/taker"]
        self._counters = counters or Counters(arena)

    def give(self, lane: int, episode: int, film: bool = False) -> None:
        """Let a lane, which has finished what it was given, play an episode, or end with NONE_LEFT."""
        self.episode[lane] = episode
        self.film[lane] = film
        order.barrier()
        self.given[lane] += 1

    def next(self, lane: int) -> int | None:
        """The episode that the lane was given and has not ended, or None."""
        if int(self.given[lane]) == self._counters.ended_episodes(lane):
            return None
        order.barrier()
        return int(self.episode[lane])

    def take(self, lane: int, wake_fd: int, notify_fds: Sequence[int], incarnation: int = 1) -> Iterator[int]:
        """The numbers of the episodes that the lane is given, each awaited, until there are none left or all stop.

        The first one may have been begun by an `incarnation` before.
        """
        counters = self._counters
        taken = int(counters.actor_episodes[lane])  # by this worker's predecessors, which are dead
        self.taker[lane] = incarnation
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
