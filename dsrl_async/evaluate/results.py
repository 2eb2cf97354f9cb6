"""Outcomes of episodes, their summary as JSON and as a table, and the directory that keeps them."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from dsrl_async.config.load import leaf_fields
from dsrl_async.config.settings import ConfigError
from dsrl_async.evaluate.resolve import SETTINGS, Evaluation
from dsrl_async.host.files import open_to_append, temporary_path, write_text
from dsrl_async.run.evaluation.results import count_successes

BEFORE_SETTINGS = ("episodes.jsonl", temporary_path(Path("settings.json")).name)
"""Files that an evaluation leaves which is killed just after its start."""


class Outcome(NamedTuple):
    """A finished episode: a line of `episodes.jsonl`."""

    number: int
    task: int
    init_state: int | None
    seed: int
    """The seed of scene and noise, which follows from the evaluation's seed and `number`."""
    success: bool
    steps: int
    """Environment steps."""
    wall_s: float
    """Seconds from the moment when a worker was given the episode to its end."""


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Count episodes and successes; add the success rate, its interval, and the mean length in environment steps."""
    counted = count_successes([outcome.success for outcome in outcomes])
    return {
        **{name: round(value, 4) for name, value in counted.items()},
        "mean_episode_len": round(sum(outcome.steps for outcome in outcomes) / len(outcomes), 2),
    }


def summarise_tasks(outcomes: Iterable[Outcome], instructions: Sequence[str]) -> list[dict[str, Any]]:
    """Return the summary of every task that was played, in the order of their numbers."""
    of_task: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        of_task.setdefault(outcome.task, []).append(outcome)
    return [{"task": task, "instruction": instructions[task], **summarise(of_task[task])} for task in sorted(of_task)]


def result_of(
    evaluation: Evaluation, identity: Mapping[str, Any], outcomes: Mapping[int, Outcome], wall_s: float
) -> dict[str, Any]:
    """Return what the command prints as JSON, given the outcomes of all episodes by number.

    `identity` is what `resolve.identity` returned, `wall_s` the seconds that the evaluation took.
    """
    played = [outcomes[episode.number] for episode in evaluation.episodes]
    return {
        **summarise(played),
        "policy": "base" if evaluation.checkpoint is None else str(evaluation.checkpoint),
        "noise": evaluation.mode,
        "seed": evaluation.config.seed,
        "tasks": summarise_tasks(played, evaluation.run.spec.prompts),
        "versions": identity["versions"],
        "settings": {key: value for key, value in identity.items() if key != "versions"},
        "wall_s": round(wall_s, 2),
    }


def table(result: Mapping[str, Any]) -> Table:
    """Return the result by task, for people."""
    shown = Table("task", "instruction")
    for heading in ("successes", "success rate", "95 % interval", "mean steps"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for summary in result["tasks"]:
        shown.add_row(str(summary["task"]), summary["instruction"], *_cells(summary))
    shown.add_section()
    shown.add_row("all", "", *_cells(result))
    return shown


def comparison(suites: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the results of several suites or policies, for people.

    `suites` has for each suite the results of the policies that played it, the same for all, each as from `result_of`.
    """
    policies = list(next(iter(suites.values())))
    shown = Table("suite")
    for policy in policies:
        for heading in (policy, "success rate", "95 % interval"):
            shown.add_column(heading, justify="right", no_wrap=True)
    for suite, results in suites.items():
        shown.add_row(suite, *(cell for policy in policies for cell in _cells(results[policy])[:3]))
    return shown


def _cells(summary: Mapping[str, Any]) -> list[str]:
    return [
        f"{summary['successes']}/{summary['episodes']}",
        f"{summary['success_rate']:.1%}",
        f"{summary['ci95_low']:.1%} to {summary['ci95_high']:.1%}",
        f"{summary['mean_episode_len']:.1f}",
    ]


def write_result(directory: Path, result: Mapping[str, Any]) -> None:
    """Write `result.json`."""
    write_text(directory / "result.json", _json(result))


def check_parent(directory: Path) -> None:
    """Raise ConfigError if a directory, in which several evaluations have theirs, holds one itself."""
    if os.path.lexists(directory / "settings.json"):
        raise ConfigError(f"--out {directory}: it holds the evaluation of one suite; choose another one for several")


class ResultDirectory:
    """The directory of an evaluation, which can be interrupted and continued; it is locked while it is open.

        settings.json      what is evaluated; another evaluation is refused
        episodes.jsonl     an `Outcome` for each finished episode, in the order in which they finished
        result.json        the result, written when all episodes are finished

    `outcomes` holds all finished episodes by number, those of earlier attempts included.

    Raises ConfigError with one sentence if the directory cannot be written or read, is in use, or holds something else.
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
            self._file = os.fdopen(open_to_append(directory / "episodes.jsonl"), "a+b")
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
        write_result(self.directory, result)

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
        # An earlier version may lack settings that there are now, or have had others and noted other packages.
        defaults = {key: field.default for key, field in leaf_fields()}
        before = {key: default for key, default in defaults.items() if key in now} | before
        gone = {key for key in before if key.startswith(("versions.", *SETTINGS)) and key not in now | defaults}
        for key in [*now, *(key for key in before if key not in gone)]:
            if now.get(key) != before.get(key):
                raise ConfigError(
                    f"--out {self.directory}: it was begun with {key} {_shown(before.get(key))}, which is now "
                    f"{_shown(now.get(key))}; give the same settings, or another directory"
                )

    def _read(self) -> None:
        """Take over the finished episodes; drop a last line that was not written to its end."""
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
