"""What the evaluations of a run leave in its directory.

    <run>/evaluation/
      00001650/                     an evaluation, named by the decisions at its beginning
        evaluation.json             what is played
        snapshot/                   the agent at its beginning, a checkpoint without replay buffer, until it is finished
        episodes.jsonl              a line for each finished episode
        result.json                 the result, when all are finished
        episode-0003-success.mp4    films of the first few
    <run>/best/
      00001234-00001650/            the snapshot of the best evaluation, named as a checkpoint is
        agent.safetensors
        state.json                  as in a checkpoint, with the result as `evaluation`

Neither directory is a checkpoint that a run goes on from.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsrl_async.host.files import remove, replacing, write_text
from dsrl_async.run import checkpoints
from dsrl_async.untrusted import open_regular, read_json

NAME = re.compile(r"[0-9]{8,}")
RESULT, EPISODES, PLANNED = "result.json", "episodes.jsonl", "evaluation.json"


class Planned(BaseModel):
    """What an evaluation plays, the contents of `evaluation.json`."""

    model_config = ConfigDict(strict=True)

    policy: str
    """`base`, or `agent` for the snapshot."""
    noise: str
    """`base`, `stochastic` or `deterministic`."""
    seed: int
    numbers: list[int]
    """Those of the episodes, see `episodes.Episode`."""
    decisions: int = Field(ge=0)
    env_steps: int = Field(ge=0)
    wall_s: float = Field(ge=0)


class Played(BaseModel):
    """A finished episode, a line of `episodes.jsonl`."""

    model_config = ConfigDict(strict=True)

    number: int
    task: int
    """The task's number in its suite, or the prompt's."""
    success: bool
    episode_return: float
    steps: int
    """Environment steps."""


class EvaluationFiles:
    """The directory of one evaluation. The methods that write raise OSError if they cannot."""

    def __init__(self, directory: Path, planned: Planned) -> None:
        self.directory, self.planned = directory, planned

    @classmethod
    def begin(cls, run_dir: Path, planned: Planned) -> EvaluationFiles:
        """Make the directory of a new evaluation; what an earlier attempt left there is removed."""
        directory = evaluation_root(run_dir) / f"{planned.decisions:08d}"
        remove(directory)
        directory.mkdir(parents=True)
        write_text(directory / PLANNED, planned.model_dump_json() + "\n")
        return cls(directory, planned)

    @classmethod
    def read(cls, directory: Path) -> EvaluationFiles:
        """Take up one that was begun; raises ValueError if what it says cannot be used."""
        path = directory / PLANNED
        try:
            return cls(directory, Planned.model_validate(read_json(path)))
        except ValidationError as error:
            raise ValueError(f"{path} is damaged: {error.errors()[0]['msg']}") from error

    @property
    def snapshot(self) -> Path:
        return self.directory / "snapshot"

    @property
    def finished(self) -> bool:
        return (self.directory / RESULT).is_file()

    def add(self, played: Played) -> None:
        with (self.directory / EPISODES).open("a") as file:
            file.write(played.model_dump_json() + "\n")

    def played(self) -> dict[int, Played]:
        """The episodes that were finished, by number; a line that was not written to its end is left out."""
        path, found = self.directory / EPISODES, {}
        if path.is_file():
            with open_regular(path) as file:
                for line in file.read().splitlines():
                    with contextlib.suppress(ValidationError):
                        played = Played.model_validate_json(line)
                        found[played.number] = played
        return {number: found[number] for number in self.planned.numbers if number in found}

    def finish(self, result: Mapping[str, Any]) -> None:
        write_text(self.directory / RESULT, json.dumps(result, indent=2) + "\n")

    def result(self) -> dict[str, Any]:
        """What `finish` wrote; raises ValueError if it cannot be used."""
        result: dict[str, Any] = read_json(self.directory / RESULT)
        return result

    def drop_snapshot(self) -> None:
        with contextlib.suppress(OSError):
            remove(self.snapshot)


def evaluation_root(run_dir: Path) -> Path:
    return run_dir / "evaluation"


def snapshot_agent(run_dir: Path, decisions: int) -> Path:
    """The safetensors file in `snapshot_of`."""
    return snapshot_of(run_dir, decisions) / checkpoints.AGENT


def snapshot_of(run_dir: Path, decisions: int) -> Path:
    """Where the learner writes its agent for the evaluation that begins at so many decisions."""
    return evaluation_root(run_dir) / f"{decisions:08d}" / "snapshot"


def evaluations(run_dir: Path) -> list[EvaluationFiles]:
    """The evaluations of a run, oldest first; what cannot be read is none."""
    found = []
    for directory in _named(evaluation_root(run_dir), NAME):
        with contextlib.suppress(ValueError):
            found.append(EvaluationFiles.read(directory))
    return sorted(found, key=lambda files: files.planned.decisions)


def take_back(run_dir: Path, decisions: int, keep_in: Path | None) -> None:
    """Remove the evaluations that began after so many decisions, or move them into `keep_in`, if that is given."""
    for files in evaluations(run_dir):
        if files.planned.decisions > decisions:
            if keep_in is None:
                shutil.rmtree(files.directory)
            else:
                (keep_in / "evaluation").mkdir(parents=True, exist_ok=True)
                files.directory.rename(keep_in / "evaluation" / files.directory.name)


def keep_best(run_dir: Path, snapshot: Path, result: Mapping[str, Any]) -> Path:
    """Make a snapshot the run's best checkpoint; the one before goes when this one is whole. Raises OSError."""
    state = checkpoints.read_state(snapshot) | {"evaluation": dict(result)}
    root = run_dir / "best"
    root.mkdir(exist_ok=True)
    place = root / checkpoints.name_of(state)
    with replacing(place) as temporary:
        temporary.mkdir()
        shutil.copyfile(snapshot / checkpoints.AGENT, temporary / checkpoints.AGENT)
        checkpoints.write_state(temporary, state)
        checkpoints.check(temporary)  # what is kept is what was evaluated
    for other in _named(root, checkpoints.NAME):
        if other != place:
            with contextlib.suppress(OSError):
                remove(other)
    return place


def find_best(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The best checkpoint of a run and its evaluation's result, or None.

    There may be two, where a process was killed before it could remove the one that was replaced.
    """
    found = []
    for directory in _named(run_dir / "best", checkpoints.NAME):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            result = checkpoints.read_state(directory)["evaluation"]
            found.append((rank(result), -int(result["decisions"]), directory, result))
    return max(found, key=lambda entry: entry[:2])[2:] if found else None


def rank(result: Mapping[str, Any]) -> tuple[float, float]:
    """What makes an evaluation better than another: its success rate, and at equal rates its return."""
    return float(result["success_rate"]), float(result["return"])


def _named(root: Path, pattern: re.Pattern[str]) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from [path for path in sorted(root.iterdir()) if pattern.fullmatch(path.name) and path.is_dir()]
