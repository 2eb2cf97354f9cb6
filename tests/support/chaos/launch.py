"""One launch of the command on a run directory, and what must be true when it has ended."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.chaos import processes, saved
from support.chaos.board import Board
from support.chaos.processes import Found

HEARTBEAT_S = 5.0
LANES = 2
SETTINGS = [
    *("--device", "cpu", "--actors", str(LANES), "--log.console", "off", "--log.interval-s", "0.5"),
    *("--replay.warmup-decisions", "16", "--replay.capacity", "128"),
    *("--sac.batch-size", "16", "--sac.hidden-dims", "[16, 16]", "--sac.num-q-heads", "2"),
    *("--sac.conv-channels", "[4]", "--learner.publish-interval", "5"),
    *("--checkpoint.interval-minutes", "0.04", "--replay-ratio-tolerance", "0.2"),
]
"""A run that starts within seconds, and whose ring is overwritten every second."""
STOP_S = 16.0
"""Upper limit on a stop in which nobody is in trouble: the workers' and the models' grace, and the template's end."""
SILENCE_S = 40.0
"""What a learner may take longer that was hit: the grace of its last checkpoint, and a successor that writes it."""
LATE_S = 10.0
"""A hang: so long past a deadline."""
ENDED = re.compile(r"(\S+) ended \(([^)]*)\) after")
NAMES = re.compile(r"\b(inference|learner|template|actor-\d{3})\b")
WHOLE_JOB = "job"


@dataclass
class Hit:
    """A fault that befell a process of the launch, or the disk."""

    name: str
    what: str
    """The name of the signal, or of what was done to the disk."""
    time: float
    seconds: float = 0.0
    """How long it was stopped."""
    stopping: bool = False
    """Whether the launch was being ended already."""


