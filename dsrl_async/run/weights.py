"""Actor weights from the learner to the inference process: one flat float32 vector in one ZeroMQ frame.

A frame is a 40-byte header (magic, layout hash, policy version, length, checksum) and raw numbers, never pickle. The
publisher keeps the last one and sends it again to whoever subscribes late; the subscriber keeps only the newest, and
drops, with one warning of each kind, what cannot be weights of its learner. `channel` says who may have a part in it.
"""

from __future__ import annotations

import hmac
import logging
import struct
import zlib
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import zmq
from zmq.auth.thread import ThreadAuthenticator

from dsrl_async.run.channel import Channel, check_directory

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
HANDSHAKE_MS = 5000
"""How long a connection may take to show its key."""
SUBSCRIBE, UNSUBSCRIBE = b"\x01", b"\x00"
DOMAIN = "weights"

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
    if len(frame) < HEADER.size:
        raise BadFrame("short", f"has {len(frame)} bytes, fewer than its header")
    magic, frame_hash, version, length, checksum = HEADER.unpack_from(frame)
    if magic != MAGIC:
        raise BadFrame("foreign", "has a foreign header")
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


def _checksum(layout_hash: int, version: int, length: int, values: bytes | memoryview) -> int:
    """CRC-32: against accidents, the keys are against intent. BLAKE2 and SHA-256 take two to four times as long."""
    return zlib.crc32(values, zlib.crc32(struct.pack("<Qqq", layout_hash, version, length)))


class _OnlyKey(NamedTuple):
    """Admits one public key, as ZeroMQ's authenticator asks for it."""

    key: str

    def callback(self, domain: str, key: bytes) -> bool:
        return hmac.compare_digest(key, self.key.encode())


class WeightPublisher:
    """The learner's end. Raises OSError if somebody else has the socket's place.

    Whoever does not hold the subscribers' key is told nothing and gets no further than ZeroMQ's handshake.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        prefix, _, path = channel.endpoint.partition("ipc://")
        self._path = None if prefix else Path(path)
        self._last: bytes | None = None
        self._warned = self._unplaced = False
        self._open()

    def _open(self) -> None:
        if self._path is not None:
            check_directory(self._path.parent)
        self._context = zmq.Context()  # of its own, so that closing it waits until the place is free again
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(DOMAIN, _OnlyKey(self._channel.client))
        # XPUB hands subscriptions to us, which is how a late joiner is noticed; VERBOSE, so that a second one is too.
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.XPUB)
        for option, value in (
            (zmq.XPUB_VERBOSE, 1),
            (zmq.LINGER, 0),
            (zmq.SNDHWM, QUEUE),
            (zmq.RCVHWM, MOST_REQUESTS),
            (zmq.MAXMSGSIZE, LONGEST_REQUEST),
            (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
            (zmq.CURVE_SERVER, 1),
            (zmq.ZAP_ENFORCE_DOMAIN, 1),  # nobody is admitted without the authenticator
        ):
            self._socket.setsockopt(option, value)
        self._socket.setsockopt_string(zmq.ZAP_DOMAIN, DOMAIN)
        self._socket.setsockopt_string(zmq.CURVE_SECRETKEY, self._channel.secret)
        try:
            # This replaces a socket that a predecessor which was killed has left.
            self._socket.bind(self._channel.endpoint)
        except zmq.ZMQError:
            self.close()  # a context that is not terminated keeps the process from ending
            raise

    def publish(self, frame: bytes) -> None:
        self._last = frame
        self._socket.send(frame, copy=False)

    def serve_late_joiners(self) -> None:
        """Send the last frame again if somebody subscribed since the last call.

        Where a cleaner of temporary directories has removed the socket, it is made again, or nobody new would find it.
        """
        if self._path is not None and not self._path.exists():
            self._make_again(self._path)
        joined = False
        for _ in range(MOST_REQUESTS):
            if not self._socket.poll(0):
                break
            request = self._socket.recv()
            joined |= request == SUBSCRIBE
            if request not in (SUBSCRIBE, UNSUBSCRIBE):
                # ZeroMQ keeps all that was ever subscribed to, for as long as the connection lives.
                if not self._warned:
                    logger.warning("a subscriber of the weights asks for something else; all are disconnected")
                self._warned, joined = True, False
                self.close()
                self._open()
        if joined and self._last is not None:
            self._socket.send(self._last, copy=False)

    def _make_again(self, path: Path) -> None:
        try:
            check_directory(path.parent)
        except OSError as error:  # whoever is connected stays so
            if not self._unplaced:
                logger.warning("somebody has removed %s, and it cannot be made again: %s", path, error)
            self._unplaced = True
            return
        logger.warning("somebody has removed %s; it is made again", path)
        self._unplaced = False
        self.close()
        self._open()

    def close(self) -> None:
        self._socket.close()
        self._authenticator.stop()
        self._context.term()


class WeightSubscriber:
    """The inference process's end.

    Attributes:
        socket: can be polled for new weights.
    """

    def __init__(self, channel: Channel, layout_hash: int, size: int) -> None:
        self._context = zmq.Context()
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.SUB)
        for option, value in (
            (zmq.CONFLATE, 1),  # before connect, or it has no effect
            (zmq.LINGER, 0),
            (zmq.RECONNECT_IVL, 50),
            (zmq.MAXMSGSIZE, HEADER.size + 4 * size + LONGEST_REQUEST),
            (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
        ):
            self.socket.setsockopt(option, value)
        self.socket.setsockopt_string(zmq.CURVE_SERVERKEY, channel.server)
        self.socket.setsockopt_string(zmq.CURVE_PUBLICKEY, channel.client)
        self.socket.setsockopt_string(zmq.CURVE_SECRETKEY, channel.secret)
        self.socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._monitor = self.socket.get_monitor_socket(zmq.Event.DISCONNECTED)
        self._endpoint = channel.endpoint
        self.socket.connect(self._endpoint)
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
            self._connect_again()
            return None
        except BadFrame as error:
            if error.kind in self._unwarned:
                self._unwarned.remove(error.kind)
                logger.warning("%s; it is dropped, and so is every other one like it, without a word", error)
            return None
        self._version = weights.policy_version
        return weights

    def _connect_again(self) -> None:
        """After a connection has ended: ZeroMQ gives an endpoint up for good where it met one that does not speak its
        protocol, has no keys, or sends what is too large."""
        disconnected = False
        while self._monitor.poll(0):
            disconnected = bool(self._monitor.recv_multipart())
        if disconnected:
            self.socket.disconnect(self._endpoint)
            self.socket.connect(self._endpoint)

    def close(self) -> None:
        self.socket.disable_monitor()
        self._monitor.close()
        self.socket.close()
        self._context.term()
