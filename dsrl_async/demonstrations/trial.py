"""Tries in a child what a library written in C might crash over or never come back from."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from dsrl_async import untrusted

FORK = multiprocessing.get_context("fork")
GOING_ON = b"\0"
"""What a child sends to say that it is not stuck."""


def problem(work: Callable[..., None], *arguments: Any, seconds: float) -> str | None:
    """What is wrong, by the child that calls `work` with these arguments and a connection; None if nothing is.

    `work` sends one sentence, or nothing, at the end. It may send `GOING_ON` before; `seconds` is the time that it has
    for each thing that it sends.
    """
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_without_core, args=(work, *arguments, sender), daemon=True)
    process.start()
    sender.close()
    try:
        while receiver.poll(seconds):
            if (said := receiver.recv_bytes()) != GOING_ON:
                return said.decode() or None
        return f"it was not read within {seconds:.0f} s; it is damaged, or its disk is very slow"
    except EOFError:
        return "reading it ended the process that tried to; it is damaged"
    finally:
        process.kill()
        process.join()
        receiver.close()


@contextlib.contextmanager
def telling(sender: Connection) -> Iterator[None]:
    """Send, at the end, what went wrong inside of the `with`, or nothing."""
    said = ""
    try:
        yield
    except Exception as error:
        said = untrusted.in_one_line(error) or type(error).__name__
    sender.send_bytes(said.encode(errors="replace"))


def _without_core(work: Callable[..., None], *arguments: Any) -> None:
    """A crash is expected here: it must not leave gigabytes of a core file, nor take the time to write them."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    work(*arguments)
