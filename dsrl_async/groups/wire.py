"""What a group and the learner's machine say to each other: ZeroMQ frames, a kind and raw numbers, never pickle.

A lane of a ring is a log of two operations, `begin_episode` and `append`, one for each row: that is what travels. Row n
holds observation n and, if it completed decision n - 1, what came of that one. Who replays them in their order has the
same lane, bit for bit, its pending row included, and no observation travels twice.

    uplink -> downlink    HELLO {version, layout, lanes}    also a sign of life, once a second
                          ROWS rows                         in the order of their numbers by lane, again until stored
                          REPORT number, counters           see `reports`
    downlink -> uplink    STATE updates, grants, what is stored
                          FENCED                            another incarnation has the group's place
                          REFUSED sentence                  the greeting does not fit

The sender of a message is its ZeroMQ identity, see `identity`. What cannot be what it says is dropped with one warning
of each kind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import zmq

from dsrl_async import __version__
from dsrl_async.run.channel import Channel, make_ends, read_secrets
from dsrl_async.shm.replay import OBSERVED, ReplayRing, Seen
from dsrl_async.untrusted import parse_json, shown

logger = logging.getLogger(__name__)

HELLO, ROWS, REPORT, STATE, FENCED, REFUSED = b"H", b"R", b"P", b"S", b"F", b"X"
LARGEST = 2**62
"""Upper limit on every number that counts something."""
LONGEST_SENTENCE, LONGEST_GREETING, LONGEST_STATE = 1000, 4096, 1 << 20
"""In bytes."""
BATCH_BYTES = 2 << 20
IDENTITY = re.compile(rb"(\d{1,6})\.(\d{1,9})")

Kind = Literal["sender", "kind", "greeting", "rows", "report", "state"]
"""What may be wrong with a message."""


class BadMessage(ValueError):
    """A message that is not what it should be; the error is a sentence."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(f"a message between a group and the learner's machine {message}")
        self.kind = kind


class Complaints:
    """Warns of each kind of bad message once."""

    def __init__(self) -> None:
        self._known: set[Kind] = set()

    def add(self, error: BadMessage) -> None:
        if error.kind not in self._known:
            self._known.add(error.kind)
            logger.warning("%s; it is dropped, and so is every other one like it, without a word", error)


class Link(NamedTuple):
    """One side's ends of the two channels between the groups and the learner's machine."""

    rows: Channel
    weights: Channel

    @classmethod
    def of_plain(cls, plain: Any) -> Link:
        """What JSON made of a link."""
        rows, weights = plain
        return cls(Channel(*rows), Channel(*weights))


def make_link(rows: str, weights: str) -> tuple[Link, Link]:
    """Make new keys for two endpoints; returns the ends of the learner's machine, and those of the groups."""
    of_rows, of_weights = make_ends(rows), make_ends(weights)
    return Link(of_rows.publisher, of_weights.publisher), Link(of_rows.subscriber, of_weights.subscriber)


def read_link(fd: int) -> Link:
    """Read what `channel.write_secret` wrote of a link, and close the descriptor of this process."""
    return Link(*read_secrets(fd))


def identity(group: int, incarnation: int) -> bytes:
    """How an incarnation of a group calls itself."""
    return f"{group}.{incarnation}".encode()


def sender(name: bytes) -> tuple[int, int]:
    """The group and the incarnation of an `identity`; raises BadMessage."""
    if (found := IDENTITY.fullmatch(name)) is None:
        raise BadMessage("sender", f"comes from {shown(name)}, which is no group")
    return int(found[1]), int(found[2])


# ---- rows


def row_type(ring: ReplayRing) -> np.dtype:
    """A row as it travels, packed: 12.5 kB where the agent sees one picture. Its layout follows from the ring's."""
    columns = [
        (name, rows.dtype.newbyteorder("<"), rows.shape[2:]) for name, rows in ring.rows.items() if name != "complete"
    ]
    return np.dtype([("number", "<i8"), ("started_episodes", "<i8"), ("lane", "<u4"), ("completes", "?"), *columns])


def layout_of(dtype: np.dtype) -> str:
    """A hash of a layout, which both sides must have alike."""
    return hashlib.sha256(repr(dtype.descr).encode()).hexdigest()[:16]