@dataclass
class Launch:
    """`python -m dsrl_async.launch` under the harness's hook."""

    run_dir: Path
    scratch: Path
    """Where its output, its board and its temporary files are."""
    number: int
    variables: dict[str, str]
    arguments: list[str]
    hits: list[Hit] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    """The reasons that the signals sent to the supervisor may end the run with."""
    ending: float | None = None
    """By time.monotonic: when it was told to end."""

    def __post_init__(self) -> None:
        self.board = Board(self.scratch / "board")
        self.temporary = self.scratch / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self.stdout, self.stderr = self.scratch / f"out-{self.number}", self.scratch / f"err-{self.number}"
        self.log = self.run_dir / "logs" / "supervisor.log"
        self._log_start = self.log.stat().st_size if self.log.is_file() else 0
        self.resumed_at = saved.numbers(found[-1]) if (found := saved.checkpoints(self.run_dir)) else (0, 0)
        environment = os.environ | self.variables | {"TMPDIR": str(self.temporary)}
        with self.stdout.open("wb") as out, self.stderr.open("wb") as err:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "dsrl_async.launch", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                cwd=self.scratch,
                start_new_session=True,
            )
        self.began = time.monotonic()
        found_process = processes.find(self.popen.pid)
        assert found_process is not None
        self.supervisor = found_process
        self.ever_had_children = False

    @property
    def marker(self) -> str:
        return next(f"{name}={value}" for name, value in self.variables.items() if name.endswith("TOKEN"))

    def over(self) -> bool:
        return self.popen.poll() is not None

    def children(self) -> dict[str, Found]:
        named = processes.named_children(self.popen.pid)
        self.ever_had_children |= bool(named)
        return named

    def complete(self) -> bool:
        """Whether a process of each kind is there."""
        return len(self.children()) == 3 + LANES

    def progress(self) -> list[int]:
        """What must grow while the run goes on: decisions of each lane, rows drawn, and weights that have arrived."""
        return [*(self.board.decisions(lane) for lane in range(LANES)), self.board["rows"], self.board["weights"]]

    def hit(self, name: str, what: str, seconds: float = 0.0) -> None:
        self.hits.append(Hit(name, what, time.monotonic(), seconds, self.ending is not None))

    def tell_to_end(self) -> None:
        self.ending = self.ending or time.monotonic()

    # ---- the end

    def deadline(self) -> float:
        """By time.monotonic, when a launch that was told to end must have ended; a hang is `LATE_S` later."""
        assert self.ending is not None
        troubled = any(hit.time > self.ending - 30 for hit in self.hits)
        return self.ending + STOP_S + (SILENCE_S if troubled else 0.0) + self.frozen_s()

    def frozen_s(self) -> float:
        """How long the supervisor itself was stopped since it was told to end."""
        return sum(hit.seconds for hit in self.hits if hit.stopping and hit.name in ("supervisor", WHOLE_JOB))

    def events(self) -> list[tuple[str, str]]:
        """Names of processes that ended according to the log, and how."""
        try:
            with self.log.open("rb") as file:
                file.seek(self._log_start)
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        return ENDED.findall(text)

    def gave_up_at(self) -> float | None:
        """By time.monotonic, when the supervisor began to stop by itself."""
        with contextlib.suppress(OSError):
            lines = self.log.read_bytes()[self._log_start :].decode(errors="replace").splitlines()
            for line in lines:
                if " stopping: " in line:
                    told = time.mktime(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S"))
                    return time.monotonic() - (time.time() - told)
        return None

    def summary(self) -> dict[str, Any] | None:
        """The JSON object on stdout."""
        lines = self.stdout.read_text().splitlines()
        with contextlib.suppress(ValueError, IndexError):
            found = json.loads(lines[-1])
            return found if isinstance(found, dict) else None
        return None

    def disturbed(self, *what: str) -> bool:
        return any(hit.what in what for hit in self.hits)

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong with the way it ended: kinds of finding and sentences. It has ended."""
        code, summary, stderr = self.popen.returncode, self.summary(), self.stderr.read_text(errors="replace")
        found = []
        disk = self.disturbed("disk full", "deleted")
        if self.disturbed("SIGINT") and "init_import_site" in stderr:
            return []  # Python itself had not got to the command yet
        if "Traceback" in stderr:
            found.append(("traceback", stderr[-600:]))
        killed = any(hit.name == "supervisor" and hit.what in ("SIGKILL", "SIGSEGV") for hit in self.hits)
        if killed and code in (-signal.SIGKILL, -signal.SIGSEGV):
            return found + self._wrong_events()
        if code < 0 and not self.ever_had_children and self.disturbed(signal.Signals(-code).name):
            return found  # it met the signal before it could know what to do
        if code == 130 and not self.ever_had_children and self.disturbed("SIGINT"):
            return found
        if code not in (0, 1):
            found.append(("exit code", f"exit code {code}: {stderr[-400:]}"))
            return found
        if summary is None or len(self.stdout.read_text().splitlines()) != 1:
            found.append(("no JSON line", f"stdout: {self.stdout.read_text()[-300:]!r}, stderr: {stderr[-300:]!r}"))
            return found
        reason = str(summary.get("exit_reason"))
        if (code == 1) != reason.startswith("failed"):
            found.append(("exit code", f"exit code {code} with the reason {reason!r}"))
        try:
            if json.loads((self.run_dir / "summary.json").read_text()) != summary and not disk:
                found.append(("summary", "summary.json is not what stdout says"))
        except (OSError, ValueError) as error:
            if not disk:
                found.append(("summary", f"summary.json: {error}"))
        found += self._wrong_reason(reason, disk) + self._wrong_events()
        if code == 0 and not disk:
            found += self._wrong_checkpoint(summary)
        return found

    def _wrong_reason(self, reason: str, disk: bool) -> list[tuple[str, str]]:
        if not reason.startswith("failed"):
            return [] if reason in self.asked else [("false report", f"ended with {reason!r}, not {self.asked}")]
        hit = {hit.name for hit in self.hits}
        words = self._without_paths(reason)
        named = set(NAMES.findall(words)) - hit
        if named and not disk:
            return [("false report", f"{reason!r} names {sorted(named)}; hit were {sorted(hit)}")]
        if not hit:
            return [("false report", f"{reason!r} although nobody was hit")]
        if "ended 3 times" in words and (names := NAMES.findall(words)):
            hits = sum(hit.name == names[0] for hit in self.hits)
            if hits < 3 and not disk:
                return [("false report", f"{reason!r}, but {names[0]} was hit {hits} times")]
        return []

    @staticmethod
    def _without_paths(text: str) -> str:
        return re.sub(r"/\S+", "", text)

    def _wrong_events(self) -> list[tuple[str, str]]:
        """Ends that the log tells of processes that were not hit so."""
        if self.disturbed("deleted"):
            return []  # there is no log
        found, told = [], Counter(self.events())
        for (name, how), count in told.items():
            if signals := re.match(r"killed by (SIG\w+)", how):
                hits = sum(hit.name == name and hit.what == signals[1] for hit in self.hits)
            elif how.startswith("no sign of life"):
                hits = sum(hit.name == name and hit.what == "SIGSTOP" and hit.seconds > 3 for hit in self.hits)
            else:  # it ended by itself: the template when its worker was lost, and whoever cannot write
                hits = sum(hit.name == name or hit.what == "disk full" for hit in self.hits)
            if hits < (1 if how.startswith("no sign") else count):
                kind = "crash" if how.startswith("exit code") else "false report"
                found.append((kind, f"the log says {count} times that {name} ended ({how}); hits: {hits}"))
        names = {name for name, _ in told}
        for hit in self.hits:
            deadly = hit.what in ("SIGKILL", "SIGSEGV") and hit.name not in ("supervisor", WHOLE_JOB)
            early = hit.time < (self.ending or self.gave_up_at() or math.inf) - 1.0
            if deadly and early and hit.name not in names and hit.name not in str(self.summary()):
                found.append(("false report", f"the log does not say that {hit.name} ended ({hit.what})"))
        return found

    def _wrong_checkpoint(self, summary: dict[str, Any]) -> list[tuple[str, str]]:
        """The last checkpoint of a run that ended as asked holds all that was done, and nothing else is left."""
        found = []
        names = saved.checkpoints(self.run_dir)
        done = int(summary["updates"]), int(summary["decisions"])
        if not names or saved.numbers(names[-1]) != done:
            found.append(("checkpoint", f"the last one is {[path.name for path in names[-1:]]}, done were {done}"))
        if any(now < then for now, then in zip(done, self.resumed_at, strict=True)):
            found.append(("checkpoint", f"done were {done} after it was resumed at {self.resumed_at}"))
        root = self.run_dir / "checkpoints"
        others = [path.name for path in root.iterdir() if path not in names]
        if others:
            found.append(("left behind", f"in checkpoints: {others}"))
        if left := [path.name for path in self.temporary.iterdir()]:
            found.append(("left behind", f"in the temporary directory: {left}"))
        return found
