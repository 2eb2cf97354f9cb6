"""Plays the episodes of an evaluation: environment workers, and the policy in this process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from dsrl_async.config.settings import ConfigError
from dsrl_async.envs import environment_record
from dsrl_async.evaluate.episodes import Episode, Schedule
from dsrl_async.evaluate.films import Films
from dsrl_async.evaluate.progress import ProgressBar
from dsrl_async.evaluate.resolve import Evaluation
from dsrl_async.evaluate.results import Outcome, ResultDirectory
from dsrl_async.host import processes
from dsrl_async.host.device import resolve_device
from dsrl_async.host.machine import cpu_threads
from dsrl_async.host.signals import StopRequest
from dsrl_async.run import checkpoints, preflight
from dsrl_async.run.inference.policies import load_policies
from dsrl_async.run.inference.server import InferenceServer
from dsrl_async.run.preflight.policy import policy_directory
from dsrl_async.run.worker.template import Template
from dsrl_async.run.worker.worker import EVALUATION, episode_seed
from dsrl_async.shm import events
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.assignments import NONE_LEFT, Assignments, assignment_fields
from dsrl_async.shm.counters import EPISODE_LOG, Counters
from dsrl_async.shm.memory import run_fields


def load_actor(checkpoint: Path, server: InferenceServer) -> None:
    """Put a checkpoint's actor weights into the server; raises ConfigError with one sentence if they do not fit."""
    path = checkpoint / checkpoints.AGENT
    try:
        with safe_open(path, framework="pt") as file:
            flat: Tensor = file.get_tensor("actor.flat")
        server.policies.actor.load_flat_(flat)
    except Exception as error:
        raise ConfigError(f"{path} cannot be used: {error}") from error


def evaluate(
    evaluation: Evaluation, out: ResultDirectory | None, films: Films | None, stop: StopRequest, console: Console
) -> dict[int, Outcome]:
    """Play the episodes, but for those that `out` has already; return all outcomes by number.

    Raises:
        ConfigError: the policy or the checkpoint cannot be used.
        RuntimeError: an environment process died or hangs; the message holds the end of its output.
        KeyboardInterrupt: `stop` was requested.
    """
    outcomes = {} if out is None else out.outcomes
    if films is not None:
        films.resume({number: outcome.success for number, outcome in outcomes.items()})

    def finish(outcome: Outcome) -> None:
        outcomes[outcome.number] = outcome
        if out is not None:
            out.add(outcome)

    remaining = [episode for episode in evaluation.episodes if episode.number not in outcomes]
    complete = False
    try:
        if remaining:
            with ProgressBar(evaluation, outcomes, console) as bar:
                play(evaluation, remaining, films, finish, bar.update, stop)
        complete = True
    finally:
        if films is not None and (complete or out is None):  # else the films are chosen when all is finished
            films.keep(outcomes)
    return outcomes


