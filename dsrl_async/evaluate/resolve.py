"""What an evaluation's command line asks for: its configuration, policy and episodes, and what identifies it."""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from dsrl_async import __version__
from dsrl_async.config.command_line import make_paths_absolute, override
from dsrl_async.config.files import read_config
from dsrl_async.config.hub import hub_name
from dsrl_async.config.load import read_run_settings, validate
from dsrl_async.config.settings import Config, ConfigError, EvaluationConfig
from dsrl_async.envs import EnvironmentRecord, libero_files
from dsrl_async.groups.placing import local_gpus
from dsrl_async.groups.ray_placement import check_library
from dsrl_async.host.device import resolve_device
from dsrl_async.host.environments import environment_record
from dsrl_async.host.machine import available_cpus
from dsrl_async.host.waiting import waiting
from dsrl_async.pi0.checkpoint import resolve_dtype
from dsrl_async.run import checkpoints, preflight
from dsrl_async.run.evaluation.episodes import Episode, parse_numbers, plan_suite, what_repeats
from dsrl_async.run.evaluation.files import find_best
from dsrl_async.run.instructions import learned_by
from dsrl_async.run.preflight import CheckedRun

Mode = Literal["stochastic", "deterministic", "base"]

OF_GROUPS = ("group.gpus", "group.cpus", "group.wait_s")
SETTINGS = ("env.", "policy.", "sac.", "inference.", "device", "heartbeat_timeout_s", *OF_GROUPS)
"""Settings, or prefixes of their names, that an evaluation uses."""

MOST_EPISODES = 1_000_000
"""Upper limit on `--episodes`."""
MAX_PROCESSES = 16
"""Upper limit on the number of environment workers unless `--processes` says otherwise."""
DIGEST_BYTES = 2 << 30
"""Weights of up to this size are identified by a digest, larger ones by their size and date."""


class Evaluation(NamedTuple):
    """An evaluation that is asked for."""

    run: CheckedRun
    """Its settings have the evaluation's own `seed`, and its number of environment workers as `actors`."""
    checkpoint: Path | None
    """The checkpoint directory whose agent steers the policy; None if the policy is not steered."""
    mode: Mode
    """How the policy's noise is chosen."""
    episodes: list[Episode]
    groups: int = 1
    """How many groups with a policy and `actors` environment workers each play them."""
    ray: str | None = None
    """Address of the Ray cluster on whose machines the groups are, or `auto`; None: all of them are on this machine."""

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def grouped(self) -> bool:
        """Whether others play than this process."""
        return self.groups > 1 or self.ray is not None


class Part(NamedTuple):
    """One of the evaluations that a command line asks for: one suite with one policy."""

    suite: str
    """The name of the environment: `env.name`."""
    policy: Literal["base", "steered"]
    evaluation: Evaluation


def resolve_all(options: argparse.Namespace) -> tuple[list[Part], list[str]]:
    """Return the evaluations that the options ask for, and warnings about them.

    Those of a suite come one after the other, the base policy first.

    Raises ValueError (often a ConfigError) with one sentence if one of them cannot be played.
    """
    if options.compare and options.checkpoint is None:
        raise ConfigError("--compare plays the base policy and the steered one; give the latter's run as --checkpoint")
    if options.ray is not None and options.video:
        raise ConfigError("--video: films would be written on the machines of --ray; leave one of them out")
    if options.compare and options.base:
        raise ConfigError("--compare plays the base policy, too; leave out --base")
    parts = []
    suites, warnings = named_suites(options.suite)
    for suite in suites:
        for base in (True, False) if options.compare else (options.base,):
            one = {"suite": None if suite is None else [suite], "base": base}
            evaluation = resolve(argparse.Namespace(**{**vars(options), **one}))
            policy: Literal["base", "steered"] = "base" if evaluation.checkpoint is None else "steered"
            parts.append(Part(evaluation.run.environment.name, policy, evaluation))
            warnings += evaluation.run.warnings
    return parts, list(dict.fromkeys(warnings))


