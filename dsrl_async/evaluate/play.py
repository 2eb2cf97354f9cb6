"""Plays the episodes of an evaluation: environment workers step the scenes, and this process runs the policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing
from functools import partial
from typing import Any

import torch
from rich.console import Console

from dsrl_async.agent import load_weights
from dsrl_async.evaluate.fan_out import play_in_groups
from dsrl_async.evaluate.films import Filming, Films
from dsrl_async.evaluate.progress import ProgressBar
from dsrl_async.evaluate.resolve import Evaluation
from dsrl_async.evaluate.results import Outcome, ResultDirectory
from dsrl_async.host.device import resolve_device
from dsrl_async.host.machine import cpu_threads
from dsrl_async.host.signals import StopRequest
from dsrl_async.host.waiting import Say
from dsrl_async.run import preflight
from dsrl_async.run.evaluation.episodes import Episode, Schedule
from dsrl_async.run.inference.policies import load_policies
from dsrl_async.run.inference.server import InferenceServer, notifier
from dsrl_async.run.instructions import learned_by
from dsrl_async.run.preflight import CheckedRun
from dsrl_async.run.worker.pool import WorkerPool
from dsrl_async.run.worker.worker import EVALUATION, episode_seed
from dsrl_async.shm import events
from dsrl_async.shm.assignments import NONE_LEFT, Assignments, assignment_fields
from dsrl_async.shm.counters import EPISODE_LOG, Counters, NoiseMode
from dsrl_async.shm.memory import run_fields
from dsrl_async.shm.slots import Slots

IDLE_S = 0.1
"""Upper limit on the seconds for which nobody looks whether the workers still live."""


def evaluate(
    evaluation: Evaluation, out: ResultDirectory | None, films: Films | None, stop: StopRequest, console: Console
) -> dict[int, Outcome]:
    """Play the episodes, but for those that `out` has already; return all outcomes by number.

    Raises:
        ConfigError: the policy or the checkpoint cannot be used.
        RuntimeError: an environment worker ended or hangs, see `WorkerPool`.
        KeyboardInterrupt: `stop` was requested.
    """
    outcomes = {} if out is None else out.outcomes
    if films is not None:
        films.resume(outcomes)
    remaining = [episode for episode in evaluation.episodes if episode.number not in outcomes]
    if films is not None and (plan := films.plan(episode.number for episode in remaining)):
        console.print(plan)
    complete = False
    try:
        with ProgressBar(evaluation, outcomes, console) as bar:
            meanwhile = partial(look_up, stop, bar)
            if evaluation.grouped:
                played = play_in_groups(evaluation, remaining, films, meanwhile, bar.wait, console.print)
            else:
                played = play(evaluation, remaining, films, meanwhile, bar.wait)
            with closing(played):
                for outcome in played:
                    outcomes[outcome.number] = outcome
                    if out is not None:
                        out.add(outcome)
        complete = True
    finally:
        if films is not None and (complete or out is None):  # else they are chosen when all episodes are finished
            films.keep(outcomes)
    return outcomes


def look_up(stop: StopRequest, bar: ProgressBar) -> None:
    """Show the progress; raise KeyboardInterrupt if a stop was requested."""
    if stop.reason:
        raise KeyboardInterrupt
    bar.update()


def play(
    evaluation: Evaluation,
    episodes: Sequence[Episode],
    films: Filming | None,
    meanwhile: Callable[[], object],
    wait: Callable[[str], AbstractContextManager[Say]],
    more: Callable[[], Sequence[Episode]] | None = None,
    begin_with: int | None = None,
) -> Generator[Outcome]:
    """Play `episodes` in `config.actors` environment workers or fewer; yield their outcomes as they end.

    With `more`, which returns further episodes each time it is called, this goes on for as long as it is not closed,
    and `begin_with` is the number of one of them if all are of one task.

    `meanwhile` is called now and then, and may raise; `wait` says what is being done before there are episodes. The
    workers end with the generator: close it.
    """
    run = evaluation.run
    if more is None:
        if not episodes:
            return
        run = run.with_actors(min(evaluation.config.actors, len(episodes)))
        if len({episode.task for episode in episodes}) == 1:
            begin_with = episodes[0].number
    config = run.config
    preflight.check_descriptors(config, "--processes")
    preflight.check_memory(run, lower="--processes", learning=False)
    preflight.check_gpu_memory(run, ["device"])
    fields = {**run_fields(config, run.spec, run.horizon), **assignment_fields(config.actors)}
    with WorkerPool(config, fields, evaluation=worker_job(run, begin_with, films), meanwhile=meanwhile) as pool:
        with wait("loading the policy"):
            server = load_server(evaluation, run, pool)
        with wait("making the environment, compiling its scene"):
            pool.await_template()
        with wait("starting the environment workers"):
            pool.fork_workers()
        pool.end_template()
        dispatcher = Dispatcher(config.seed, episodes, films, pool, endless=more is not None)
        for lane in range(config.actors):
            dispatcher.give(lane)
        if more is None:
            with wait(f"first resets of {config.actors} environment workers"):
                await_request(server, pool, meanwhile)
        while dispatcher.playing or more is not None:
            meanwhile()
            events.clear(pool.observation_ready)
            if more is not None:
                dispatcher.add(more())
            for lane in tuple(dispatcher.playing):
                if dispatcher.ended(lane):
                    yield dispatcher.take_outcome(lane)
                    dispatcher.give(lane)
                else:
                    pool.check(lane)
            if not server.serve_ready(server.slots.ready()):
                events.wait(pool.observation_ready, IDLE_S)
        pool.await_end()


def await_request(server: InferenceServer, pool: WorkerPool, meanwhile: Callable[[], object]) -> None:
    """Wait until an environment worker has its first observation; `meanwhile` is called now and then."""
    while not len(server.slots.ready()):
        meanwhile()
        for lane in range(len(pool.workers)):
            pool.check(lane)
        events.clear(pool.observation_ready)
        if not len(server.slots.ready()):
            events.wait(pool.observation_ready, IDLE_S)


def worker_job(run: CheckedRun, begin_with: int | None, films: Filming | None) -> dict[str, Any]:
    """Return what the workers have to know of the evaluation, see `Template`."""
    return {
        "from_lane": 0,
        "preview": False,
        "video_dir": None if films is None else str(films.directory.absolute()),
        "rate_hz": run.environment.rate_hz,
        "begin_with": begin_with,  # of several tasks, a worker compiles what it is given
    }


def load_server(evaluation: Evaluation, run: CheckedRun, pool: WorkerPool) -> InferenceServer:
    """Load the policy, and the agent that steers it; raise ConfigError if they cannot be used."""
    config = run.config
    torch.set_num_threads(cpu_threads(config.inference.threads))
    device = resolve_device(config.device)
    learned = None if evaluation.checkpoint is None else learned_by(evaluation.checkpoint, config.sac)
    policies = load_policies(config, run.spec, device, run.policy, Counters(pool.arena), learned=learned)
    server = InferenceServer(config, pool.arena, policies, notifier(pool.wake_fds), NoiseMode[evaluation.mode.upper()])
    if evaluation.checkpoint is not None:
        load_weights(policies.actor, evaluation.checkpoint, "--checkpoint")
    return server


class Dispatcher:
    """Gives the lanes one episode after the other, and says what came of each.

    If it is `endless`, lanes for which there is no episode wait for those that are added.

    Attributes:
        playing: for each lane that plays, its episode and when that was given (time.monotonic).
    """

    def __init__(
        self, seed: int, episodes: Sequence[Episode], films: Filming | None, pool: WorkerPool, endless: bool = False
    ) -> None:
        self._seed, self._films, self._wake_fds = seed, films, pool.wake_fds
        self._schedule = Schedule(episodes)
        self._assignments, self._counters = Assignments(pool.arena), Counters(pool.arena)
        self._task_index = Slots(pool.arena).task_index
        self._endless, self._idle = endless, list[int]()
        self.playing: dict[int, tuple[Episode, float]] = {}

    def add(self, episodes: Sequence[Episode]) -> None:
        """Let further episodes be played."""
        if episodes:
            self._schedule.add(episodes)
            idle, self._idle = self._idle, []
            for lane in idle:
                self.give(lane)

    def give(self, lane: int) -> None:
        """Give a lane, which plays nothing, its next episode, or tell it that none is left."""
        if (episode := self._schedule.next(lane)) is None:
            if self._endless:
                self._idle.append(lane)
                return
            self._assignments.give(lane, NONE_LEFT)
        else:
            self.playing[lane] = episode, time.monotonic()
            film = self._films is not None and self._films.wanted(episode.number)
            self._assignments.give(lane, episode.number, film)
        events.notify(self._wake_fds[lane])

    def ended(self, lane: int) -> bool:
        """Say whether a lane has played all that it was given."""
        return self._counters.ended_episodes(lane) == int(self._assignments.given[lane])

    def take_outcome(self, lane: int) -> Outcome:
        """Return the outcome of the episode that a lane has ended."""
        episode, given = self.playing.pop(lane)
        entry = (int(self._counters.actor_episodes[lane]) - 1) % EPISODE_LOG
        outcome = Outcome(
            *episode,
            seed=episode_seed(self._seed, EVALUATION, 0, episode.number),
            success=bool(self._counters.actor_episode_success[lane, entry]),
            steps=int(self._counters.actor_episode_len[lane, entry]),
            wall_s=round(time.monotonic() - given, 3),
        )
        if episode.init_state is None:  # what an episode's number does not say, its reset has
            outcome = outcome._replace(task=int(self._task_index[lane]))
        if self._films is not None and self._assignments.film[lane]:
            self._films.add(outcome.number, outcome.success)
        return outcome
