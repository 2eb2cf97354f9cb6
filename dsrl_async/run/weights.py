"""Actor weights from the learner to the inference process: one flat float32 vector in one ZeroMQ frame.

The frame is a 32-byte header (magic, layout hash, policy version, length) and raw numbers, never pickle. The
publisher keeps the last frame and sends it again to whoever subscribes late; the subscriber keeps only the newest.
The address is in Linux's abstract namespace by default, so no socket file can be left behind.
"""

from __future__ import annotations

import struct
import time
from typing import NamedTuple

import numpy as np
import zmq

HEADER = struct.Struct("<8sQqq")
MAGIC = b"DSRLW001"
BIND_S = 5.0  # how long a predecessor's socket may take to close


class Weights(NamedTuple):
    policy_version: int
    flat: np.ndarray  # float32 [P]


def encode(policy_version: int, layout_hash: int, flat: np.ndarray) -> bytes:
    assert flat.dtype == np.float32
    assert flat.ndim == 1
    return HEADER.pack(MAGIC, layout_hash, policy_version, flat.size) + flat.tobytes()


def decode(frame: bytes | memoryview, layout_hash: int, size: int) -> Weights:
    """Read a frame; raises ValueError if it is not the weights of a network with this layout."""
    if len(frame) < HEADER.size:
        raise ValueError(f"weight frame has {len(frame)} bytes, fewer than its header")
    magic, frame_hash, version, length = HEADER.unpack_from(frame)
    if magic != MAGIC:
        raise ValueError("weight frame has a foreign header")
    if frame_hash != layout_hash or length != size:
        raise ValueError("weight frame belongs to a network of another layout")
    if len(frame) != HEADER.size + 4 * size:
        raise ValueError(f"weight frame is cut off: {len(frame)} bytes instead of {HEADER.size + 4 * size}")
    return Weights(version, np.frombuffer(frame, np.float32, offset=HEADER.size))


def _bind(socket: zmq.Socket[bytes], address: str) -> None:
    """Bind, if need be a little later: ZeroMQ closes a predecessor's socket in the background."""
    deadline = time.monotonic() + BIND_S
    while True:
        try:
            socket.bind(address)
            return
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE or time.monotonic() >= deadline:
                raise
            time.sleep(0.01)


class WeightPublisher:
    def __init__(self, address: str) -> None:
        # XPUB hands subscriptions to us, which is how a late joiner is noticed; VERBOSE, so that a second one is too.
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.XPUB)
        self._socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        self._socket.setsockopt(zmq.LINGER, 0)
        _bind(self._socket, address)
        self._last: bytes | None = None

    def publish(self, frame: bytes) -> None:
        self._last = frame
        self._socket.send(frame, copy=False)

    def serve_late_joiners(self) -> None:
        """Send the last frame again if somebody subscribed since the last call."""
        joined = False
        while self._socket.poll(0):
            joined |= self._socket.recv()[:1] == b"\x01"
        if joined and self._last is not None:
            self._socket.send(self._last, copy=False)

    def close(self) -> None:
        self._socket.close()


class WeightSubscriber:
    def __init__(self, address: str, layout_hash: int, size: int) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self.socket.setsockopt(zmq.CONFLATE, 1)  # before connect, or it has no effect
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self.socket.setsockopt(zmq.SUBSCRIBE, b"")
        self.socket.connect(address)
        self._layout_hash, self._size = layout_hash, size

    def newest(self) -> Weights | None:
        """The newest weights since the last call, if any; never waits."""
        if not self.socket.poll(0):
            return None
        return decode(self.socket.recv(copy=False).buffer, self._layout_hash, self._size)

    def close(self) -> None:
        self.socket.close()
