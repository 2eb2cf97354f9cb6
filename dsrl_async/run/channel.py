"""The channel from the learner to whoever takes its weights: where it is, and the keys by which both ends know each
other. `weights` sends through it.

Two things keep others out. The socket lies in a directory that only its owner may enter, so that another user of the
machine cannot reach it. And both ends speak CURVE (ZeroMQ's RFC 26): they prove to each other that they hold keys which
were made for this run, and encrypt and sign what they send, so the same channel can go from machine to machine. The
keys are in an anonymous file that a child inherits, never on a command line or in the environment.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import tempfile
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import zmq

PREFIX, SOCKET = "dsrl_async-channel-", "weights"
LONGEST_PATH = 107
"""Bytes of a path that a socket's address has room for (`sun_path` in unix(7), without the zero at its end)."""
ATTEMPTS = 10


class Channel(NamedTuple):
    """One end of the channel. Keys are in Z85, as ZeroMQ takes them."""

    endpoint: str
    """As ZeroMQ's bind and connect take it: `ipc://PATH`."""
    server: str
    """Public key of the end that publishes."""
    client: str
    """Public key of those who may subscribe."""
    secret: str
    """The secret key that belongs to one of the two, at its own end."""


class Ends(NamedTuple):
    """Both ends of a channel."""

    publisher: Channel
    subscriber: Channel


def make_ends(endpoint: str) -> Ends:
    """Make new keys for an endpoint."""
    server, server_secret = (key.decode() for key in zmq.curve_keypair())
    client, client_secret = (key.decode() for key in zmq.curve_keypair())
    return Ends(Channel(endpoint, server, client, server_secret), Channel(endpoint, server, client, client_secret))


def write_secret(ends: Channel | tuple[Channel, ...]) -> int:
    """Put an end, or several, into an anonymous file; returns its descriptor, which the child inherits to read it."""
    fd = os.memfd_create("dsrl_async-channel", os.MFD_CLOEXEC)
    os.fchmod(fd, 0o600)
    os.write(fd, json.dumps(ends).encode())
    return fd


def read_secret(fd: int) -> Channel:
    """Read the end that `write_secret` wrote, and close the descriptor of this process."""
    return Channel(*_read(fd))


def read_secrets(fd: int) -> list[Channel]:
    """As `read_secret`, of several ends."""
    return [Channel(*end) for end in _read(fd)]


def _read(fd: int) -> Any:
    plain = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    os.close(fd)
    return plain


def check_channel() -> None:
    """Raises ValueError with one sentence if this machine can have no channel."""
    if not zmq.has("curve"):
        raise ValueError(
            "pyzmq was built without CURVE, by which the learner and the inference process know each other; install "
            "its wheel: pip install --force-reinstall --only-binary :all: pyzmq"
        )
    SocketDirectory().close()


class SocketDirectory:
    """A new directory for the channel's socket that only its owner may enter; `close` removes it.

    It is removed as well when it is forgotten or Python ends. What a process left behind that was killed is removed by
    the next one of the same user that makes a directory: the owner holds a lock on its directory, which the kernel
    takes back however the owner ends. (Tools that clean up temporary directories heed it, too.)

    Raises ValueError with one sentence if there is no place for it.
    """

    def __init__(self) -> None:
        problems = []
        for base in places():
            try:
                sweep(base)
                self.path, lock = _make(base)
                break
            except OSError as error:
                problems.append(f"{base}: {error.strerror or error}")
        else:
            raise ValueError(
                "no directory for the socket of the learner's weights can be made; set TMPDIR to a directory with a "
                f"short name in which you may write ({'; '.join(problems) or 'their names are too long'})"
            )
        self._close = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    @property
    def endpoint(self) -> str:
        return f"ipc://{self.path / SOCKET}"

    def close(self) -> None:
        self._close()


def places() -> list[Path]:
    """Directories that have room for a socket's address below them, the best ones first.

    `XDG_RUNTIME_DIR` is the last one: it goes when its user logs out, which a run in the background outlives.
    """
    named = [tempfile.gettempdir(), "/tmp", "/var/tmp", os.environ.get("XDG_RUNTIME_DIR", "")]
    found = [Path(name) for name in dict.fromkeys(named) if os.path.isdir(name) and os.path.isabs(name)]
    name = f"/{PREFIX}12345678/{SOCKET}"
    fitting = [place for place in found if len(os.fsencode(f"{place}{name}")) <= LONGEST_PATH]
    return sorted(fitting, key=others_may_rename)


def others_may_rename(directory: Path) -> bool:
    """Whether other users may rename what is ours in a directory, and put something else in its place."""
    found = directory.stat()
    return found.st_uid not in (0, os.geteuid()) or (found.st_mode & 0o022 != 0 and not found.st_mode & stat.S_ISVTX)


def sweep(base: Path) -> None:
    """Remove the socket directories of this user in `base` whose owners have ended."""
    for path in base.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            fd = _open(path)
            stack.callback(os.close, fd)
            _lock(fd)
            _empty(path)


def check_directory(path: Path) -> None:
    """Make the directory of a socket again if it is gone; raises OSError if somebody else has taken its name."""
    path.mkdir(mode=0o700, exist_ok=True)
    os.close(_open(path))


def _open(path: Path) -> int:
    """Open a directory; raises OSError unless it belongs to this user and lets nobody else in."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        os.close(fd)
        raise PermissionError(f"{path} belongs to somebody else, or others may enter it")
    return fd


def _lock(fd: int) -> None:
    """Lock an open directory; raises BlockingIOError if its owner still runs."""
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _make(base: Path) -> tuple[Path, int]:
    """A new directory and the descriptor that holds its lock."""
    for _ in range(ATTEMPTS):
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))  # of mode 0700
        with contextlib.suppress(FileNotFoundError, BlockingIOError), contextlib.ExitStack() as stack:
            fd = _open(path)
            stack.callback(os.close, fd)
            _lock(fd)
            if os.path.samestat(os.fstat(fd), path.stat()):
                stack.pop_all()
                return path, fd
        # Somebody sweeps, and saw it before it was locked.
    raise OSError(f"{ATTEMPTS} new directories were removed at once")


def _remove(path: Path, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # not in a process that was forked from the owner
        with contextlib.suppress(OSError):
            os.close(_open(path))
            _empty(path)
        os.close(lock)


def _empty(path: Path) -> None:
    """Remove a socket's directory; raises OSError if there is anything else in it."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK((path / SOCKET).lstat().st_mode):
            (path / SOCKET).unlink()
    path.rmdir()
