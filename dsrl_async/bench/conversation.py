"""A measured system in a process of its own, which answers requests: JSON lines over stdin and stdout.

This module needs only the standard library: published implementations, in environments of their own, use it too.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any


class SystemProcess:
    """The process of a system, started with `settings` as its last argument. At the end of a `with` it ends as well."""

    def __init__(self, system: str, command: Sequence[str], settings: dict[str, Any], quiet: bool = False) -> None:
        """`quiet` discards what the process writes to stderr."""
        self.system = system
        self._process = subprocess.Popen(
            [*command, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            text=True,
        )
        self.pid = self._process.pid

    def __enter__(self) -> SystemProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer. Raises ValueError if the process ends instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise ValueError(f"the process of {self.system} ended with status {code}; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        """Make a request and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self.answer()


def answer_on_stdout() -> Callable[..., None]:
    """In the process: returns the function that writes an answer. Whatever libraries print goes to stderr instead."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    return answer