def play(
    evaluation: Evaluation,
    episodes: Sequence[Episode],
    films: Films | None,
    finish: Callable[[Outcome], None],
    update: Callable[[], None],
    stop: StopRequest,
) -> None:
    """Play `episodes` in `config.actors` processes or fewer.

    `finish` is told what came of each, and `update` is called now and then. Raises what `evaluate` does.
    """
    checkpoint, mode = evaluation.checkpoint, evaluation.mode
    config = evaluation.config.model_copy(update={"actors": min(evaluation.config.actors, len(episodes))})
    policy, spec = preflight.check_policy(config)
    preflight.check_descriptors(config, "--processes")
    preflight.check_memory(config, spec, policy.action_horizon, lower="--processes")
    torch.set_num_threads(cpu_threads(config.inference.threads))
    arena = Arena.create({**run_fields(config, spec, policy.action_horizon), **assignment_fields(config.actors)})
    counters, assignments = Counters(arena), Assignments(arena)
    observation_ready = events.create()
    wake = [events.create() for _ in range(config.actors)]

    def notify(lanes: np.ndarray) -> None:
        for lane in lanes:
            events.notify(wake[lane])

    device = resolve_device(config.device)
    policies = load_policies(config, spec, device, mode, policy_directory(config))
    server = InferenceServer(config, arena, policies, notify, training=False)
    if checkpoint is not None and mode != "base":
        load_actor(checkpoint, server)

    schedule = Schedule(episodes)
    playing: dict[int, tuple[Episode, float]] = {}  # by lane: the episode, and when it was given

    def give(lane: int) -> None:
        episode = schedule.next(lane)
        if episode is None:
            assignments.give(lane, NONE_LEFT)
        else:
            playing[lane] = episode, time.monotonic()
            assignments.give(lane, episode.number, films is not None and films.wanted(episode.number))
        events.notify(wake[lane])

    def finished(lane: int) -> Outcome:
        """The outcome of the episode that the lane has just finished."""
        episode, given = playing.pop(lane)
        entry = (int(counters.actor_episodes[lane]) - 1) % EPISODE_LOG
        return Outcome(
            *episode,
            seed=episode_seed(config.seed, EVALUATION, 0, episode.number),
            success=bool(counters.actor_episode_success[lane, entry]),
            steps=int(counters.actor_episode_len[lane, entry]),
            wall_s=round(time.monotonic() - given, 3),
        )

    actors: list[processes.Process] = []
    with tempfile.TemporaryDirectory() as directory:
        logs = Path(directory)
        rate_hz = environment_record(config.env.model_dump()).rate_hz
        video_dir = str(films.directory.absolute()) if films else None
        one_task = len({episode.task for episode in episodes}) == 1
        begin_with = episodes[0].number if one_task else None  # of several, a process compiles what it is given
        episode_settings = {"video_dir": video_dir, "rate_hz": rate_hz, "begin_with": begin_with}
        env_config, notify_fds = config.env.model_dump(), [observation_ready]
        template = Template(
            arena, config.seed, env_config, wake, notify_fds, logs / "template.log", evaluation=episode_settings
        )
        try:
            begin_ns = time.monotonic_ns()

            def look_after_template() -> None:
                if stop.reason:
                    raise KeyboardInterrupt
                alive_ns = max(begin_ns, int(counters.template_heartbeat_ns[0]))
                name, log = "the environments' template", logs / "template.log"
                check_alive(name, template.popen, alive_ns, config.heartbeat_timeout_s, log)
                update()

            while not template.prepared:
                look_after_template()
                time.sleep(0.02)
            for lane in range(config.actors):
                try:
                    actors.append(template.fork(lane, 1, logs / f"actor-{lane:03d}.log", look_after_template))
                except RuntimeError as error:
                    raise RuntimeError(f"{error}: {processes.last_line(logs / 'template.log')}") from error
                give(lane)
            template.close()
            begin_ns = time.monotonic_ns()
            episodes_ended = [0] * config.actors
            while playing:
                if stop.reason:
                    raise KeyboardInterrupt
                events.clear(observation_ready)
                for lane, actor in enumerate(actors):
                    if counters.actor_episodes[lane] > episodes_ended[lane]:
                        episodes_ended[lane] += 1
                        outcome = finished(lane)
                        if films is not None and assignments.film[lane]:
                            films.add(outcome.number, outcome.success)
                        finish(outcome)
                        give(lane)
                    elif lane in playing:
                        check_alive(
                            f"environment process {lane}",
                            actor,
                            max(begin_ns, int(counters.actor_heartbeat_ns[lane])),
                            config.heartbeat_timeout_s,
                            logs / f"actor-{lane:03d}.log",
                        )
                update()
                ready = server.slots.ready()
                if len(ready):
                    server.serve_ready(ready)
                else:
                    events.wait(observation_ready, timeout_s=0.1)
            processes.wait_all(actors, time.monotonic() + processes.REAP_S)  # they close their environments
        finally:
            template.close()
            processes.kill_all(actors)
            events.close([observation_ready, *wake])
            arena.close()


def check_alive(name: str, process: processes.Process, alive_ns: int, timeout_s: float, log: Path) -> None:
    """Raises RuntimeError if a process, whose last sign of life was at `alive_ns`, has ended or hangs."""
    doctor = "python -m dsrl_async.doctor looks for the reason"
    if (code := process.poll()) is not None:
        message = doctor if code < 0 else processes.last_line(log)
        raise RuntimeError(f"{name} ended ({processes.how_ended(code)}): {message}")
    silent_s = (time.monotonic_ns() - alive_ns) * 1e-9
    if silent_s > timeout_s:
        raise RuntimeError(f"{name} has given no sign of life for {silent_s:.0f} s: {doctor}")
