"""Standard input, output and error of a command: they are there, and nobody has to wait because nobody reads.

A pipe whose reader has stopped (`2>&1 | less`), or a terminal after Ctrl-S, takes nothing more. A process that writes
to it would stand still, deaf to signals and time limits, while its children go on without it.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import TextIO

MOST_WAITING = 1 << 16
"""So many bytes may wait to be written; what is said beyond that is dropped."""
LAST_WORDS_S = 2.0
"""How long a process that ends waits for a reader of stderr."""
MOST_RESULTS = 1 << 24
"""So many bytes of results may wait."""
PATIENCE_S = 30.0
"""How long a command that is done waits for a reader of its results who takes none of them. A person who has stopped a
terminal, with Ctrl-S, has twenty times as long."""


def open_missing() -> None:
    """Open /dev/null in the place of a standard descriptor that this process was started without.

    Otherwise a file or the shared memory would get its number, and a child its own log in the place of that.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
            assert opened == number
            os.set_inheritable(opened, True)
            setattr(sys, name, os.fdopen(opened, "w" if number else "r", closefd=False))


def detach_stderr() -> None:
    """Let sys.stderr, for the rest of this process, be one that makes nobody wait. What is no descriptor stays."""
    stream = sys.stderr
    with contextlib.suppress(io.UnsupportedOperation, AttributeError):
        if not isinstance(stream, DetachedOutput):
            stream.flush()
            detached = DetachedOutput(stream)
            atexit.register(detached.finish, LAST_WORDS_S)
            sys.stderr = detached


def detach_stdout() -> None:
    """Let sys.stdout, for the rest of this process, be one that makes nobody wait before `finish_stdout`."""
    stream = sys.stdout
    with contextlib.suppress(io.UnsupportedOperation, AttributeError, OSError):
        if not isinstance(stream, DetachedOutput):
            stream.flush()
            sys.stdout = DetachedOutput(stream, MOST_RESULTS)


def finish_stdout(patience_s: float | None = None) -> None:
    """Wait until what was printed is taken, and put back what `detach_stdout` has replaced.

    Raises OSError, BrokenPipeError for one, if it is not taken.
    """
    output = sys.stdout
    if not isinstance(output, DetachedOutput):
        output.flush()
        return
    sys.stdout = output.stream
    if not output.finish(patience_s or PATIENCE_S * (20 if output.isatty() else 1), patience_s is None):
        raise output.error or TimeoutError("nobody has read what was printed")


def _attach_again() -> None:
    """In a forked process, whose threads are gone: write to the descriptors themselves."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, DetachedOutput):
            setattr(sys, name, stream.stream)


os.register_at_fork(after_in_child=_attach_again)


def is_for_a_person() -> bool:
    """Whether both, stdout and stderr, are a terminal: a line of JSON would only hide what is meant for a person."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))


def last_lines(came_out: str, where: str, next: str) -> list[str]:
    """What a command that has done its work says to a person: three lines, see `print_to_person`."""
    lines = {"came out": came_out, "where": where, "next": next}
    return [f"{name + ':':10}{words}" for name, words in lines.items()]


def print_to_person(lines: Iterable[str]) -> None:
    """Print lines to stderr as they are: a command in them can be copied. That nobody reads them is no error."""
    with contextlib.suppress(OSError):
        print("\n".join(lines), file=sys.stderr, flush=True)


def say(text: str, patience_s: float = 10.0) -> bool:
    """Print a line, such as a result, to stdout; False if nobody took it within `patience_s` seconds."""
    try:
        stream = sys.stdout.stream if isinstance(sys.stdout, DetachedOutput) else sys.stdout
        stream.flush()
        output = DetachedOutput(stream)
    except (io.UnsupportedOperation, AttributeError):
        print(text)
        return True
    except OSError:
        return False
    output.write(text + "\n")
    return output.finish(patience_s)


class DetachedOutput(io.TextIOBase):
    """A text stream that writes to the descriptor of another one in a thread of its own, and drops what is too much.

    Not even `flush` waits; `finish` does, for a while. Raises io.UnsupportedOperation if `stream` has no descriptor.
    """

    def __init__(self, stream: TextIO, most_waiting: int = MOST_WAITING) -> None:
        self.stream, self._descriptor, self._most_waiting = stream, stream.fileno(), most_waiting
        self.error: OSError | None = None
        self._waiting: deque[bytes] = deque()
        self._bytes = self._written = 0
        self._lost = self._finished = self._dropping = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]  # which io declares as a variable
        return self.stream.encoding

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return self.stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        data = text.encode(self.encoding, "backslashreplace")
        with self._changed:
            too_much = self._bytes >= self._most_waiting
            # What comes after something that was dropped would be read as if it went on from there.
            self._dropping = bool(self._waiting) and (self._dropping or too_much)
            if self._finished or self._dropping:
                self._lost = True
            else:
                self._waiting.append(data)
                self._bytes += len(data)
                self._changed.notify_all()
                if self._thread is None:
                    self._thread = threading.Thread(target=self._write_all, name="output", daemon=True)
                    self._thread.start()
        return len(text)

    def finish(self, patience_s: float, as_long_as_it_takes: bool = False) -> bool:
        """Wait at most so long until all is written, and write nothing from then on; whether nothing was lost.

        Optionally the time counts anew whenever something is written.
        """
        deadline = time.monotonic() + patience_s
        with self._changed:
            while self._waiting and (left := deadline - time.monotonic()) > 0:
                written = self._written
                self._changed.wait(min(left, 1.0))
                if as_long_as_it_takes and self._written != written:
                    deadline = time.monotonic() + patience_s
            self._finished = True
            return not self._waiting and not self._lost

    def _write_all(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                data = self._waiting[0]
            size = len(data)
            try:
                while data:
                    written = self._write_some(data)
                    self._written += written
                    data = data[written:]
            except OSError as error:  # nobody reads any more, or a disk is full
                self._lost, self.error = True, self.error or error
            with self._changed:
                self._bytes -= size
                self._waiting.popleft()
                self._changed.notify_all()

    def _write_some(self, data: bytes) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # whoever shares the descriptor has set O_NONBLOCK
            poll = select.poll()  # `select` takes no descriptor beyond 1023
            poll.register(self._descriptor, select.POLLOUT)
            poll.poll(1000)
            return 0
