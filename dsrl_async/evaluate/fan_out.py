"""Plays the episodes of an evaluation in several groups, each with a policy and environment workers of its own.

A group is a process (`member`) that `groups.placing` starts, on a GPU of this machine or of a cluster. It is told which
episodes to play when it can play, and tells their outcomes as they end; one that ends is replaced, and what it had not
told is played again. An episode's outcome does not depend on who plays it.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path

from dsrl_async.config.command_line import program
from dsrl_async.config.settings import MIN_LANE_ROWS, ConfigError
from dsrl_async.evaluate.deal import Deal
from dsrl_async.evaluate.films import Films
from dsrl_async.evaluate.lines import Lines
from dsrl_async.evaluate.resolve import Evaluation
from dsrl_async.evaluate.results import Outcome
from dsrl_async.groups.placing import LocalPlacement, Placed, Placement, local_gpus
from dsrl_async.groups.ray_placement import RayPlacement
from dsrl_async.host.waiting import Say
from dsrl_async.run.evaluation.episodes import Episode

MEMBER = "dsrl_async.evaluate.member"
NEWS, READY = "episodes.jsonl", "waiting for episodes"
"""What a group tells, in its directory: its outcomes, each an object with the fields of `Outcome`, and what it does
before the first one as `{"doing": WORDS}`, at last that it is ready."""
MOST_FAILURES = 3
"""So many groups may end before they have played a slice, or before they can play, until the evaluation ends."""
POLL_S = 0.02


def play_in_groups(
    evaluation: Evaluation,
    episodes: Sequence[Episode],
    films: Films | None,
    meanwhile: Callable[[], object],
    wait: Callable[[str], AbstractContextManager[Say]],
    say: Callable[[str], object],
) -> Generator[Outcome]:
    """Play `episodes` in `evaluation.groups` groups or fewer; yield their outcomes as they end.

    `say` takes a sentence about a group; the rest is as in `play.play`. The groups end with the generator: close it.

    Raises:
        ConfigError: a group says that the policy or the checkpoint cannot be used.
        RuntimeError: groups ended again and again.
    """
    if not episodes:
        return
    with (
        tempfile.TemporaryDirectory(prefix="dsrl_async-") as directory,
        closing(place(evaluation, Path(directory))) as placement,
    ):
        groups = Groups(evaluation, episodes, films, placement, Path(directory), say)
        with wait(f"starting {groups.number} groups") as now:
            while not (outcomes := groups.poll()):
                meanwhile()
                now(groups.doing())
                time.sleep(POLL_S)
        while True:
            yield from outcomes
            if not groups.deal.missing:
                return
            meanwhile()
            time.sleep(POLL_S)
            outcomes = groups.poll()


def place(evaluation: Evaluation, directory: Path) -> Placement:
    """Who starts the groups."""
    config, number = evaluation.config, evaluation.groups
    if evaluation.ray is not None:
        gpus = config.group.gpus if config.device == "cuda" else 0
        return RayPlacement(evaluation.ray, directory, gpus, config.group.cpus, config.group.wait_s)
    return LocalPlacement(number, local_gpus(number, config.group.gpus) if config.device == "cuda" else ())


class Groups:
    """The groups of an evaluation.

    Attributes:
        number: how many there are, no more than episodes.
        deal: which of them plays what.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        episodes: Sequence[Episode],
        films: Films | None,
        placement: Placement,
        directory: Path,
        say: Callable[[str], object],
    ) -> None:
        self.number = min(evaluation.groups, len(episodes))
        lanes = min(evaluation.config.actors, -(-len(episodes) // self.number))
        self.deal = Deal(episodes, self.number, lanes)
        self._placement, self._directory, self._films, self._say = placement, directory, films, say
        config = evaluation.config
        capacity = max(lanes * MIN_LANE_ROWS, config.replay.warmup_decisions)  # which is checked where this is read
        replay = config.replay.model_copy(update={"capacity": capacity})
        config = config.model_copy(update={"actors": lanes, "replay": replay})
        one_task = len({episode.task for episode in episodes}) == 1
        self._job = {
            "module": MEMBER,
            "config": config.model_dump(mode="json"),
            "checkpoint": None if evaluation.checkpoint is None else str(evaluation.checkpoint.absolute()),
            "mode": evaluation.mode,
            "begin_with": episodes[0].number if one_task else None,
            "films": None if films is None else str(films.directory.absolute()),
        }
        self._incarnation = dict.fromkeys(range(self.number), 0)
        self._news: dict[int, Lines] = {}
        self._where: dict[int, str] = {}
        self._doing: dict[int, str] = {}
        self._failed_starts = 0
        self._filmed: set[int] = set()
        for group in range(self.number):
            self._start(group)

    def _start(self, group: int) -> None:
        self._incarnation[group] += 1
        incarnation = self._incarnation[group]
        run_dir = self._directory / f"{group}-{incarnation}"
        run_dir.mkdir()
        self._news[group], self._doing[group] = Lines(run_dir / NEWS), "starting"
        job = {**self._job, "group": group, "incarnation": incarnation, "run_dir": str(run_dir)}
        self._placement.start(group, incarnation, job)

    def poll(self) -> list[Outcome]:
        """The outcomes that have come since the last call; groups that have ended are replaced, see `play_in_groups`
        for the exceptions."""
        outcomes = [outcome for group in range(self.number) for outcome in self._hear(group)]
        for event in self._placement.poll():
            if isinstance(event, Placed):
                self._where[event.group] = event.where
                continue
            outcomes += self._hear(event.group)  # its last words
            self._replace(event.group, event.how, event.fatal)
        for group, doing in self._doing.items():
            if doing == READY and (episodes := self.deal.next(group)):
                self._tell(group, episodes)
        return outcomes

    def doing(self) -> str:
        """What is done before there are outcomes, in words."""
        waits = self._placement.waits()
        slowest = min(range(self.number), key=lambda group: (self._doing[group] == READY, group))
        doing = f"waiting for {waits[slowest]}" if slowest in waits else self._doing[slowest]
        if doing == READY:
            return f"first episodes of {self.number} groups"
        return f"group {slowest} of {self.number}: {doing}"

    def _hear(self, group: int) -> list[Outcome]:
        outcomes = []
        for news in self._news[group].new():
            if "doing" in news:
                self._doing[group] = news["doing"]
                continue
            outcome = Outcome(**news)
            self._failed_starts = 0
            if self.deal.note(group, outcome.number):
                outcomes.append(outcome)
                if self._films is not None and outcome.number in self._filmed:
                    self._films.add(outcome.number, outcome.success)
        return outcomes

    def _tell(self, group: int, episodes: Sequence[Episode]) -> None:
        film: list[int] = []
        if self._films is not None:
            film = [episode.number for episode in episodes if self._films.wanted(episode.number)]
            self._filmed -= {episode.number for episode in episodes}
            self._filmed |= set(film)
        self._placement.tell(group, json.dumps({"episodes": episodes, "film": film}))

    def _replace(self, group: int, how: str, fatal: bool) -> None:
        """Have another process play what a group has not played; raises an exception if that makes no sense."""
        failures = self.deal.give_back(group)
        if not self.deal.missing:
            return
        name = f"group {group} ({self._where.get(group, 'not placed')})"
        if fatal:
            raise ConfigError(f"{name} ended ({how})")
        if self._doing[group] != READY:
            self._failed_starts += 1
        if max(failures, self._failed_starts) >= MOST_FAILURES:
            what = "playing the same episodes" if failures >= MOST_FAILURES else "getting ready"
            raise RuntimeError(
                f"{name} ended ({how}), the third time that one did while {what}: {program('doctor')} looks for the "
                "reason"
            )
        self._say(f"{name} ended ({how}); another process plays what it has not")
        self._start(group)
