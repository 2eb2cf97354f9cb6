"""Reads what a run and an evaluation have left in their directories."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dsrl_async import untrusted
from dsrl_async.config import strict_yaml
from dsrl_async.config.load import get_key, leaf_fields, read_run_settings, validate
from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.run.evaluation.files import RESULT
from dsrl_async.run.evaluation.files import evaluations as files_of_evaluations

MOST_POINTS = 400
"""Points of a curve; more than this a page cannot show."""
MOST_FILM_BYTES = 4 << 20
"""Films above this size are named, but not put into the page."""
LONGEST_LINE = 1 << 20
COUNTS = ("wall_s", "decisions", "env_steps", "updates")
FILM_TYPES = {".mp4": "video/mp4", ".gif": "image/gif"}


@dataclass
class RunRecord:
    """What is known of a run."""

    directory: Path
    settings: dict[str, Any]
    """The content of its `config.yaml`."""
    lines: list[dict[str, Any]]
    """Lines of `metrics.jsonl`, at most `MOST_POINTS`, evenly spread, the last one among them."""
    summary: dict[str, Any] | None
    """`summary.json`; None of a run that goes on or was killed."""
    made_with: dict[str, Any] | None
    profile: dict[str, Any] | None
    """`profile/report.json`; None without `--profile`."""
    evaluations: list[dict[str, float]]
    """Those during training: `decisions` and `wall_s` at the beginning, `success_rate`, `ci95_low`, `ci95_high`."""
    films: dict[str, str]
    """Name -> the film as a data URI."""
    notes: list[str] = field(default_factory=list)
    """What could not be shown, and why."""

    def __post_init__(self) -> None:
        self.name = self.directory.absolute().name
        """What the page calls it; `with_names` makes names different."""

    @property
    def figures(self) -> Mapping[str, Any]:
        """The summary, or what the last line says of a run that has none yet."""
        if self.summary is not None:
            return self.summary
        return self.lines[-1] if self.lines else {}

    def changed_settings(self) -> dict[str, Any]:
        """The settings that are not the defaults, by dotted key."""
        try:
            config, default = validate(dict(self.settings)), Config()
        except ConfigError as error:
            self.notes.append(f"{self.directory / 'config.yaml'}: {error}")
            return {}
        changed = {
            key: get_key(config, key) for key, _ in leaf_fields() if get_key(config, key) != get_key(default, key)
        }
        return {key: value for key, value in changed.items() if key not in ("run_dir", "resume")}


def read_run(directory: Path, films: int) -> RunRecord:
    """Read a run's directory, with up to so many films.

    Raises ConfigError if it is none. What is damaged in it is left out, with a note.
    """
    if not (directory / "config.yaml").is_file():
        raise ConfigError(f"{directory}: not a run directory, since it has no config.yaml")
    notes: list[str] = []

    def optional(name: str) -> dict[str, Any] | None:
        path = directory / name
        if not path.exists():
            return None
        try:
            return untrusted.read_object(path)
        except ValueError as error:
            notes.append(str(error))
            return None

    lines = read_lines(directory / "metrics.jsonl", notes)
    return RunRecord(
        directory,
        read_run_settings(directory),
        thinned(lines),
        optional("summary.json"),
        optional("made_with.json"),
        optional("profile/report.json"),
        list(read_evaluations(directory, notes)),
        dict(read_films(directory, films, notes)),
        notes,
    )


def with_names(runs: list[RunRecord]) -> list[RunRecord]:
    """The runs, of which those whose directories have the same name are called by their paths."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.directory)
    return runs


def read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that are whole and count, in order; what is not adds to `notes`."""
    if not path.exists():
        notes.append(f"{path.parent}: no metrics.jsonl, so there are no curves")
        return []
    found, damaged = [], 0
    try:
        with untrusted.open_regular(path) as file:
            while line := file.readline(LONGEST_LINE):
                try:
                    figures = untrusted.parse_json(line, str(path))
                    if all(isinstance(figures[name], int | float) for name in COUNTS):
                        found.append(figures)
                        continue
                except (ValueError, KeyError, TypeError):
                    pass
                damaged += line.endswith(b"\n")  # the last line may be about to be written
    except (ValueError, OSError) as error:
        notes.append(str(error))
    if damaged:
        notes.append(f"{path}: {damaged} lines cannot be read and are left out")
    return found


def thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `MOST_POINTS` of the lines, evenly spread, with the last one."""
    step = -(-len(lines) // MOST_POINTS) or 1
    return lines[::-1][::step][::-1]


def read_evaluations(directory: Path, notes: list[str]) -> Iterator[dict[str, float]]:
    """The finished evaluations during a run's training, see `RunRecord`; what is damaged adds to `notes`."""
    for files in files_of_evaluations(directory):
        if files.finished:
            try:
                result = files.result()
                figures = {name: float(result[name]) for name in ("success_rate", "ci95_low", "ci95_high")}
            except (ValueError, KeyError, TypeError) as error:
                notes.append(f"{files.directory / RESULT} is damaged: {untrusted.in_one_line(error)}")
            else:
                yield {"decisions": files.planned.decisions, "wall_s": files.planned.wall_s, **figures}


def read_films(directory: Path, most: int, notes: list[str]) -> Iterator[tuple[str, str]]:
    """Up to `most` films that lie in a run's directory, the newest first, as (name, data URI)."""
    paths = [
        path for path in directory.rglob("*") if path.suffix in FILM_TYPES and not path.parent.name.startswith(".")
    ]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)[:most]:
        try:
            content = untrusted.read_bytes(path, MOST_FILM_BYTES)
        except ValueError as error:
            notes.append(str(error))
            continue
        yield str(path.relative_to(directory)), as_data(content, FILM_TYPES[path.suffix])


def as_data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def read_evaluation(directory: Path) -> dict[str, Any]:
    """The result that `evaluate --out` wrote. Raises ConfigError if there is none, or it is damaged."""
    path = directory / "result.json"
    try:
        result = untrusted.read_object(path)
    except ValueError as error:
        raise ConfigError(f"--evaluation {directory}: {error}") from error
    missing = {"episodes", "successes", "success_rate", "ci95_low", "ci95_high", "policy", "tasks"} - result.keys()
    if missing:
        raise ConfigError(f"--evaluation {directory}: {path.name} lacks {', '.join(sorted(missing))}")
    return result | {"directory": str(directory)}


def as_yaml(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(strict_yaml.guess(dict(settings)), sort_keys=False)


def as_json(content: Any) -> str:
    return json.dumps(content, indent=2)