def named_suites(given: Sequence[str] | None) -> tuple[Sequence[str | None], list[str]]:
    """Return the suites that `--suite` names, each once, or only None if there is no such option, and warnings.

    A pattern, such as `libero_spatial*`, names all suites of the installed LIBERO that it fits and that can be played;
    the warnings say which cannot. Raises ConfigError if there are none, and ValueError if LIBERO is not installed.
    """
    if given is None:
        return [None], []
    named: dict[str, None] = {}
    left_out: dict[str, str] = {}
    for name in given:
        if set("*?[") & set(name):
            fitting = fnmatch.filter(libero_files.suites(), name)
            left_out |= {suite: reason for suite in fitting if (reason := why_not(suite))}
            found = [suite for suite in fitting if suite not in left_out]
        else:
            fitting = found = [name] if name.startswith(libero_files.PREFIX) else []
        if not fitting:
            raise ConfigError(
                f"--suite: {name!r} names no suite of LIBERO; give the name of one, such as libero_spatial"
            )
        if not found:
            raise ConfigError(f"--suite: {name!r} names no suite that can be played: {left_out[fitting[0]]}")
        named |= dict.fromkeys(found)
    return list(named), [f"left out: {left_out[suite]}" for suite in left_out if suite not in named]


def why_not(suite: str) -> str:
    """Return why a suite cannot be played, or nothing."""
    try:
        libero_files.check_tasks(suite, libero_files.selected_tasks(suite, None))
    except ValueError as error:
        return str(error)
    return ""


