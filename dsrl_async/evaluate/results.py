"""What came of an evaluation: outcomes of episodes, their summary as JSON and as a table, and the directory they are
kept in."""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from dsrl_async import __version__
from dsrl_async.config.settings import ConfigError
from dsrl_async.host.files import temporary_path, write_text

DIGEST_BYTES = 2 << 30
"""Weights up to this size are identified by a digest, larger ones by their size and date."""

BEFORE_SETTINGS = ("episodes.jsonl", temporary_path(Path("settings.json")).name)
"""Files of an evaluation that was killed as it began."""


class Outcome(NamedTuple):
    """A finished episode: a line of `episodes.jsonl`."""

    number: int
    task: int
    init_state: int | None
    seed: int
    """Of scene and noise; follows from the evaluation's seed and the number."""
    success: bool
    steps: int
    wall_s: float


def wilson_interval(successes: int, episodes: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a success rate (Wilson score; sensible also at 0 % and 100 %)."""
    rate = successes / episodes
    centre = (rate + z * z / (2 * episodes)) / (1 + z * z / episodes)
    half = z / (1 + z * z / episodes) * (rate * (1 - rate) / episodes + z * z / (4 * episodes**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Episodes, successes, their rate with its interval, and the mean length in environment steps."""
    episodes, successes = len(outcomes), sum(outcome.success for outcome in outcomes)
    low, high = wilson_interval(successes, episodes)
    return {
        "episodes": episodes,
        "successes": successes,
        "success_rate": round(successes / episodes, 4),
        "ci95_low": round(low, 4),
        "ci95_high": round(high, 4),
        "mean_episode_len": round(sum(outcome.steps for outcome in outcomes) / episodes, 2),
    }


def summarise_tasks(outcomes: Iterable[Outcome], instructions: Sequence[str]) -> list[dict[str, Any]]:
    """The summary of every task that was played."""
    of_task: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        of_task.setdefault(outcome.task, []).append(outcome)
    return [{"task": task, "instruction": instructions[task], **summarise(of_task[task])} for task in sorted(of_task)]


def table(result: Mapping[str, Any]) -> Table:
    """The result by task, for people."""
    shown = Table("task", "instruction")
    for heading in ("successes", "success rate", "95 % interval", "mean steps"):
        shown.add_column(heading, justify="right", no_wrap=True)

    def figures(summary: Mapping[str, Any]) -> list[str]:
        return [
            f"{summary['successes']}/{summary['episodes']}",
            f"{summary['success_rate']:.1%}",
            f"{summary['ci95_low']:.1%} to {summary['ci95_high']:.1%}",
            f"{summary['mean_episode_len']:.1f}",
        ]

    for summary in result["tasks"]:
        shown.add_row(str(summary["task"]), summary["instruction"], *figures(summary))
    shown.add_section()
    shown.add_row("all", "", *figures(result))
    return shown


def versions(simulator: Mapping[str, str]) -> dict[str, str]:
    """Of everything that success rates may depend on."""
    libraries = {name: version(name) for name in ("torch", "numpy")}
    return {"dsrl_async": __version__, "python": platform.python_version(), **libraries, **simulator}


def identify_files(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Name and size of files, with their SHA-256, or where they are large together with the time of their change."""
    digest = sum(file.stat().st_size for file in files) <= DIGEST_BYTES
    found = []
    for file in files:
        status = file.stat()
        entry: dict[str, Any] = {"file": file.name, "bytes": status.st_size}
        if digest:
            with file.open("rb") as opened:
                entry["sha256"] = hashlib.file_digest(opened, "sha256").hexdigest()
        else:
            entry["modified"] = datetime.fromtimestamp(status.st_mtime, UTC).isoformat(timespec="seconds")
        found.append(entry)
    return found


class ResultDirectory:
    """The directory of an evaluation, which can be interrupted and continued; locked while it is open.

        settings.json      what is evaluated; another evaluation is refused
        episodes.jsonl     an `Outcome` for each finished episode, in the order in which they finished
        result.json        when all are finished

    `outcomes` holds, by number, what was finished before and since.

    Raises ConfigError with one sentence: the directory cannot be written or read, is in use, or belongs to something
    else.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory = directory
        self.outcomes: dict[int, Outcome] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            settings_file = directory / "settings.json"
            if not settings_file.is_file() and any(path.name not in BEFORE_SETTINGS for path in directory.iterdir()):
                raise ConfigError(f"--out {directory}: it is not empty and holds no evaluation; choose another one")
            # Opened first: it is the lock.
            self._file = (directory / "episodes.jsonl").open("a+b")
            try:
                self._lock()
                if settings_file.is_file():
                    self._check(settings)
                    self._read()
                else:
                    write_text(settings_file, _json(settings))
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise ConfigError(f"--out: cannot write to {directory}: {error.strerror}") from error

    def add(self, outcome: Outcome) -> None:
        self.outcomes[outcome.number] = outcome
        self._file.write(json.dumps(outcome._asdict()).encode() + b"\n")
        self._file.flush()

    def finish(self, result: Mapping[str, Any]) -> None:
        write_text(self.directory / "result.json", _json(result))

    def close(self) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--out {self.directory}: another evaluation is writing to it") from error
        except OSError:
            pass  # this file system has no locks

    def _check(self, settings: Mapping[str, Any]) -> None:
        path = self.directory / "settings.json"
        try:
            before = _flat(json.loads(path.read_text()))
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"--out {self.directory}: {path.name} is damaged; choose another directory") from error
        now = _flat(json.loads(json.dumps(settings)))
        for key in [*now, *before]:
            if now.get(key) != before.get(key):
                raise ConfigError(
                    f"--out {self.directory}: it was begun with {key} {_shown(before.get(key))}, which is now "
                    f"{_shown(now.get(key))}; give the same settings, or another directory"
                )

    def _read(self) -> None:
        """Take over the finished episodes; a last line that was not written to its end is dropped."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                outcome = Outcome(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ConfigError(
                    f"--out {self.directory}: line {number} of episodes.jsonl is damaged; remove the line"
                ) from error
            self.outcomes[outcome.number] = outcome
        self._file.truncate(len(whole))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _shown(value: Any) -> str:
    text = json.dumps(value).strip('"')
    return text if len(text) <= 60 else f"{text[:57]}..."
