"""The downlink process, beside the learner: replays the rows of all groups into the ring, and tells the groups what is
stored and allowed.

A group's lanes follow one another in the ring. Rows of a lane are taken in the order of their numbers and once; of a
group, those of the incarnation that the supervisor has started last. What decides is in shared memory alone, the ring's
own `head` above all, so that a downlink which is killed between any two instructions leaves nothing to be stored twice
or counted wrong: its successor goes on where the ring ends.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import zmq

from dsrl_async.config.load import read_yaml, validate
from dsrl_async.config.settings import Config
from dsrl_async.groups import reports, wire
from dsrl_async.groups.grants import grant, slack
from dsrl_async.groups.wire import BadMessage, State
from dsrl_async.host.processes import FATAL, begin_child
from dsrl_async.run.channel import Channel, read_secret
from dsrl_async.run.sockets import Bound
from dsrl_async.run.weights import FrameSubscriber, WeightPublisher
from dsrl_async.shm import events, order
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters, Stop
from dsrl_async.shm.replay import ReplayRing

logger = logging.getLogger(__name__)

POLL_MS = 50
STATE_S = 0.05
"""How often a group is told what has changed; about its rows it is told at once."""
SIGN_OF_LIFE_S = 1.0
MESSAGES = 256
"""Messages that are taken in one go."""
WAITING_FRAMES = 2
"""Frames of weights that wait for a group which is slow or cut off."""
UNLIMITED = 2**40


class Group:
    """What this process knows of a group; the rest is in the counters."""

    def __init__(self, number: int, lanes: slice) -> None:
        self.number, self.lanes = number, lanes
        self.name = b""  # of the incarnation that has been greeted
        self.reported = 0
        self.owed = False  # rows have come since the last state
        self.told, self.told_at = b"", 0.0


class Downlink:
    """Takes in messages of groups and says what to answer. It knows nothing of sockets."""

    def __init__(self, config: Config, arena: Arena, groups: int, tasks: int) -> None:
        """`tasks` is how many instructions the environment has."""
        self.config, self.ring, self.counters, self.tasks = config, ReplayRing(arena), Counters(arena), tasks
        self.lanes = len(self.counters.actor_decisions)
        self.size = self.lanes // groups
        self.groups = [Group(number, reports.lanes_of(number, groups, self.lanes)) for number in range(groups)]
        self.row, self.report = wire.row_type(self.ring), reports.report_type(self.counters, self.size)
        self.layout = wire.layout_of(self.row)
        self.stored = 0  # rows, in this process
        self._complaints, self._refused = wire.Complaints(), set[str]()
        for lane in range(self.lanes):  # a predecessor may have been killed after a row was stored
            self._count(lane)

    @property
    def longest(self) -> int:
        """Bytes of the longest frame that a group sends."""
        return max(wire.batch_rows(self.row) * self.row.itemsize, self.report.itemsize, wire.LONGEST_GREETING)

    def take(self, name: bytes, frames: list[bytes]) -> tuple[bytes, ...] | None:
        """Take in a message; returns an answer, if one is due at once. Whatever comes, it does not raise."""
        try:
            return self._take(name, frames)
        except BadMessage as error:
            self._complaints.add(error)
            return None

    def _take(self, name: bytes, frames: list[bytes]) -> tuple[bytes, ...] | None:
        number, incarnation = wire.sender(name)
        if number >= len(self.groups):
            raise BadMessage("sender", f"comes from group {number}, which this run does not have")
        if len(frames) != 2 or frames[0] not in (wire.HELLO, wire.ROWS, wire.REPORT):
            raise BadMessage("kind", "has another form than all messages have")
        if incarnation != self.counters.group_started[number]:
            return (wire.FENCED,)
        group, (kind, frame) = self.groups[number], frames
        if kind == wire.HELLO:
            return self._greet(group, name, incarnation, wire.Hello.decode(frame))
        if group.name != name:  # a predecessor of this process knew it; it greets again within a second
            return None
        if kind == wire.ROWS:
            self._store(group, wire.check_rows(frame, self.row, self.size, self.tasks))
            group.owed = True
        else:
            group.reported = reports.take(self.counters, number, group.lanes, frame, self.report)
        self.counters.group_heard_ns[number] = time.monotonic_ns()
        return None

    def _greet(self, group: Group, name: bytes, incarnation: int, hello: wire.Hello) -> tuple[bytes, ...] | None:
        if (why := wire.why_refused(group.number, hello, self.layout, self.size)) is not None:
            if why not in self._refused:
                self._refused.add(why)
                logger.error(why)
            return wire.REFUSED, why.encode()
        if self.counters.group_incarnation[group.number] != incarnation:
            self._begin(group, incarnation)
        if group.name != name:
            group.name, group.reported, group.owed = name, 0, True
        self.counters.group_heard_ns[group.number] = time.monotonic_ns()
        return None

    def _begin(self, group: Group, incarnation: int) -> None:
        """Have the rows of another incarnation follow those of the one before, which is fenced by now.

        Until the last line nothing of it is stored, so that this can be done again from the beginning.
        """
        counters = self.counters
        counters.group_base_head[group.lanes] = self.ring.head[group.lanes]
        counters.group_base_decisions[group.number] = counters.actor_decisions[group.lanes].sum()
        order.barrier()
        counters.group_incarnation[group.number] = incarnation

    # ---- rows

    def _store(self, group: Group, rows: np.ndarray) -> None:
        counters, head, base = self.counters, self.ring.head, self.counters.group_base_head
        started, before = counters.actor_started_episodes, self.stored
        lanes, numbers = (group.lanes.start + rows["lane"].astype(np.int64)).tolist(), rows["number"].tolist()
        repeated = early = 0
        for row, lane, number in zip(rows, lanes, numbers, strict=True):
            expected = int(head[lane]) - int(base[lane])
            if number != expected:
                repeated, early = repeated + (number < expected), early + (number > expected)
                continue
            started[lane] = max(int(started[lane]), int(row["started_episodes"]))
            self._intend(lane, row)
            wire.replay(self.ring, lane, row)
            self._count(lane)
            self.stored += 1
        counters.group_arrived[group.number] += self.stored - before
        counters.group_repeated[group.number] += repeated
        counters.group_early[group.number] += early

    def _intend(self, lane: int, row: np.void) -> None:
        """Note what a lane's counters will be, before its row is stored: whoever sees the row can see to them."""
        counters, intent = self.counters, self.counters.group_intent[lane]
        decisions, env_steps = int(counters.actor_decisions[lane]), int(counters.actor_env_steps[lane])
        lag = int(counters.actor_policy_lag[lane])
        if row["completes"]:
            decisions, env_steps = decisions + 1, env_steps + int(row["steps"])
            lag += max(0, int(counters.learner_updates[0]) - int(row["policy_version"]))
        intent[0] = 0  # of no row, while the others change
        intent[1:] = decisions, env_steps, lag
        intent[0] = self.ring.head[lane] + 1

    def _count(self, lane: int) -> None:
        """Bring a lane's counters up to its row that was stored last."""
        counters, (head, decisions, env_steps, lag) = self.counters, self.counters.group_intent[lane].tolist()
        if head == 0 or head != self.ring.head[lane]:
            return
        counters.actor_env_steps[lane] = env_steps
        counters.actor_policy_lag[lane] = lag
        counters.actor_decisions[lane] = decisions

    # ---- what groups are told

    def states(self) -> Iterator[tuple[bytes, bytes]]:
        """Names of groups, and the state that each is to be told now."""
        config, counters, now = self.config, self.counters, time.monotonic()
        decisions, updates = counters.decisions(), int(counters.learner_updates[0])
        warmup = config.replay.warmup_decisions
        spare = UNLIMITED
        if config.throttle_actors:
            passed = warmup + int(counters.control_passed_decisions[0])
            ratio, tolerance = config.replay_ratio, config.replay_ratio_tolerance
            spare = slack(decisions, updates, ratio, passed, tolerance, self.lanes)
        for group in self.groups:
            if not group.name or not (group.owed or now - group.told_at >= STATE_S):
                continue
            of_group = group.lanes
            arrived = int(counters.actor_decisions[of_group].sum() - counters.group_base_decisions[group.number])
            granted = grant(arrived, self.size, spare, self.lanes)
            state = State(
                updates,
                granted,
                warmup=grant(arrived, self.size, max(0, warmup - decisions), self.lanes),
                stop=int(counters.stop >= Stop.WORKERS),
                reported=group.reported,
                stored=self.ring.head[of_group] - counters.group_base_head[of_group],
            ).encode()
            counters.group_granted[group.number] = granted
            if group.owed or state != group.told or now - group.told_at >= SIGN_OF_LIFE_S:
                group.owed, group.told, group.told_at = False, state, now
                yield group.name, state