def resolve(options: argparse.Namespace) -> Evaluation:
    """Return the evaluation that the options ask for, which name one suite at most.

    Raises ValueError (often a ConfigError) with one sentence if it cannot be played.
    """
    suite: str | None
    (suite,) = options.suite or [None]
    for name in ("episodes", "processes", "videos", "groups"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name} must be at least 1")
        if (getattr(options, name) or 0) > MOST_EPISODES:
            raise ConfigError(f"--{name} must be at most {MOST_EPISODES}, whose outcomes are all kept in memory")
    if not 0 <= options.seed < 2**63:
        raise ConfigError("--seed must be in [0, 2^63)")
    settings, checkpoint = base_settings(options)
    before = validate(settings) if checkpoint is not None or suite is not None else None
    given = {key: text for key, text in vars(options).items() if key.startswith(SETTINGS)}
    if suite is not None:
        if given.get("env.name", suite) != suite:
            raise ConfigError("--env.name cannot be combined with --suite, which names the environment")
        given["env.name"] = suite
        settings["env"] = settings_for_suite(suite, settings.get("env") or {})
    override(settings, given)
    config = validate(settings)
    make_paths_absolute(config.policy)
    record = environment_record(config.env.model_dump())
    if record.suite is not None:
        preflight.check_files(record)  # of which the episodes are chosen
    episodes = choose_episodes(options, config, record)
    if record.suite is not None:
        everything = {"task_ids": None, "init_states": None, "scene_order": "cycled"}  # which the numbers count
        config = config.model_copy(update={"env": config.env.model_copy(update=everything)})
    groups, ray = min(options.groups, len(episodes)), options.ray
    if groups > 1 or ray is not None:
        config = config.model_copy(update={"device": device_of_groups(config, ray)})
    cores = available_cpus() if ray is not None else max(1, available_cpus() // groups)
    processes = MAX_PROCESSES if record.suite is None else min(MAX_PROCESSES, cores)
    actors = min(options.processes or processes, -(-len(episodes) // groups))
    alone = {"groups": 1, "ray": None}  # what a run had; the groups of an evaluation know nothing of each other
    own = {**alone, "actors": actors, "seed": options.seed, "profile": False, "evaluation": EvaluationConfig()}
    config = with_small_ring(config.model_copy(update=own))
    mode: Mode = options.noise or config.sac.evaluation_noise
    if checkpoint is None or options.base:
        checkpoint, mode = None, "base"
        nothing = {"instruction": "none", "instruction_dim": 0}  # there is nobody to be told its task
        config = config.model_copy(update={"sac": config.sac.model_copy(update=nothing)})
    run = preflight.check_run(config, before, wait=waiting, learning=False)
    if ray is None:
        preflight.check_devices(config, ["device"])
        check_groups(run, groups)
    if checkpoint is not None:
        assert before is not None
        if config.sac.instruction != (trained := before.sac.instruction):
            raise ConfigError(
                f"sac.instruction: the agent was trained with {trained}, not {config.sac.instruction}; leave it out"
            )
        played = {episode.task for episode in episodes} if record.suite is not None else range(len(run.spec.prompts))
        learned_by(checkpoint, config.sac, [run.spec.prompts[task] for task in sorted(played)])
    if mode == "deterministic" and record.suite is not None:
        how = record.settings["seeding"], "--episodes", "--noise stochastic"
        if (repeated := what_repeats(record.suite, episodes, *how)) is not None:
            raise ConfigError(f"--episodes: {repeated}")
    return Evaluation(run, checkpoint, mode, episodes, groups, ray)


def device_of_groups(config: Config, ray: str | None) -> str:
    """The device of each group; raises ConfigError if there is none such."""
    if config.group.gpus == 0:
        if config.device == "cuda":
            raise ConfigError("--device cuda asks for the GPU that --group.gpus 0 denies; leave one of them out")
        return "cpu"
    if ray is not None:
        check_library()
        return "cpu" if config.device == "cpu" else "cuda"
    return "cpu" if preflight.cuda_index(config, "device") is None else "cuda"


def check_groups(run: CheckedRun, groups: int) -> None:
    """Raises ConfigError unless this machine has a GPU for each of the groups, or the memory for all of them."""
    if groups > 1:
        if run.config.device == "cuda":
            local_gpus(groups, run.config.group.gpus, "--groups")
        preflight.check_memory(run, lower="--processes or --groups", learning=False, copies=groups)


def with_small_ring(config: Config) -> Config:
    """The same settings with the smallest replay ring, which the workers write and nobody reads."""
    replay = config.replay.model_copy(update={"capacity": 2 * config.actors})
    return config.model_copy(update={"replay": replay})


def settings_for_suite(suite: str, env: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the settings `env` that holds for all of a LIBERO suite."""
    left_out = {"task_ids", "init_states"}
    if libero_files.base_suite(str(env.get("name"))) != libero_files.base_suite(suite):
        left_out.add("max_episode_steps")  # each has its own, and its variations have the same
    return {key: value for key, value in env.items() if key not in left_out}


def choose_episodes(options: argparse.Namespace, config: Config, record: EnvironmentRecord) -> list[Episode]:
    """Return the episodes that the options and the configuration ask for; raise ValueError if there are no such."""
    if record.suite is not None:
        tasks = parse_numbers("--tasks", options.tasks) if options.tasks else config.env.task_ids
        states = parse_numbers("--init-states", options.init_states) if options.init_states else config.env.init_states
        return plan_suite(record.suite, tasks, states, options.episodes)
    if options.tasks is not None or options.init_states is not None:
        raise ConfigError("--tasks and --init-states are of LIBERO; give --suite, too")
    assert record.evaluation_episodes is not None
    return [Episode(number, 0, None) for number in range(options.episodes or record.evaluation_episodes)]


def base_settings(options: argparse.Namespace) -> tuple[dict[str, Any], Path | None]:
    """Return the settings of the run or file to evaluate, empty if there is none, and the run's checkpoint."""
    if options.best and options.checkpoint is None:
        raise ConfigError("--best is of a run; give that as --checkpoint")
    if options.checkpoint is None:
        return read_config(options.config) if options.config is not None else {}, None
    if options.config is not None:
        raise ConfigError("--config cannot be combined with --checkpoint: the run's own configuration is used")
    checkpoint = best_of(Path(options.checkpoint)) if options.best else checkpoints.find(Path(options.checkpoint))
    if checkpoint is None:
        what = "there is no checkpoint in it" if Path(options.checkpoint).exists() else "it does not exist"
        raise ConfigError(f"--checkpoint {options.checkpoint}: {what}; give a run directory, or one of its checkpoints")
    return read_run_settings(checkpoints.run_of(checkpoint)), checkpoint


def best_of(run_dir: Path) -> Path:
    """The best checkpoint of a run; raises ConfigError if it has none."""
    if (best := find_best(Path(os.path.abspath(run_dir)))) is None:
        raise ConfigError(
            f"--best: {run_dir} has no best checkpoint; a run with evaluation.every_decisions or "
            "evaluation.every_minutes keeps one, once an evaluation of its agent has ended"
        )
    return best[0]


def identity(evaluation: Evaluation) -> dict[str, Any]:
    """Return everything that outcomes depend on, ready for JSON, with the presets' values filled in."""
    run, config = evaluation.run, evaluation.config
    record = run.environment
    env = dict(record.settings)
    if record.suite is not None:
        env["task_ids"] = sorted({episode.task for episode in evaluation.episodes})
        env["init_states"] = sorted(
            {episode.init_state for episode in evaluation.episodes if episode.init_state is not None}
        )
    # the machines of a cluster have GPUs that this one may lack
    device = resolve_device(config.device) if evaluation.ray is None else torch.device(config.device)
    # so that an evaluation of an earlier version, which had no such setting, goes on
    unused = {"prefill_precision"} if config.policy.prefill_precision == "dtype" else set()
    steering = {}
    if evaluation.checkpoint is not None:
        agent = identify_files([evaluation.checkpoint / checkpoints.AGENT])
        steering = {
            "agent": str(evaluation.checkpoint.absolute()),
            "agent_files": agent,
            "sac": config.sac.model_dump(),
        }
    return {
        "episodes": len(evaluation.episodes),
        "seed": config.seed,
        "noise": evaluation.mode,
        "env": env,
        "policy": {
            **config.policy.model_dump(exclude={"graphs"} | unused),
            "checkpoint": _name_of_policy(run),
            "dtype": str(resolve_dtype(config.policy.dtype, device)).removeprefix("torch."),
            "files": identify_files(run.policy.files),
        },
        **steering,
        "device": device.type,
        "versions": versions(record.versions()),
    }


def _name_of_policy(run: CheckedRun) -> str | None:
    """A commit of the hub, or the absolute path of a checkpoint; None if the policy has none."""
    given, directory = run.config.policy.checkpoint, run.policy.directory
    if given is not None and hub_name(given):
        return given
    return None if directory is None else str(directory.absolute())


def versions(simulator: Mapping[str, str]) -> dict[str, str]:
    """Return the version of everything that success rates may depend on."""
    libraries = {name: version(name) for name in ("torch", "numpy")}
    return {"dsrl_async": __version__, "python": platform.python_version(), **libraries, **simulator}


def identify_files(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return each file's name, size and SHA-256, or for large files the time of their last change instead of a hash."""
    digest = sum(file.stat().st_size for file in files) <= DIGEST_BYTES
    found = []
    for file in files:
        status = file.stat()
        entry: dict[str, Any] = {"file": file.name, "bytes": status.st_size}
        if digest:
            with file.open("rb") as opened:
                entry["sha256"] = hashlib.file_digest(opened, "sha256").hexdigest()
        else:
            entry["modified"] = datetime.fromtimestamp(status.st_mtime, UTC).isoformat(timespec="seconds")
        found.append(entry)
    return found
