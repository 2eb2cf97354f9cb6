<<<<<<< HEAD
"""Call a command's `main` in the test's own process, which spares the start of another."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import signal
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dsrl_async.host.signals import SIGNALS


class Done(NamedTuple):
    """What a command left behind: its exit code, and what it wrote."""

    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object on the last line of stdout."""
        assert self.code == 0, self.stderr
        result: dict[str, Any] = json.loads(self.stdout.strip().splitlines()[-1])
        return result


def call(main: Callable[[Sequence[str]], int], *arguments: str) -> Done:
    """`main(arguments)`; puts back the signal handlers and the log's handlers that it replaces."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    root, stdout, stderr = logging.getLogger(), io.StringIO(), io.StringIO()
    log_handlers, level = list(root.handlers), root.level
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = main(arguments)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        root.handlers[:] = log_handlers
        root.setLevel(level)
    return Done(code, stdout.getvalue(), stderr.getvalue())
=======
"""Commands that are called in this process, as `python -m dsrl_async.NAME` or a console script calls them."""

from __future__ import annotations

import signal
import sys
from unittest.mock import patch

from dsrl_async.host.command import run_command


def call(name: str, *arguments: str, program: str = "/anywhere/__main__.py") -> int:
    """Returns the exit code. The signal handlers that a command sets are taken back; `program` is `sys.argv[0]`."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with patch.object(sys, "argv", [program, *arguments]):
            return run_command(name)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
>>>>>>> 4b5273f (Tests of the commands' frame, of their help and of the console scripts)
