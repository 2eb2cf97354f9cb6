"""Chooses which episodes of an evaluation are filmed, and which films are kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from dsrl_async.config.settings import ConfigError
from dsrl_async.envs.recording import unsorted_film, why_no_films
from dsrl_async.evaluate.results import Outcome

FILMED_PER_VIDEO = 4
"""Upper limit on the episodes that are filmed for each film that is kept, in search of successes and failures."""


def check_films(videos: int) -> None:
    """Raises ConfigError if no films can be made here, or if `videos`, the number asked for, is not positive."""
    if videos < 1:
        raise ConfigError(f"--videos: {videos} films are none; leave out --video instead")
    if (reason := why_no_films()) is not None:
        raise ConfigError(f"--video: {reason}")


class Filming(Protocol):
    """Says which episodes are to be filmed, and where."""

    directory: Path

    def wanted(self, number: int) -> bool:
        """Say whether to film an episode."""

    def add(self, number: int, success: bool) -> None:
        """Note that an episode was filmed."""


class Films:
    """Chooses which episodes of an evaluation are filmed and which films are kept: some successes and some failures.

    `numbers` lists the episodes, those first whose films are preferred. Only the first ones are filmed, and only until
    there are enough films of both kinds, since filming renders every step.

    Raises ConfigError if nothing can be written to `directory`.
    """

    def __init__(self, directory: Path, videos: int, numbers: Sequence[int]) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--video: cannot write to {directory}: {error.strerror}") from error
        if not os.access(directory, os.W_OK):
            raise ConfigError(f"--video: cannot write to {directory}")
        self.directory, self._videos = directory, videos
        self._candidates = numbers[: FILMED_PER_VIDEO * videos]
        self._filmed: dict[int, bool] = {}

    def resume(self, outcomes: Mapping[int, Outcome]) -> None:
        """Find the films of episodes that were played before; if there are no such episodes, remove all films."""
        if not outcomes:
            self._forget()
        for number, outcome in outcomes.items():
            if unsorted_film(self.directory, number).is_file():
                self.add(number, outcome.success)

    def wanted(self, number: int) -> bool:
        """Say whether to film an episode."""
        successes = sum(self._filmed.values())
        failures = len(self._filmed) - successes
        wanted_failures = self._videos // 2
        enough = successes >= self._videos - wanted_failures and failures >= wanted_failures
        return number in self._candidates and not enough

    def plan(self, numbers: Iterable[int]) -> str:
        """What is going to be filmed of the episodes that are still to be played, in a line; empty if nothing."""
        if not (most := sum(map(self.wanted, numbers))):
            return ""
        return (
            f"films: up to {most} episodes are filmed, each of which takes longer, to keep {self._videos}, "
            f"{self._videos // 2} of them failures if there are so many"
        )

    def add(self, number: int, success: bool) -> None:
        """Note that an episode was filmed."""
        self._filmed[number] = success

    def keep(self, outcomes: Mapping[int, Outcome]) -> None:
        """Name the best choice of films after their outcomes, and remove the others."""
        filmed = {number: self._filmed[number] for number in self._candidates if number in self._filmed}
        for number in choose_films(filmed, self._videos):
            unsorted_film(self.directory, number).replace(self.directory / film_name(outcomes[number]))
        self._forget()

    def _forget(self) -> None:
        shutil.rmtree(self.directory / ".unsorted", ignore_errors=True)


def film_name(outcome: Outcome) -> str:
    scene = "" if outcome.init_state is None else f"task-{outcome.task}-init-{outcome.init_state}-"
    return f"episode-{outcome.number:04d}-{scene}{'success' if outcome.success else 'failure'}.mp4"


def choose_films(filmed: Mapping[int, bool], videos: int) -> list[int]:
    """Choose at most `videos` of the filmed episodes, given their success: the first ones of each kind.

    Half of them are failures; where there are too few of one kind, there are more of the other.
    """
    successes = [number for number, success in filmed.items() if success]
    failures = [number for number, success in filmed.items() if not success]
    kept_failures = failures[: max(videos // 2, videos - len(successes))]
    return successes[: videos - len(kept_failures)] + kept_failures
