"""Evaluation while the run goes on: when one begins, who plays which episode, and what came of it.

Held-out episodes are played by environment workers of the evaluation's own, whose observations travel in the same
batches as those of the training; so nobody waits. What is done here is a few comparisons each time `step` is called,
and nothing of it depends on the clock but `evaluation.every_minutes`: a serial run is reproducible.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsrl_async.config.settings import Config
from dsrl_async.envs.recording import preview_of, unsorted_film
from dsrl_async.run.evaluation.episodes import Episode, Schedule, across_tasks, held_out
from dsrl_async.run.evaluation.files import (
    EvaluationFiles,
    Planned,
    Played,
    evaluation_root,
    evaluations,
    find_best,
    keep_best,
    rank,
)
from dsrl_async.run.evaluation.results import summarise
from dsrl_async.run.preflight import CheckedRun
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.assignments import Assignments
from dsrl_async.shm.counters import EVALUATION_LANES, Counters, NoiseMode
from dsrl_async.shm.episodes import last_episode
from dsrl_async.shm.slots import Slots
from dsrl_async.telemetry.monitor import EvaluationView

logger = logging.getLogger(__name__)

SNAPSHOT_MODES = {
    "stochastic": NoiseMode.SNAPSHOT_STOCHASTIC,
    "deterministic": NoiseMode.SNAPSHOT_DETERMINISTIC,
    "base": NoiseMode.BASE,
}


@dataclass(frozen=True)
class Finished:
    """An evaluation whose last episode has ended."""

    result: dict[str, Any]
    """What `result.json` says."""
    previews: dict[str, bytes]
    """Name of an episode that was filmed -> an animated GIF."""


@dataclass
class Running:
    """An evaluation that is going on."""

    files: EvaluationFiles
    schedule: Schedule
    films: set[int]
    """Numbers of the episodes to film."""
    snapshot_asked: int | None
    """The question for it that the learner answers first; None if there is nothing to wait for."""
    begun: int = 0
    """Its number in this launch, once its rows are answered; 0 before."""
    playing: dict[int, Episode] = field(default_factory=dict)
    """By row of the evaluation's lanes."""
    played: dict[int, Played] = field(default_factory=dict)
    """By number."""


