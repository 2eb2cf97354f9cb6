"""The process of a group that plays episodes of an evaluation: `python -m dsrl_async.evaluate.member`.

It reads its job from stdin, and which episodes to play from a file that grows, and writes what comes of them to another
one, see `Lines`. It loses nothing when it is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dsrl_async.config.load import validate
from dsrl_async.evaluate.fan_out import NEWS, READY
from dsrl_async.evaluate.lines import Lines
from dsrl_async.evaluate.play import play
from dsrl_async.evaluate.resolve import Evaluation, with_small_ring
from dsrl_async.groups.placing import TOLD
from dsrl_async.host import logs, processes
from dsrl_async.host.waiting import Say
from dsrl_async.run import preflight
from dsrl_async.run.evaluation.episodes import Episode

LISTEN_S = 0.02
"""Seconds between two looks at what it is told, which batches of decisions do not wait for."""


class ToldFilms:
    """Films of the episodes that a group is told to film: see `films.Filming`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.told: set[int] = set()

    def wanted(self, number: int) -> bool:
        return number in self.told

    def add(self, number: int, success: bool) -> None:
        """The one who has told the group to film keeps the account."""


class Member:
    """What a group is told, and what it tells."""

    def __init__(self, job: dict[str, Any]) -> None:
        run_dir = Path(job["run_dir"])
        self._told, self._news = Lines(run_dir / TOLD), (run_dir / NEWS).open("a", buffering=1)
        self.films = None if job["films"] is None else ToldFilms(Path(job["films"]))
        self._ready, self._listened = False, 0.0

    def say(self, news: dict[str, Any]) -> None:
        print(json.dumps(news), file=self._news)

    @contextlib.contextmanager
    def wait(self, what: str) -> Iterator[Say]:
        self.say({"doing": what})
        yield lambda words: self.say({"doing": words})

    def more(self) -> Sequence[Episode]:
        """The episodes that the group has been given since the last call."""
        if not self._ready:
            self._ready = True
            self.say({"doing": READY})
        if time.monotonic() < self._listened + LISTEN_S:
            return []
        self._listened = time.monotonic()
        found = []
        for entry in self._told.new():
            found += [Episode(*episode) for episode in entry["episodes"]]
            if self.films is not None:
                self.films.told.update(entry["film"])
        return found


def main() -> int:
    job = json.load(sys.stdin)
    processes.prepare_child(os.getppid())
    processes.name_process("evaluation", f"evaluation, group {job['group']}")
    processes.be_killed_like_others()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # its workers are tied to it
    tempfile.tempdir = job["run_dir"]  # whose files are removed by the one who has started it
    logs.set_up()
    try:
        config = validate(job["config"])
        run = preflight.check_run(with_small_ring(config), config, learning=False)
        checkpoint = None if job["checkpoint"] is None else Path(job["checkpoint"])
        evaluation = Evaluation(run, checkpoint, job["mode"], [])
        member = Member(job)
        preflight.check_devices(run.config, ["device"])
        for outcome in play(evaluation, [], member.films, lambda: None, member.wait, member.more, job["begin_with"]):
            member.say(outcome._asdict())
    except (ValueError, OSError, RuntimeError) as error:
        print(str(error) or type(error).__name__, file=sys.stderr)
        return processes.FATAL if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
