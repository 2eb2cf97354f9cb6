"""The command: `python -m dsrl_async.evaluate [--checkpoint RUN] [--suite NAME] [--episodes N] [--out DIR]`.

Plays episodes with a fixed policy: the base policy (every action slot starts from independent N(0, I) noise), or the
steered policy of a run's checkpoint. Several environment processes, one policy in this process. Scenes and noise depend
on the seed and the episode's number only, and are never those of training. The last line on stdout is the result as
one JSON object: `episodes, successes, success_rate, ci95_low, ci95_high, policy`, the same for each task in `tasks`,
and in `settings` and `versions` all that identifies it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from torch import Tensor

from dsrl_async import checkpoints, preflight, processes
from dsrl_async.config import (
    Config,
    ConfigError,
    Parser,
    add_setting_options,
    leaf_fields,
    override,
    read_yaml,
    validate,
)
from dsrl_async.device import resolve_device
from dsrl_async.envs import libero_files
from dsrl_async.envs.libero import versions as simulator_versions
from dsrl_async.envs.libero import with_preset
from dsrl_async.envs.recording import Films
from dsrl_async.evaluation_plan import Episode, Schedule, across_tasks, check_repeats, parse_numbers, plan_suite
from dsrl_async.evaluation_results import (
    Outcome,
    ResultDirectory,
    identify_files,
    summarise,
    summarise_tasks,
    table,
    versions,
)
from dsrl_async.inference import InferenceServer, load_policies
from dsrl_async.launch import make_paths_absolute
from dsrl_async.machine import available_cpus
from dsrl_async.pi0.checkpoint import resolve_dtype
from dsrl_async.pi0.tensors import find_tensors
from dsrl_async.preflight import cpu_threads, policy_directory
from dsrl_async.session import StopRequest
from dsrl_async.shm import events
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.assignments import NONE_LEFT, Assignments, assignment_fields
from dsrl_async.shm.counters import EPISODE_LOG, Counters
from dsrl_async.shm.memory import run_fields
from dsrl_async.steering import Mode
from dsrl_async.template import Template
from dsrl_async.worker import EVALUATION, episode_seed

SETTINGS = ("env.", "policy.", "sac.", "inference.", "device", "heartbeat_timeout_s")
"""The settings, or sections of them, that an evaluation uses."""
TABLETOP_EPISODES = 100
MAX_PROCESSES = 16  # where nothing else is said
TABLETOP_RATE_HZ, LIBERO_RATE_HZ = 10, 20
PLAIN_INTERVAL_S = 60.0  # between two lines about the progress, where there is no terminal


class Plan(NamedTuple):
    """An evaluation, resolved: what a command line asks for."""

    config: Config
    """With evaluation's own number of actors and seed, and without a profile."""
    checkpoint: Path | None
    """Of a run, with the agent that steers; None for a policy without one."""
    mode: Mode
    episodes: list[Episode]
    instructions: tuple[str, ...]
    """Of the environment's tasks, by number."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m dsrl_async.evaluate", description=__doc__.split("\n\n")[1], allow_abbrev=False)
    parser.add_argument(
        "--checkpoint",
        help="a run directory (its last checkpoint) or a checkpoint directory; none: the base policy",
    )
    parser.add_argument("--base", action="store_true", help="evaluate the base policy of --checkpoint's run")
    parser.add_argument("--config", help="YAML file with the environment and policy, if there is no --checkpoint")
    parser.add_argument(
        "--suite", choices=libero_files.SUITES, help="all tasks of this suite of LIBERO (default: as configured)"
    )
    parser.add_argument("--tasks", metavar="LIST", help="LIBERO: only these tasks, such as 0,3 or 0-4")
    parser.add_argument("--init-states", metavar="LIST", help="LIBERO: only these initial states, such as 40-49")
    parser.add_argument(
        "--episodes",
        type=int,
        help="how many, spread evenly over the tasks (default: LIBERO all scenes once, else 100)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of scenes and noise (default 0)")
    parser.add_argument(
        "--processes",
        type=int,
        help="environment processes (default: as many as episodes, at most 16; LIBERO at most one for each core)",
    )
    parser.add_argument(
        "--noise", choices=("deterministic", "stochastic"), help="default: sac.evaluation_noise of the run"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="write episodes.jsonl and result.json there; the same command again goes on"
    )
    parser.add_argument("--video", metavar="DIR", help="write mp4 films of some successes and some failures there")
    parser.add_argument("--videos", type=int, default=4, help="how many films (default 4)")
    options = parser.add_argument_group("settings", "of the evaluated run or the defaults, as in dsrl_async.launch")
    add_setting_options(options, (field for field in leaf_fields() if field[0].startswith(SETTINGS)))
    return parser


def resolve(options: argparse.Namespace) -> Plan:
    """What the options ask for; raises ValueError, of which ConfigError is one, with one sentence."""
    for name in ("episodes", "processes", "videos"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name} must be at least 1")
    if not 0 <= options.seed < 2**63:
        raise ConfigError("--seed must be in [0, 2^63)")
    settings, checkpoint = base_settings(options)
    given = {key: text for key, text in vars(options).items() if key.startswith(SETTINGS)}
    if options.suite is not None:
        if given.get("env.name", options.suite) != options.suite:
            raise ConfigError("--env.name cannot be combined with --suite, which names the environment")
        env = settings.get("env") or {}
        left_out = {"task_ids", "init_states"}
        if env.get("name") != options.suite:
            left_out.add("max_episode_steps")  # how long an episode may take is a matter of the suite
        settings["env"] = {key: value for key, value in env.items() if key not in left_out}
        given["env.name"] = options.suite
    override(settings, given)
    config = validate(settings)
    make_paths_absolute(config.policy)
    if config.env.name == "tabletop":
        if options.tasks is not None or options.init_states is not None:
            raise ConfigError("--tasks and --init-states are of LIBERO; give --suite, too")
        episodes = [Episode(number, 0, None) for number in range(options.episodes or TABLETOP_EPISODES)]
        processes = MAX_PROCESSES
    else:
        episodes = plan_suite(
            config.env.name,
            parse_numbers("--tasks", options.tasks) if options.tasks else config.env.task_ids,
            parse_numbers("--init-states", options.init_states) if options.init_states else config.env.init_states,
            options.episodes,
        )
        everything = {"task_ids": None, "init_states": None, "scene_order": "cycled"}  # which the numbers count
        config = config.model_copy(update={"env": config.env.model_copy(update=everything)})
        processes = min(MAX_PROCESSES, available_cpus())
    actors = min(options.processes or processes, len(episodes))
    replay = config.replay.model_copy(update={"capacity": 2 * actors})  # the actors write it, nobody reads it
    own = {"actors": actors, "envs_per_actor": 1, "seed": options.seed, "replay": replay, "profile": False}
    config = config.model_copy(update=own)
    preflight.check_device("device", config.device)
    _, spec = preflight.check_policy(config)
    mode: Mode = options.noise or config.sac.evaluation_noise
    if checkpoint is None or options.base:
        mode = "base"
    if mode == "deterministic" and config.env.name != "tabletop":
        check_repeats(config.env.name, episodes, with_preset(config.env.model_dump())["seeding"])
    return Plan(config, checkpoint, mode, episodes, spec.prompts)


def base_settings(options: argparse.Namespace) -> tuple[dict[str, Any], Path | None]:
    """Settings of the run or file to evaluate, or none, and the run's checkpoint."""
    if options.checkpoint is None:
        return read_yaml(Path(options.config)) if options.config is not None else {}, None
    if options.config is not None:
        raise ConfigError("--config cannot be combined with --checkpoint: the run's own configuration is used")
    checkpoint = checkpoints.find(Path(options.checkpoint))
    if checkpoint is None:
        what = "there is no checkpoint in it" if Path(options.checkpoint).exists() else "it does not exist"
        raise ConfigError(f"--checkpoint {options.checkpoint}: {what}; give a run directory, or one of its checkpoints")
    return read_yaml(checkpoint.parent.parent / "config.yaml"), checkpoint


