"""Chooses which episodes of an evaluation are filmed, and which films are kept."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsrl_async.envs.recording import unsorted_film

FILMED_PER_VIDEO = 4
"""How many episodes are filmed at most for each film that is kept, in search of successes and failures."""


class Films:
    """Which episodes of an evaluation are filmed, and which films are kept: some successes and some failures.

    `numbers` are the episodes in the order in which films of them are preferred. Only the first of them are filmed, and
    only until there are enough of both kinds, since filming renders every step.
    """

    def __init__(self, directory: Path, videos: int, numbers: Sequence[int]) -> None:
        self.directory, self._videos = directory, videos
        self._candidates = numbers[: FILMED_PER_VIDEO * videos]
        self._filmed: dict[int, bool] = {}

    def resume(self, successes: Mapping[int, bool]) -> None:
        """Find the films of episodes that were played before, given their success; forget any others."""
        if not successes:
            self._forget()
        for number, success in successes.items():
            if unsorted_film(self.directory, number).is_file():
                self.add(number, success)

    def wanted(self, number: int) -> bool:
        """Whether to film an episode."""
        successes = sum(self._filmed.values())
        failures = len(self._filmed) - successes
        wanted_failures = self._videos // 2
        enough = successes >= self._videos - wanted_failures and failures >= wanted_failures
        return number in self._candidates and not enough

    def add(self, number: int, success: bool) -> None:
        """An episode was filmed."""
        self._filmed[number] = success

    def keep(self, names: Mapping[int, str]) -> None:
        """Give the best choice of films their `names`, and remove the others."""
        filmed = {number: self._filmed[number] for number in self._candidates if number in self._filmed}
        for number in choose_films(filmed, self._videos):
            unsorted_film(self.directory, number).replace(self.directory / names[number])
        self._forget()

    def _forget(self) -> None:
        shutil.rmtree(self.directory / ".unsorted", ignore_errors=True)


def choose_films(filmed: Mapping[int, bool], videos: int) -> list[int]:
    """Which of the filmed episodes to keep, at most `videos`, given their success: half of them failures, or fewer of
    one kind and more of the other where there are not enough; the first ones of each."""
    successes = [number for number, success in filmed.items() if success]
    failures = [number for number, success in filmed.items() if not success]
    kept_failures = failures[: max(videos // 2, videos - len(successes))]
    return successes[: videos - len(kept_failures)] + kept_failures
