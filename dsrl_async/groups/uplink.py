"""The uplink process, in the learner's place of a group: sends the group's rows to the learner's machine, and hands its
weights and grants on.

The group's ring is the buffer: rows wait in it until they are stored over there, and are sent again until they are.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time

import numpy as np
import zmq

from dsrl_async import __version__
from dsrl_async.groups import reports, wire
from dsrl_async.groups.grants import least_rows, room
from dsrl_async.groups.wire import BadMessage, State
from dsrl_async.host.processes import FATAL, begin_child
from dsrl_async.run.channel import read_secret
from dsrl_async.run.sockets import Connected
from dsrl_async.run.weights import BadFrame, FrameSubscriber, WeightPublisher, read_header
from dsrl_async.shm import events
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters, Stop
from dsrl_async.shm.replay import ReplayRing

logger = logging.getLogger(__name__)

POLL_MS = 50
GATHER_S = 0.002
"""How long rows are gathered for one message, which costs more than a row."""
RESEND_S = 2.0
"""Without news of what was sent, it is sent again."""
REPORT_S = 1.0
DRAIN_S = 10.0
"""How long the last rows of a group are waited for, once it has ended."""
ALONE_S = 600.0
"""A group that has heard nothing for so long ends."""
MESSAGES, WAITING = 64, 64
"""Messages that are taken in one go, and that wait for a network that is cut."""


class Refused(ValueError):
    """The learner's machine does not take this group; the error is its sentence."""


class Uplink:
    """What is sent and what is stored. It knows nothing of sockets.

    Attributes:
        sent, stored: int64 [lanes], how many rows of each lane.
        batch: most rows of a message.
        stop: whether the group is to end.
        fenced: whether another incarnation has its place.
    """

    def __init__(self, arena: Arena, decisions_before: int, window_rows: int) -> None:
        """`decisions_before` are those of the group's predecessors; `window_rows` may be under way at once."""
        self.ring, self.counters = ReplayRing(arena), Counters(arena)
        lanes = self.ring.lanes
        if self.ring.rows_per_lane < least_rows(lanes):
            raise Refused(
                f"a group of {lanes} environments needs a ring of {least_rows(lanes)} rows for each, not of "
                f"{self.ring.rows_per_lane}"
            )
        self._before, self._window, self._row = decisions_before, window_rows, wire.row_type(self.ring)
        self.batch = min(wire.batch_rows(self._row), window_rows)
        self.stored, self.sent = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)
        self.linked = self.stop = self.fenced = False
        self.heard = self._moved = time.monotonic()
        self._number, self._reported = time.monotonic_ns(), 0  # above all reports of a predecessor
        self._held: tuple[int, bytes] | None = None  # weights that the learner's count of updates has not reached
        self._complaints = wire.Complaints()

    def hello(self) -> bytes:
        return wire.Hello(__version__, wire.layout_of(self._row), self.ring.lanes).encode()

    def take(self, frames: list[bytes]) -> None:
        """Take in a message; raises Refused."""
        try:
            match frames:
                case [wire.STATE, frame]:
                    self._take_state(State.decode(frame, self.ring.lanes))
                case [wire.FENCED]:
                    if not self.fenced:
                        logger.error("another incarnation has this group's place; it ends")
                    self.stop = self.fenced = True
                case [wire.REFUSED, frame]:
                    raise Refused(frame[: wire.LONGEST_SENTENCE].decode(errors="replace"))
                case _:
                    raise BadMessage("kind", "has another form than all messages have")
        except BadMessage as error:
            self._complaints.add(error)

    def _take_state(self, state: State) -> None:
        counters, now = self.counters, time.monotonic()
        decisions = counters.decisions()  # before `head`, which has their rows then
        heads = self.ring.heads()
        if (state.stored > heads).any():
            raise BadMessage("state", "says that more rows are stored than there are")
        self.heard = now
        if not self.linked or (state.stored > self.stored).any():
            self._moved = now
        self.linked = True
        np.maximum(self.stored, state.stored, out=self.stored)
        np.maximum(self.sent, self.stored, out=self.sent)
        counters.learner_updates[0] = max(int(counters.learner_updates[0]), state.updates)
        counters.control_warmup[0] = self._before + state.warmup
        limit = room(decisions, int((heads - self.stored).max()), self.ring.rows_per_lane)
        granted = max(int(counters.control_granted[0]), min(self._before + state.granted, limit))
        counters.control_granted[0] = granted or -1  # 0 would be a run that is no group
        self._reported = state.reported
        self.stop |= bool(state.stop)

    def next_rows(self) -> np.ndarray | None:
        """What is to be sent now, [n] of `wire.row_type`; `confirm` says that it was."""
        now = time.monotonic()
        under_way = int((self.sent - self.stored).sum())
        if under_way and now - self._moved > RESEND_S:
            logger.warning("no news of %d rows for %.0f s; they are sent again", under_way, RESEND_S)
            self.sent[:], self._moved, under_way = self.stored, now, 0
        room = min(self.batch, self._window - under_way)
        fresh = self.ring.heads() - self.sent
        if not self.linked or room <= 0 or not fresh.any():
            return None
        if not under_way:
            self._moved = now
        fresh = np.minimum(fresh, math.ceil(room / np.count_nonzero(fresh)))  # a share of each lane
        lanes = np.repeat(np.arange(self.ring.lanes), fresh)[:room]
        first = np.searchsorted(lanes, lanes)  # where the lane of each begins
        numbers = self.sent[lanes] + np.arange(len(lanes)) - first
        return wire.collect(self.ring, lanes, numbers, self.counters.actor_started_episodes, self._row)

    def confirm(self, rows: np.ndarray) -> None:
        self.sent += np.bincount(rows["lane"], minlength=self.ring.lanes)

    def report(self) -> bytes:
        """A report of this moment."""
        self._number += 1
        return reports.make(self.counters, self.ring, self.stored, self._number)

    def finish(self) -> None:
        """The group has ended: from here on `drained` wants a report that is made now or later."""
        self._number += 1

    def drained(self) -> bool:
        """Whether all rows are stored over there, and the last report was taken in."""
        return bool((self.stored == self.ring.heads()).all()) and self._reported >= self._number

    def hold(self, frame: bytes | None) -> bytes | None:
        """Take a new frame of weights, if any; returns one that the inference process may have now.

        It drops those of more updates than the learner is known to have done, and the count comes another way.
        """
        if frame is not None:
            try:
                self._held = read_header(frame)[1], frame
            except BadFrame as error:
                logger.warning("%s; it is dropped", error)
        if self._held is None or self._held[0] > self.counters.learner_updates[0]:
            return None
        (_, frame), self._held = self._held, None
        return frame


