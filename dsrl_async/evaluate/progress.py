"""Shows the progress of an evaluation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dsrl_async.evaluate.resolve import Evaluation
from dsrl_async.evaluate.results import Outcome
from dsrl_async.host.waiting import Say, waiting

PLAIN_INTERVAL_S = 60.0
"""Seconds between two lines about the progress, where stderr is not a terminal."""


class ProgressBar:
    """Shows the progress on stderr: a bar on a terminal, elsewhere a line now and then.

    It begins with the first `update` outside of `wait`.

    `outcomes` are those of the finished episodes, by number; who plays the evaluation adds to them.
    """

    def __init__(self, evaluation: Evaluation, outcomes: dict[int, Outcome], console: Console) -> None:
        self._name = "base policy" if evaluation.mode == "base" else "steered policy"
        self._total = len(evaluation.episodes)
        self._outcomes, self._console = outcomes, console
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._next_line = time.monotonic() + PLAIN_INTERVAL_S
        self._waiting = False

    def __enter__(self) -> ProgressBar:
        self._bar = self._progress.add_task(self._name, total=self._total)
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    @contextlib.contextmanager
    def wait(self, what: str) -> Iterator[Say]:
        """Say what is being done inside of the `with`, before episodes are played."""
        self._waiting = True
        try:
            with waiting(f"{self._name}: {what}", self._console) as say:
                yield lambda words: say(f"{self._name}: {words}")
        finally:
            self._waiting = False

    def update(self) -> None:
        if self._waiting:
            return
        self._progress.start()  # which does nothing if it has been
        done = len(self._outcomes)
        rate = f", success {sum(outcome.success for outcome in self._outcomes.values()) / done:.1%}" if done else ""
        self._progress.update(self._bar, completed=done, description=f"{self._name}{rate}")
        if not self._console.is_terminal and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_INTERVAL_S
            self._console.print(f"{self._name}: {done} of {self._total} episodes{rate}")