def identity(plan: Plan) -> dict[str, Any]:
    """All that outcomes depend on: JSON-ready, with the presets' values filled in."""
    config, mode = plan.config, plan.mode
    env = config.env.model_dump()
    if env["name"] != "tabletop":
        env = with_preset(env)
        env["task_ids"] = sorted({episode.task for episode in plan.episodes})
        env["init_states"] = sorted({episode.init_state for episode in plan.episodes if episode.init_state is not None})
    directory = policy_directory(config)
    device = resolve_device(config.device)
    steering = {}
    if plan.checkpoint is not None and mode != "base":
        agent = identify_files([plan.checkpoint / checkpoints.AGENT])
        steering = {"agent": str(plan.checkpoint.absolute()), "agent_files": agent, "sac": config.sac.model_dump()}
    return {
        "episodes": len(plan.episodes),
        "seed": config.seed,
        "noise": mode,
        "env": env,
        "policy": {
            **config.policy.model_dump(),
            "checkpoint": str(directory.absolute()),
            "dtype": str(resolve_dtype(config.policy.dtype, device)).removeprefix("torch."),
            "files": identify_files(sorted({tensor.file for tensor in find_tensors(directory).values()})),
        },
        **steering,
        "device": device.type,
        "versions": versions(simulator_versions()),
    }


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
    plan: Plan, out: ResultDirectory | None, films: Films | None, stop: StopRequest, console: Console
) -> dict[int, Outcome]:
    """Play the plan's episodes, but for those that `out` has already; returns all outcomes by number.

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

    remaining = [episode for episode in plan.episodes if episode.number not in outcomes]
    complete = False
    try:
        if remaining:
            with Bar(plan, outcomes, console) as bar:
                play(plan, remaining, films, finish, bar.update, stop)
        complete = True
    finally:
        if films is not None and (complete or out is None):  # else the films are chosen when all is finished
            films.keep({number: film_name(outcome) for number, outcome in outcomes.items()})
    return outcomes


def film_name(outcome: Outcome) -> str:
    scene = "" if outcome.init_state is None else f"task-{outcome.task}-init-{outcome.init_state}-"
    return f"episode-{outcome.number:04d}-{scene}{'success' if outcome.success else 'failure'}.mp4"


class Bar:
    """The progress on stderr: a bar where there is a terminal, else a line now and then."""

    def __init__(self, plan: Plan, outcomes: dict[int, Outcome], console: Console) -> None:
        self._name, self._total = f"{plan.mode} policy", len(plan.episodes)
        self._outcomes, self._console = outcomes, console
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._next_line = time.monotonic() + PLAIN_INTERVAL_S

    def __enter__(self) -> Bar:
        self._progress.start()
        self._bar = self._progress.add_task(self._name, total=self._total)
        self.update()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self) -> None:
        done = len(self._outcomes)
        rate = f", success {sum(outcome.success for outcome in self._outcomes.values()) / done:.1%}" if done else ""
        self._progress.update(self._bar, completed=done, description=f"{self._name}{rate}")
        if not self._console.is_terminal and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_INTERVAL_S
            self._console.print(f"{self._name}: {done} of {self._total} episodes{rate}")


def play(
    plan: Plan,
    episodes: Sequence[Episode],
    films: Films | None,
    finish: Callable[[Outcome], None],
    update: Callable[[], None],
    stop: StopRequest,
) -> None:
    """Play `episodes` in `config.actors` processes or fewer.

    `finish` is told what came of each, and `update` is called now and then. Raises what `evaluate` does.
    """
    checkpoint, mode = plan.checkpoint, plan.mode
    config = plan.config.model_copy(update={"actors": min(plan.config.actors, len(episodes))})
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
        rate_hz = TABLETOP_RATE_HZ if config.env.name == "tabletop" else LIBERO_RATE_HZ
        video_dir = str(films.directory.absolute()) if films else None
        one_task = len({episode.task for episode in episodes}) == 1
        begin_with = episodes[0].number if one_task else None  # of several, a process compiles what it is given
        evaluation = {"video_dir": video_dir, "rate_hz": rate_hz, "begin_with": begin_with}
        env_config, notify_fds = config.env.model_dump(), [observation_ready]
        template = Template(
            arena, config.seed, env_config, wake, notify_fds, logs / "template.log", evaluation=evaluation
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


def writable_directory(option: str, path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}: cannot write to {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise ConfigError(f"{option}: cannot write to {path}")
    return path


def main(argv: Sequence[str]) -> int:
    stop = StopRequest()
    begin = time.monotonic()
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 120
    try:
        options = build_parser().parse_args(list(argv))
        plan = resolve(options)
        settings = identity(plan)
        with contextlib.ExitStack() as stack:
            out = None
            if options.out:
                out = stack.enter_context(contextlib.closing(ResultDirectory(Path(options.out), settings)))
            films = None
            if options.video:
                numbers = [episode.number for episode in across_tasks(plan.episodes)]
                films = Films(writable_directory("--video", Path(options.video)), options.videos, numbers)
            outcomes = evaluate(plan, out, films, stop, console)
            played = [outcomes[episode.number] for episode in plan.episodes]
            result = {
                **summarise(played),
                "policy": "base" if plan.mode == "base" else str(plan.checkpoint),
                "noise": plan.mode,
                "seed": plan.config.seed,
                "tasks": summarise_tasks(played, plan.instructions),
                "versions": settings.pop("versions"),
                "settings": settings,
                "wall_s": round(time.monotonic() - begin, 2),
            }
            if out is not None:
                out.finish(result)
    except ValueError as error:  # ConfigError, or what LIBERO or a checkpoint lacks
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if plan.config.env.name != "tabletop":
        console.print(table(result))
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
