"""Actor weights from the learner to the inference process: one flat float32 vector in one ZeroMQ frame.

A frame is a 40-byte header (magic, layout hash, policy version, length, checksum) and raw numbers, never pickle. The
publisher keeps the last one and sends it again to whoever subscribes late; the subscriber keeps only the newest, and
drops, with one warning of each kind, what cannot be weights of its learner. `channel` says who may have a part in it.
"""

from __future__ import annotations

import logging
import struct
import zlib
from typing import Literal, NamedTuple, get_args

import numpy as np
import zmq

from dsrl_async.run.channel import Channel
from dsrl_async.run.sockets import Bound, Connected

logger = logging.getLogger(__name__)

HEADER = struct.Struct("<8sQqqQ")
MAGIC = b"DSRLW002"
LARGEST_WEIGHT = 2.0**40
"""No weight that was learned is nearly so large, and the networks' outputs would not be finite."""
LONGEST_REQUEST = 1024
"""Bytes of the longest frame that ZeroMQ takes from a subscriber: its handshake has a few hundred, a subscription 1."""
MOST_REQUESTS = 64
"""Requests of subscribers that are looked at in one go."""
QUEUE = 64
"""Frames that wait for a subscriber which has been stopped; further ones are dropped. They are 0.8 MB each."""
LONGEST_FRAME = 256 << 20
"""Bytes of the longest frame that is handed on by who knows nothing of the network."""
NEWEST_ONLY = ((zmq.CONFLATE, 1), (zmq.RECONNECT_IVL, 50))
SUBSCRIBE, UNSUBSCRIBE = b"\x01", b"\x00"

Kind = Literal["short", "foreign", "layout", "cut off", "checksum", "values", "version"]
"""What may be wrong with a frame."""


class Weights(NamedTuple):
    policy_version: int
    flat: np.ndarray  # float32 [P]