def serve(uplink: Uplink, link: wire.Link, publisher: WeightPublisher, name: bytes, ready: int, parent: int) -> None:
    """Send rows and hand weights and grants on, until the group has ended and its rows are stored.

    `name` is the uplink's identity, `ready` a descriptor that tells of new rows, and `parent` the group's supervisor,
    which is asked to end the group when the run stops. Raises Refused.
    """
    counters = uplink.counters
    rows = Connected(link.rows, zmq.DEALER, wire.LONGEST_STATE, [(zmq.SNDHWM, WAITING)], name)
    newest = FrameSubscriber(link.weights)
    poller = zmq.Poller()
    for source in (rows.socket, ready):
        poller.register(source, zmq.POLLIN)
    greeted = reported = sent = deadline = 0.0
    asked = False
    while True:
        counters.learner_heartbeat_ns[0] = time.monotonic_ns()
        now = time.monotonic()
        if deadline == 0.0 and counters.stop >= Stop.EVERYONE:
            deadline, reported = now + DRAIN_S, 0.0
            uplink.finish()
        if deadline and (uplink.fenced or uplink.drained() or now > deadline):
            break
        for frames in wire.received(rows.socket, MESSAGES):
            uplink.take(frames)
        if now - uplink.heard > ALONE_S and not uplink.stop:
            logger.error("nothing was heard of the learner's machine for %.0f s; the group ends", ALONE_S)
            uplink.stop = True
        if uplink.stop and not asked:
            asked = True
            os.kill(parent, signal.SIGTERM)  # it ends all of the group, the environment workers first
        if (frame := uplink.hold(newest.newest())) is not None:
            publisher.publish(frame)
        publisher.serve_late_joiners()
        if now - greeted >= REPORT_S:
            greeted = now
            rows.connect_again()
            wire.send(rows.socket, wire.HELLO, uplink.hello())
        if uplink.linked and now - reported >= REPORT_S:
            reported = now
            wire.send(rows.socket, wire.REPORT, uplink.report())
        if (gathering := sent + GATHER_S - now) > 0:
            time.sleep(gathering)
        events.clear(ready)
        if not uplink.fenced and (batch := uplink.next_rows()) is not None:
            sent = time.monotonic()
            if wire.send(rows.socket, wire.ROWS, batch.view(np.uint8).data):
                uplink.confirm(batch)
                continue
        poller.poll(POLL_MS)
    rows.close()
    newest.close()
    publisher.close()


def main(argument: str) -> None:
    """Run the uplink as a process of a group.

    `argument` is JSON: the job of the learner, and `group`, `incarnation`, `decisions_before`, `window_rows`,
    `link_fd` (see `wire.read_link`).
    """
    job = begin_child(argument, "uplink")
    arena, link = Arena.attach(job["arena"]), wire.read_link(job["link_fd"])
    name = wire.identity(job["group"], job["incarnation"])
    publisher = WeightPublisher(read_secret(job["channel_fd"]))
    try:
        uplink = Uplink(arena, job["decisions_before"], job["window_rows"])
        serve(uplink, link, publisher, name, job["transition_ready_fd"], job["parent"])
    except Refused as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(FATAL)  # sockets and their threads need no farewell


if __name__ == "__main__":
    main(sys.argv[1])
