"""Sockets whose two ends know each other by their keys: ZeroMQ with CURVE, on one machine and between machines.

`channel` makes the keys. One end binds, and admits those who hold one key; the others connect to the one that holds
another. Neither takes frames that are larger than it expects, nor waits long for a handshake.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import zmq
from zmq.auth.thread import ThreadAuthenticator

from dsrl_async.run.channel import Channel, check_directory

logger = logging.getLogger(__name__)

HANDSHAKE_MS = 5000
"""How long a connection may take to show its key."""
HEARTBEAT_MS, SILENCE_MS = 2000, 8000
"""How often both ends of a connection between machines give a sign of life, and after how long a silence it is given
up: a network that is cut says nothing."""
DOMAIN = "dsrl_async"

Options = Iterable[tuple[int, int]]


class OnlyKey(NamedTuple):
    """Admits one public key, as ZeroMQ's authenticator asks for it."""

    key: str

    def callback(self, domain: str, key: bytes) -> bool:
        return hmac.compare_digest(key, self.key.encode())


def _set(socket: zmq.Socket[bytes], channel: Channel, longest: int, options: Options) -> None:
    own = [(zmq.LINGER, 0), (zmq.MAXMSGSIZE, longest), (zmq.HANDSHAKE_IVL, HANDSHAKE_MS)]
    if channel.endpoint.startswith("tcp://"):
        own += [
            (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, SILENCE_MS),
            (zmq.HEARTBEAT_TTL, SILENCE_MS),
        ]
    for option, value in (*own, *options):
        socket.setsockopt(option, value)
    socket.setsockopt_string(zmq.CURVE_SECRETKEY, channel.secret)


class Bound:
    """The end that binds. Who does not hold the other end's key gets no further than ZeroMQ's handshake.

    Raises OSError if somebody else has the place of its socket, and zmq.ZMQError if it cannot be bound.

    Args:
        channel: this end; its `server` key is that of this end.
        kind: of the socket, such as `zmq.XPUB`.
        longest: bytes of the longest frame that is taken.
        options: further ones of the socket.
    """

    def __init__(self, channel: Channel, kind: int, longest: int, options: Options = ()) -> None:
        self._channel, self._kind, self._longest, self._options = channel, kind, longest, tuple(options)
        prefix, _, path = channel.endpoint.partition("ipc://")
        self._path = None if prefix else Path(path)
        self._unplaced = False
        self._open()

    def _open(self) -> None:
        if self._path is not None:
            check_directory(self._path.parent)
        self._context = zmq.Context()  # of its own, so that closing it waits until the place is free again
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(DOMAIN, OnlyKey(self._channel.client))
        self.socket: zmq.Socket[bytes] = self._context.socket(self._kind)
        _set(self.socket, self._channel, self._longest, self._options)
        self.socket.setsockopt(zmq.CURVE_SERVER, 1)
        self.socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody is admitted without the authenticator
        self.socket.setsockopt_string(zmq.ZAP_DOMAIN, DOMAIN)
        try:
            # This replaces a socket that a predecessor which was killed has left.
            self.socket.bind(self._channel.endpoint)
        except zmq.ZMQError:
            self.close()  # a context that is not terminated keeps the process from ending
            raise

    def keep_place(self) -> bool:
        """Where a cleaner of temporary directories has removed the socket, make it again, or nobody new would find it.

        Returns whether there is another one now.
        """
        if self._path is None or self._path.exists():
            return False
        try:
            check_directory(self._path.parent)
        except OSError as error:  # whoever is connected stays so
            if not self._unplaced:
                logger.warning("somebody has removed %s, and it cannot be made again: %s", self._path, error)
            self._unplaced = True
            return False
        logger.warning("somebody has removed %s; it is made again", self._path)
        self._unplaced = False
        self.open_again()
        return True

    def open_again(self) -> None:
        """Disconnect all who are connected; they may come back."""
        self.close()
        self._open()

    def close(self) -> None:
        self.socket.close()
        self._authenticator.stop()
        self._context.term()


class Connected:
    """An end that connects. It listens to nobody who does not hold the bound end's key."""

    def __init__(self, channel: Channel, kind: int, longest: int, options: Options = (), identity: bytes = b"") -> None:
        """As `Bound`; `identity` is how a ROUTER knows it."""
        self._context = zmq.Context()
        self.socket: zmq.Socket[bytes] = self._context.socket(kind)
        _set(self.socket, channel, longest, options)
        self.socket.setsockopt_string(zmq.CURVE_SERVERKEY, channel.server)
        self.socket.setsockopt_string(zmq.CURVE_PUBLICKEY, channel.client)
        if identity:
            self.socket.setsockopt(zmq.IDENTITY, identity)
        if kind == zmq.SUB:
            self.socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._monitor = self.socket.get_monitor_socket(zmq.Event.DISCONNECTED)
        self._endpoint = channel.endpoint
        self.socket.connect(self._endpoint)

    def connect_again(self) -> None:
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
