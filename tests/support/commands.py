"""Call a command in the test's own process, which spares the start of another."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from dsrl_async.host.command import run_command


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


def call(name: str, *arguments: str) -> Done:
    """`python -m dsrl_async.NAME arguments`; puts back what it sets: log handlers, the number of threads."""
    threads = torch.get_num_threads()
    root, stdout, stderr = logging.getLogger(), io.StringIO(), io.StringIO()
    log_handlers, level = list(root.handlers), root.level
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = run_with_arguments(name, *arguments)
    finally:
        root.handlers[:] = log_handlers
        root.setLevel(level)
        torch.set_num_threads(threads)
    return Done(code, stdout.getvalue(), stderr.getvalue())


def run_with_arguments(name: str, *arguments: str) -> int:
    """The exit code, also where argparse ends the process."""
    with patch.object(sys, "argv", [f"dsrl_async/{name}/__main__.py", *arguments]):
        try:
            return run_command(name)
        except SystemExit as end:
            return int(end.code or 0)