def batch_rows(dtype: np.dtype) -> int:
    """How many rows travel in one message at most."""
    return max(1, BATCH_BYTES // dtype.itemsize)


def collect(
    ring: ReplayRing, lanes: np.ndarray, numbers: np.ndarray, started_episodes: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """Rows `numbers` of `lanes`, int64 [n] each, as they travel.

    They have been started. `started_episodes`, int64 [lanes], was read after the ring's `heads`.
    """
    size = ring.rows_per_lane
    out, here, before = np.empty(len(lanes), dtype), numbers % size, (numbers - 1) % size
    out["lane"], out["number"], out["started_episodes"] = lanes, numbers, started_episodes[lanes]
    # With row n + 1 begins a decision's successor, or an episode; so row n is as its writer left it.
    out["completes"] = (numbers > 0) & ring.rows["complete"][lanes, before]
    for name, rows in ring.rows.items():
        if name != "complete":
            out[name] = rows[lanes, here if name in OBSERVED else before]
    # The writer may be filling row `head`, which lies where row `head - size` was; of row n - 1 the outcome was needed.
    assert (numbers > ring.heads()[lanes] - size + 1).all(), "a row was overwritten before it was stored"
    return out


def check_rows(frame: bytes | memoryview, dtype: np.dtype, lanes: int, tasks: int) -> np.ndarray:
    """The rows of a frame from a group with so many lanes, of an environment with so many instructions; raises
    BadMessage."""
    if len(frame) == 0 or len(frame) % dtype.itemsize:
        raise BadMessage("rows", f"has {len(frame)} bytes, which are no rows of {dtype.itemsize}")
    rows = np.frombuffer(frame, dtype)
    if (name := _impossible(rows, lanes, tasks)) is not None:
        raise BadMessage("rows", f"has {len(rows)} rows, of which one cannot be: its {name}")
    return rows


def _impossible(rows: np.ndarray, lanes: int, tasks: int) -> str | None:
    """The name of a column with a number that none of it can be; None if all can."""
    largest = {"lane": lanes - 1, "task_index": tasks - 1}
    for name in rows.dtype.names or ():
        values = rows[name]
        if values.dtype.kind == "b":
            values, most = values.view("u1"), 1
        elif values.ndim == 1 and values.dtype.kind in "iu":
            most = largest.get(name, LARGEST)
        else:
            continue
        if values.min() < 0 or values.max() > most:
            return name
    return "completes" if (rows["completes"] & (rows["number"] == 0)).any() else None


def replay(ring: ReplayRing, lane: int, row: np.void) -> None:
    """Do in a lane what the row's writer did."""
    seen = Seen(row["policy_images"] if ring.of_actions else None, row["task_index"]) if ring.keeps_seen else None
    if not row["completes"]:
        ring.begin_episode(lane, row["image"], row["state"], seen)
        return
    ring.append(
        lane,
        noise=row[ring.judged],
        reward=row["reward"],
        steps=row["steps"],
        terminal=row["terminal"],
        policy_version=row["policy_version"],
        next_image=row["image"],
        next_state=row["state"],
        next_seen=seen,
    )


# ---- greeting and state


class Hello(NamedTuple):
    """How a group introduces itself."""

    version: str
    layout: str
    """Of its rows, see `layout_of`."""
    lanes: int

    def encode(self) -> bytes:
        return json.dumps(self._asdict()).encode()

    @classmethod
    def decode(cls, frame: bytes) -> Hello:
        """Raises BadMessage."""
        try:
            plain = parse_json(frame, "it")
            version, layout, lanes = plain["version"], plain["layout"], plain["lanes"]
        except (ValueError, TypeError, KeyError, IndexError):
            raise BadMessage("greeting", "is no greeting") from None
        if not (isinstance(version, str) and isinstance(layout, str) and type(lanes) is int):
            raise BadMessage("greeting", "is no greeting")
        return cls(version, layout, lanes)


def why_refused(group: int, hello: Hello, layout: str, lanes: int) -> str | None:
    """In a sentence why a group with this greeting cannot take part in a run of this `layout` and `lanes` a group."""
    if hello.version != __version__:
        return (
            f"group {group} runs dsrl_async {shown(hello.version)} and the learner's machine {__version__}: install "
            "the same version on all machines"
        )
    if hello.lanes != lanes:
        return f"group {group} has {hello.lanes} environments, and the learner's machine expects {lanes}"
    if hello.layout != layout:
        return (
            f"the rows of group {group} have another layout than those of the learner's machine: both need the same "
            "settings of env.* and sac.*"
        )
    return None


class State(NamedTuple):
    """What the learner's machine tells a group."""

    updates: int
    """Gradient updates so far."""
    granted: int
    """Decisions that this incarnation may have handed out."""
    warmup: int
    """How many of those are warm-up."""
    stop: int
    """1 if the run stops."""
    reported: int
    """Number of the last report that was taken in."""
    stored: np.ndarray
    """int64 [lanes]: how many rows of each lane of this incarnation are stored."""

    def encode(self) -> bytes:
        return np.array([*self[:-1], *self.stored.tolist()], "<i8").tobytes()

    @classmethod
    def decode(cls, frame: bytes, lanes: int) -> State:
        """Raises BadMessage if it is none for a group with so many lanes."""
        counts = len(cls._fields) - 1
        if len(frame) != 8 * (counts + lanes):
            raise BadMessage("state", f"has {len(frame)} bytes, which are no state of {lanes} lanes")
        numbers = np.frombuffer(frame, "<i8")
        if numbers.min() < 0 or numbers.max() > LARGEST:
            raise BadMessage("state", "has numbers that count nothing")
        updates, granted, warmup, stop, reported = numbers[:counts].tolist()
        return cls(updates, granted, warmup, stop, reported, numbers[counts:])


# ---- sockets


def received(socket: zmq.Socket[bytes], most: int) -> Iterator[list[bytes]]:
    """Up to so many messages that have arrived; never waits."""
    for _ in range(most):
        try:
            yield socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return


def send(socket: zmq.Socket[bytes], *frames: bytes | memoryview) -> bool:
    """Hand a message over; False if too many wait already. Never waits."""
    try:
        socket.send_multipart(frames, zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True