class Evaluations:
    """The evaluations of a run.

    Args:
        run: its configuration has an `evaluation`.
        run_dir: where an evaluation that was interrupted is found, and gone on with.
        arena: the run's shared memory, with the counters restored.

    Attributes:
        last: the result of the last evaluation; None before the first has ended.
        best: the best checkpoint and its result, or None.
    """

    def __init__(self, run: CheckedRun, run_dir: Path, arena: Arena) -> None:
        self._run, self._run_dir = run, run_dir
        self._config: Config = run.config
        self._counters, self._slots = Counters(arena), Slots(arena)
        self._lanes = Counters(arena, EVALUATION_LANES)
        self._assignments = Assignments(arena, self._lanes)
        self._episodes = across_tasks(held_out(run.environment, run.config))
        self._tasks = run.environment.task_numbers()
        self._now: Running | None = None
        self._last: Planned | None = None
        self._said_late = self._said_unwritten = False
        self.last: dict[str, Any] | None = None
        self.best = find_best(run_dir)
        self._take_up()

    def _take_up(self) -> None:
        """Go on with what an earlier launch has left unfinished."""
        for files in evaluations(self._run_dir):
            if files.finished:
                self._last = files.planned
                self._read_result(files)
            elif files.planned.numbers != self._numbers or not self._can_go_on(files):
                logger.warning("the evaluation at %d decisions cannot be gone on with", files.planned.decisions)
                self._last = files.planned
            else:
                self._last = files.planned
                self._now = self._running(files, None)
                played = len(self._now.played)
                logger.info("going on with the evaluation at %s, of which %d episodes are played", _at(files), played)

    def _read_result(self, files: EvaluationFiles) -> None:
        try:
            self.last = files.result()
        except ValueError as error:
            logger.warning("%s", error)

    def _can_go_on(self, files: EvaluationFiles) -> bool:
        return files.planned.policy == "base" or files.snapshot.is_dir()

    @property
    def _numbers(self) -> list[int]:
        return [episode.number for episode in self._episodes]

    def _running(self, files: EvaluationFiles, asked: int | None) -> Running:
        played = files.played()
        films = {episode.number for episode in self._episodes[: self._config.evaluation.films]}
        left = [episode for episode in self._episodes if episode.number not in played]
        return Running(files, Schedule(left), films, asked, played=played)

    @property
    def view(self) -> EvaluationView:
        """What is shown of the evaluations at this moment."""
        last, best = self.last, None if self.best is None else self.best[1]
        return EvaluationView(
            episodes=len(self._episodes),
            played=None if self._now is None else len(self._now.played),
            success_rate=None if last is None else last["success_rate"],
            decisions=None if last is None else last["decisions"],
            best_success_rate=None if best is None else best["success_rate"],
            best_decisions=None if best is None else best["decisions"],
        )

    def step(self, wall_s: float, wake: Callable[[int], object]) -> Finished | None:
        """Get on with what there is to do; returns the evaluation whose last episode has ended, if one has.

        `wall_s` are the seconds that the run has taken, and `wake` is called with the lanes that were given an episode.
        """
        if self._now is None:
            if self._due(wall_s):
                self._begin(wall_s)
            return None
        if not self._said_late and self._due(wall_s):
            self._said_late = True
            logger.warning(
                "an evaluation takes longer than the time to the next one, which begins when it has ended; raise "
                "evaluation.actors, lower evaluation.episodes or evaluate less often"
            )
        return self._go_on(self._now, wake)

    def _due(self, wall_s: float) -> bool:
        last, settings = self._last, self._config.evaluation
        if last is None:
            return True  # the base policy, with which all others are compared
        decisions = self._counters.decisions()
        if int(self._counters.learner_updates[0]) == 0 or decisions <= last.decisions:
            return False
        if settings.every_decisions is not None:
            return decisions // settings.every_decisions > last.decisions // settings.every_decisions
        assert settings.every_minutes is not None
        return wall_s - last.wall_s >= settings.every_minutes * 60

    def _begin(self, wall_s: float) -> None:
        counters, base = self._counters, self._last is None
        planned = Planned(
            policy="base" if base else "agent",
            noise="base" if base else self._config.sac.evaluation_noise,
            seed=self._config.seed,
            numbers=self._numbers,
            decisions=counters.decisions(),
            env_steps=int(counters.actor_env_steps.sum()),
            wall_s=wall_s,
        )
        self._last = planned
        try:
            files = EvaluationFiles.begin(self._run_dir, planned)
        except OSError as error:
            logger.warning("there is no evaluation at %d decisions: %s", planned.decisions, error)
            return
        asked = None
        if not base:
            asked = counters.ask_snapshot(planned.decisions)
        self._now = self._running(files, asked)

    def _go_on(self, now: Running, wake: Callable[[int], object]) -> Finished | None:
        counters, planned = self._counters, now.files.planned
        if now.snapshot_asked is not None:
            if not counters.snapshot_answered(now.snapshot_asked):
                return None
            now.snapshot_asked = None
        if now.begun == 0:
            if not self._can_go_on(now.files):
                self._drop("the agent could not be written")
                return None
            now.begun = counters.begin_evaluation(planned.decisions, SNAPSHOT_MODES[planned.noise])
        if int(counters.inference_evaluation[0]) == -now.begun:
            self._drop("its agent cannot be read")
            return None
        for row in range(self._config.evaluation.lanes):
            self._serve(now, row, wake)
        return self._finish(now) if len(now.played) == len(self._episodes) else None

    def _drop(self, why: str) -> None:
        assert self._now is not None
        logger.warning("the evaluation at %s is left out: %s", _at(self._now.files), why)
        self._now = None

    def _serve(self, now: Running, row: int, wake: Callable[[int], object]) -> None:
        """Take what came of a lane's episode, if that has ended, and give the lane another one."""
        if row in now.playing:
            if self._assignments.next(row) is not None:
                return
            self._take_outcome(now, row)
        if (episode := now.schedule.next(row)) is not None:
            now.playing[row] = episode
            self._assignments.give(row, episode.number, episode.number in now.films)
            wake(self._config.actors + row)

    def _take_outcome(self, now: Running, row: int) -> None:
        episode, outcome = now.playing.pop(row), last_episode(self._lanes, row)
        played = Played(
            number=episode.number,
            task=self._tasks[int(self._slots.task_index[self._config.actors + row])],
            success=bool(outcome.success),
            episode_return=outcome.episode_return,
            steps=outcome.length,
        )
        now.played[played.number] = played
        if episode.number in now.films:
            self._write(lambda: self._name_film(now.files, played))
        self._write(lambda: now.files.add(played))

    def _name_film(self, files: EvaluationFiles, played: Played) -> None:
        """Move the film of an episode to where it stays, named by what came of it."""
        film = unsorted_film(evaluation_root(self._run_dir), played.number)
        if film.is_file():  # not every environment can be filmed
            task = f"task-{played.task}-" if len(self._tasks) > 1 else ""
            place = (
                files.directory / f"episode-{played.number:04d}-{task}{'success' if played.success else 'failure'}.mp4"
            )
            preview_of(film).replace(preview_of(place))
            film.replace(place)

    def _write(self, write: Callable[[], object]) -> None:
        """A full disk is no reason to end the run."""
        try:
            write()
        except OSError as error:
            if not self._said_unwritten:
                logger.warning("an evaluation cannot be written to the run directory: %s", error)
            self._said_unwritten = True

    def _finish(self, now: Running) -> Finished:
        self._now = None
        result = result_of(now.files.planned, [now.played[number] for number in self._numbers])
        self.last = result
        self._write(lambda: now.files.finish(result))
        if now.files.planned.policy == "agent":
            self._write(lambda: self._compare(now.files, result))
        now.files.drop_snapshot()
        logger.info("%s", sentence(result, self.best is not None and self.best[1] is result))
        previews = {}
        for path in sorted(now.files.directory.glob("*.gif")):
            with contextlib.suppress(OSError):
                previews[path.stem.rpartition("-")[0]] = path.read_bytes()
                path.unlink()
        return Finished(result, previews)

    def _compare(self, files: EvaluationFiles, result: dict[str, Any]) -> None:
        """Keep the snapshot if it is the best so far: at equal success by its return, then the earlier one stays."""
        if self.best is None or rank(result) > rank(self.best[1]):
            try:
                self.best = keep_best(self._run_dir, files.snapshot, result), result
            except ValueError as error:
                logger.warning("the best agent could not be kept: %s", error)

    def summary(self) -> dict[str, Any]:
        """For the summary of the run: the last evaluation, and the best of the agent's."""
        best = None if self.best is None else {"checkpoint": str(self.best[0]), **_figures(self.best[1])}
        return {"last": None if self.last is None else _figures(self.last), "best": best}

    def end(self) -> None:
        """Say what becomes of an evaluation that the run's end interrupts."""
        if (now := self._now) is not None:
            logger.info(
                "the evaluation at %s is interrupted after %d of %d episodes; --resume goes on with it",
                *(_at(now.files), len(now.played), len(self._episodes)),
            )


