"""The frame of every command: what it says and how it exits when it is interrupted or cannot go on.

Importing this takes no time, so that Ctrl-C finds the frame in place while a command imports what does.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from dsrl_async.host.output import LAST_WORDS_S, detach_stderr, detach_stdout, finish_stdout, open_missing
from dsrl_async.host.signals import survive_warnings

SLOW_S = 1.5
"""An import that takes so long is worth a word."""


def run_command(name: str) -> int:
    """Run the function `main` of `dsrl_async.NAME.command` with the arguments of the command line, see `guard`."""

    def command() -> int:
        interrupted = note_interrupts()
        with said_if_slow():
            module = importlib.import_module(f"dsrl_async.{name}.command")
        if interrupted:
            raise KeyboardInterrupt
        title = {"launch": "supervisor", "evaluate": "evaluation"}.get(name, name)
        importlib.import_module("dsrl_async.host.processes").name_process(title, title)
        code: int = module.main(sys.argv[1:])
        return code

    return guard(command)


@contextlib.contextmanager
def said_if_slow() -> Iterator[None]:
    """Tell whoever sits at a terminal that modules are imported, if that takes long: a cold disk, PyTorch."""
    if not sys.stderr.isatty():
        yield
        return
    slow = threading.Timer(SLOW_S, print, ["importing what this command needs"], {"file": sys.stderr})
    slow.daemon = True
    slow.start()
    try:
        yield
    finally:
        slow.cancel()


def note_interrupts() -> list[int]:
    """Return a list that gets an element for each Ctrl-C: Python loses the exception where it meets a callback of its
    import system."""
    noted: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in the background
        signal.signal(signal.SIGINT, interrupt)
    return noted


def guard(command: Callable[[], int | None]) -> int:
    """Call `command`; returns its exit code, or the one of an exception, about which a sentence goes to stderr.

    ValueError means that what the user gave cannot be used (2), OSError and RuntimeError that something failed (1), and
    KeyboardInterrupt that the user has had enough (130). Python's development mode, `python -X dev`, keeps the
    tracebacks of errors.

    Standard descriptors that are missing are opened. stderr makes nobody wait, stdout does so only in the end, and not
    for ever. The warnings of a batch system end no command, whether it answers them or not.
    """
    open_missing()
    detach_stdout()
    detach_stderr()
    survive_warnings()
    try:
        try:
            code = command() or 0
        except BaseException:  # help ends a command with SystemExit
            with contextlib.suppress(OSError):
                finish_stdout(LAST_WORDS_S)
            raise
        finish_stdout()  # if nobody reads it any more, that is an error like others
        return code
    except (Exception, KeyboardInterrupt) as error:
        if is_interrupt(error):
            code, sentence = 128 + signal.SIGINT, "interrupted"
        elif isinstance(error, SENTENCES) and not sys.flags.dev_mode:
            if isinstance(error, BrokenPipeError):
                discard_output()
            code, sentence = 2 if isinstance(error, ValueError) else 1, f"error: {what_is_wrong(error)}"
        else:
            raise
    with contextlib.suppress(OSError):
        print(sentence, file=sys.stderr)
    return code


SENTENCES = (ValueError, OSError, RuntimeError)
"""Exceptions that say what is wrong in a sentence."""


def what_is_wrong(error: BaseException) -> str:
    """The sentence of an exception, or at least its name."""
    name = type(error).__name__
    return str(error) or name if isinstance(error, SENTENCES) else f"{name}: {error}"


def is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an exception: a module written in C makes an ImportError of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__
    return error is not None


def discard_output() -> None:
    """Let nothing become of what is printed, since nobody reads it; Python would try again as it ends, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