class BadFrame(ValueError):
    """A frame that is not what it should be; the error is a sentence."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(f"weight frame {message}")
        self.kind = kind


def plausible(flat: np.ndarray) -> bool:
    """Say whether all values are finite and could be weights."""
    # A NaN makes both extremes NaN, which compares as false; two reductions cost less than one `isfinite`.
    return flat.size == 0 or bool(flat.min() >= -LARGEST_WEIGHT and flat.max() <= LARGEST_WEIGHT)


def encode(policy_version: int, layout_hash: int, flat: np.ndarray) -> bytes:
    assert flat.dtype == np.float32
    assert flat.ndim == 1
    values = np.ascontiguousarray(flat).data.cast("B") if flat.size else b""
    checksum = _checksum(layout_hash, policy_version, flat.size, values)
    return b"".join([HEADER.pack(MAGIC, layout_hash, policy_version, flat.size, checksum), values])


def decode(frame: bytes | memoryview, layout_hash: int, size: int) -> Weights:
    """Read a frame; raises BadFrame if it is not the weights of a network with this layout, as they were sent."""
    frame_hash, version, length, checksum = read_header(frame)
    if frame_hash != layout_hash or length != size:
        raise BadFrame("layout", "belongs to a network of another layout")
    if len(frame) != HEADER.size + 4 * size:
        raise BadFrame("cut off", f"is cut off: {len(frame)} bytes instead of {HEADER.size + 4 * size}")
    values = memoryview(frame)[HEADER.size :]
    if _checksum(frame_hash, version, length, values) != checksum:
        raise BadFrame("checksum", "does not have the checksum that it was sent with")
    flat = np.frombuffer(values, np.float32)
    if not plausible(flat):
        raise BadFrame("values", "holds values that are not finite, or too large for weights")
    return Weights(version, flat)


def read_header(frame: bytes | memoryview) -> tuple[int, int, int, int]:
    """Layout hash, policy version, length and checksum, as a frame says; raises BadFrame if it is none of ours."""
    if len(frame) < HEADER.size:
        raise BadFrame("short", f"has {len(frame)} bytes, fewer than its header")
    magic, layout_hash, version, length, checksum = HEADER.unpack_from(frame)
    if magic != MAGIC:
        raise BadFrame("foreign", "has a foreign header")
    return layout_hash, version, length, checksum


def _checksum(layout_hash: int, version: int, length: int, values: bytes | memoryview) -> int:
    """CRC-32: against accidents, the keys are against intent. BLAKE2 and SHA-256 take two to four times as long."""
    return zlib.crc32(values, zlib.crc32(struct.pack("<Qqq", layout_hash, version, length)))


class WeightPublisher:
    """The learner's end. Raises OSError if somebody else has the socket's place."""

    def __init__(self, channel: Channel, queue: int = QUEUE) -> None:
        """`queue` is how many frames wait for a subscriber that takes none."""
        # XPUB hands subscriptions to us, which is how a late joiner is noticed; VERBOSE, so that a second one is too.
        options = ((zmq.XPUB_VERBOSE, 1), (zmq.SNDHWM, queue), (zmq.RCVHWM, MOST_REQUESTS))
        self._bound = Bound(channel, zmq.XPUB, LONGEST_REQUEST, options)
        self._last: bytes | None = None
        self._warned = False

    def publish(self, frame: bytes) -> None:
        self._last = frame
        self._bound.socket.send(frame, copy=False)

    def serve_late_joiners(self) -> None:
        """Send the last frame again if somebody subscribed since the last call."""
        self._bound.keep_place()
        joined = False
        for _ in range(MOST_REQUESTS):
            if not self._bound.socket.poll(0):
                break
            request = self._bound.socket.recv()
            joined |= request == SUBSCRIBE
            if request not in (SUBSCRIBE, UNSUBSCRIBE):
                # ZeroMQ keeps all that was ever subscribed to, for as long as the connection lives.
                if not self._warned:
                    logger.warning("a subscriber of the weights asks for something else; all are disconnected")
                self._warned, joined = True, False
                self._bound.open_again()
        if joined and self._last is not None:
            self._bound.socket.send(self._last, copy=False)

    def close(self) -> None:
        self._bound.close()


class FrameSubscriber:
    """Takes the newest frame as it is, for who hands it on to others."""

    def __init__(self, channel: Channel) -> None:
        self._end = Connected(channel, zmq.SUB, LONGEST_FRAME, NEWEST_ONLY)

    def newest(self) -> bytes | None:
        """The newest frame since the last call, if any; never waits."""
        try:
            return self._end.socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            self._end.connect_again()
            return None

    def close(self) -> None:
        self._end.close()


class WeightSubscriber:
    """The inference process's end.

    Attributes:
        socket: can be polled for new weights.
    """

    def __init__(self, channel: Channel, layout_hash: int, size: int) -> None:
        self._end = Connected(channel, zmq.SUB, HEADER.size + 4 * size + LONGEST_REQUEST, NEWEST_ONLY)
        self.socket = self._end.socket
        self._layout_hash, self._size = layout_hash, size
        self._version = 0
        self._unwarned = set(get_args(Kind))

    def newest(self, updates: int) -> Weights | None:
        """The newest weights since the last call, if any; never waits.

        Their version lies between that of the last ones and the number of `updates` that the learner has done by now: a
        learner's successor goes on counting where it was. A frame that is anything else is dropped.
        """
        try:
            frame = self.socket.recv(zmq.NOBLOCK, copy=False)
            weights = decode(frame.buffer, self._layout_hash, self._size)
            if not self._version <= weights.policy_version <= updates:
                raise BadFrame(
                    "version",
                    f"has version {weights.policy_version}, which is not between {self._version} and {updates}",
                )
        except zmq.Again:
            self._end.connect_again()
            return None
        except BadFrame as error:
            if error.kind in self._unwarned:
                self._unwarned.remove(error.kind)
                logger.warning("%s; it is dropped, and so is every other one like it, without a word", error)
            return None
        self._version = weights.policy_version
        return weights

    def close(self) -> None:
        self._end.close()