class Thinned:
    """Hands the learner's weights on to the groups as they are, at most one frame in `interval_s` seconds."""

    def __init__(self, learner: Channel, groups: Channel, interval_s: float) -> None:
        self._subscriber, self._publisher = FrameSubscriber(learner), WeightPublisher(groups, WAITING_FRAMES)
        self._interval_s, self._published = interval_s, -interval_s

    def step(self) -> None:
        now = time.monotonic()
        # ZeroMQ keeps the newest frame until it is asked for.
        if now - self._published >= self._interval_s and (frame := self._subscriber.newest()) is not None:
            self._published = now
            self._publisher.publish(frame)
        self._publisher.serve_late_joiners()

    def close(self) -> None:
        self._subscriber.close()
        self._publisher.close()


def serve(downlink: Downlink, link: wire.Link, learner: Channel, publish_s: float, transition_ready: int) -> None:
    """Take in rows and hand out grants and weights until the run stops."""
    counters = downlink.counters
    bound = Bound(link.rows, zmq.ROUTER, downlink.longest, [(zmq.ROUTER_HANDOVER, 1)])
    weights = Thinned(learner, link.weights, publish_s)
    while counters.stop < Stop.EVERYONE:
        counters.downlink_heartbeat_ns[0] = time.monotonic_ns()
        bound.socket.poll(POLL_MS)
        stored = downlink.stored
        for name, *frames in wire.received(bound.socket, MESSAGES):
            if (answer := downlink.take(name, frames)) is not None:
                wire.send(bound.socket, name, *answer)
        if downlink.stored > stored:
            events.notify(transition_ready)
        for name, state in downlink.states():
            wire.send(bound.socket, name, wire.STATE, state)
        weights.step()
        bound.keep_place()
    weights.close()
    bound.close()


def main(argument: str) -> None:
    """Run the downlink as a process of a run with groups.

    `argument` is JSON: the job of the learner, and `groups`, `tasks`, `publish_s`, `link_fd` (see `wire.read_link`).
    """
    job = begin_child(argument, "downlink")
    config = validate(read_yaml(Path(job["run_dir"]) / "config.yaml"))
    arena, link, learner = Arena.attach(job["arena"]), wire.read_link(job["link_fd"]), read_secret(job["channel_fd"])
    downlink = Downlink(config, arena, job["groups"], job["tasks"])
    try:
        serve(downlink, link, learner, job["publish_s"], job["transition_ready_fd"])
    except (OSError, zmq.ZMQError) as error:
        end_for_good(f"the downlink cannot use {link.rows.endpoint} and {link.weights.endpoint}: {error}")


def end_for_good(sentence: str) -> NoReturn:
    """End this process as one whose successor would fail likewise."""
    print(sentence, file=sys.stderr)
    sys.exit(FATAL)


if __name__ == "__main__":
    main(sys.argv[1])