def result_of(planned: Planned, played: Sequence[Played]) -> dict[str, Any]:
    """The result of an evaluation, as in `result.json`: a point of the curve, and the same for each task."""
    tasks = sorted({episode.task for episode in played})
    return {
        **planned.model_dump(include={"policy", "noise", "seed", "decisions", "env_steps"}),
        **summarise(played),
        "tasks": [{"task": task, **summarise([one for one in played if one.task == task])} for task in tasks],
    }


def scalars(result: dict[str, Any]) -> dict[str, float]:
    """TensorBoard values of a result; those by task where there are several."""
    names = ("success_rate", "ci95_low", "return", "episode_len")
    values = {f"eval/{name}": float(result[name]) for name in names}
    if len(result["tasks"]) > 1:
        for task in result["tasks"]:
            values |= {f"eval/task_{task['task']}/{name}": float(task[name]) for name in names}
    return values


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "tasks"}


def sentence(result: dict[str, Any], best: bool) -> str:
    who = "the base policy" if result["policy"] == "base" else "the agent"
    return (
        f"evaluation of {who} at {result['decisions']:,} decisions: success {result['success_rate']:.1%} of "
        f"{result['episodes']} episodes (95 %: {result['ci95_low']:.1%} to {result['ci95_high']:.1%})"
        f"{', the best so far' if best else ''}"
    )


def _at(files: EvaluationFiles) -> str:
    return f"{files.planned.decisions:,} decisions"
