"""Checks that need the machine and the files, made before anything is started; each failure is one sentence."""

from __future__ import annotations

import bisect
import dataclasses
import fcntl
import itertools
from datetime import datetime
from pathlib import Path
from typing import IO, NamedTuple

from dsrl_async import checkpoints, processes
from dsrl_async.config import MOST_ACTORS, Config, ConfigError, get_key, read_yaml, validate
from dsrl_async.envs import EnvironmentSpec, environment_spec, libero_files
from dsrl_async.machine import available_cpus, available_memory
from dsrl_async.pi0.config import CONFIG, EMBEDDED_POLICY, Pi0Config
from dsrl_async.pi0.files import PolicyFiles, find_policy, read_config
from dsrl_async.pi0.memory import activation_bytes, buffer_bytes
from dsrl_async.pi0.tensors import find_tensors, parameter_count, read_json
from dsrl_async.shm.arena import layout
from dsrl_async.shm.memory import run_fields

FIXED_BY_RUN = (
    *("env.name", "env.layout", "env.render_quality"),
    *("sac.image_pool", "sac.conv_channels", "sac.conv_kernels", "sac.conv_strides", "sac.conv_padding"),
    *("sac.image_latent_dim", "sac.state_dim", "sac.state_latent_dim", "sac.hidden_dims", "sac.num_q_heads"),
    *("sac.actor_layer_norm", "sac.critic_layer_norm", "sac.noise_dim", "sac.noise_layout", "sac.alpha_type"),
)
"""Keys that a resumed run keeps: what it learned from, and what shapes its networks."""
TRAINING = "training.json"
"""A file that a checkpoint of this project may hold: what it was trained on, such as {"render_quality": "fast"}."""
SPARE_DESCRIPTORS = 64
ACTOR_BYTES = 20 << 20
"""Private memory of an actor of the tabletop, beside what it shares with the template."""
ENVIRONMENT_BYTES = 2 << 20
"""Of each further environment in such an actor."""
LIBERO_ACTOR_BYTES = {"exact": 700 << 20, "fast": 300 << 20}
"""Private memory of an environment of LIBERO, by `env.render_quality`: mostly what the graphics keep."""
TEMPLATE_BYTES = 100 << 20
"""What the template and its actors share: imported modules."""
LIBERO_SCENE_BYTES = 700 << 20
"""A compiled scene of LIBERO, with room for what compiling it takes for a moment. It is the template's if there is but
one task, and else each environment's own."""
MODEL_PROCESS_BYTES = 500 << 20
"""Private memory of the inference process without the policy, and of the learner."""


def policy_directory(config: Config) -> Path:
    return Path(config.policy.checkpoint) if config.policy.checkpoint else EMBEDDED_POLICY


def check_policy(config: Config) -> tuple[Pi0Config, EnvironmentSpec]:
    """The policy's configuration and the environment's shapes; raises ConfigError unless they fit each other."""
    spec, policy = check_environment(config), check_checkpoint(config).config
    check_fit(config, policy, spec)
    check_render_quality(config)
    return policy, spec


def check_environment(config: Config) -> EnvironmentSpec:
    """The environment's shapes; raises ConfigError when it is not installed, or has no such task or initial state."""
    env = config.env
    try:
        spec = environment_spec(env.model_dump())
        if env.name != "tabletop" and env.init_states is not None:
            for task in libero_files.selected_tasks(env.name, env.task_ids):
                libero_files.selected_init_states(env.name, task, env.init_states)
        return spec
    except ValueError as error:
        key = "" if str(error).startswith("env.") else "env.name: "
        raise ConfigError(f"{key}{error}") from error


def check_checkpoint(config: Config) -> PolicyFiles:
    """What the policy's checkpoint holds; raises ConfigError when it is incomplete or contradicts itself."""
    try:
        return find_policy(policy_directory(config), **config.policy.overrides())
    except ValueError as error:
        key = "" if str(error).startswith("policy.") else "policy.checkpoint: "
        raise ConfigError(f"{key}{error}") from error


def check_fit(config: Config, policy: Pi0Config, spec: EnvironmentSpec) -> None:
    """Raises ConfigError unless policy, environment and agent have the same shapes."""
    directory, suite = policy_directory(config), config.env.name
    if config.policy.checkpoint is None and suite != "tabletop":
        ours = ", or --config configs/libero_spatial_small.yaml" if suite == "libero_spatial" else ""
        raise ConfigError(
            f"policy.checkpoint: null means the tabletop's policy; for {suite} give --policy.checkpoint DIR{ours}"
        )
    for what, of_policy, of_env in (
        ("cameras", policy.cameras, spec.cameras),
        ("image size", policy.image_size, spec.image_size),
        ("robot state", policy.robot_state_dim, spec.state_dim),
        ("robot action", policy.robot_action_dim, spec.action_dim),
    ):
        if of_policy != of_env:
            raise ConfigError(
                f"policy.checkpoint: the {what} of {directory} is {of_policy}, "
                f"that of the environment {suite} is {of_env}"
                f"{f'; set env.image_size to {of_policy}' if what == 'image size' and suite != 'tabletop' else ''}"
            )
    if config.env.chunk > policy.action_horizon:
        raise ConfigError(
            f"env.chunk: {config.env.chunk} is more than the policy's {policy.action_horizon} action slots"
        )
    if config.sac.noise_dim != policy.action_dim:
        raise ConfigError(
            f"sac.noise_dim: {config.sac.noise_dim} must be the policy's action width, {policy.action_dim}"
        )
    if config.sac.state_dim != spec.state_dim:
        raise ConfigError(f"sac.state_dim: {config.sac.state_dim} must be the robot state's width, {spec.state_dim}")


def checkpoint_maker(directory: Path) -> str:
    """Whose layout a policy checkpoint has: `dsrl_async`, `LeRobot` or `openpi or RLinf`.

    Raises ValueError when its config.json cannot be read.
    """
    content = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    if "type" in content:
        return "LeRobot"
    return "dsrl_async" if Pi0Config.wrote(content) else "openpi or RLinf"


def trained_quality(directory: Path) -> str | None:
    """The `env.render_quality` of the pictures that a policy was trained on; None if nobody says.

    Raises ValueError naming the file that cannot be understood.
    """
    if (directory / TRAINING).is_file():
        quality = read_json(directory / TRAINING).get("render_quality")
        if quality not in (None, "exact", "fast"):
            raise ValueError(f"{directory / TRAINING}: render_quality is {quality!r}, it must be exact or fast")
        return quality
    return None if checkpoint_maker(directory) == "dsrl_async" else "exact"


def check_render_quality(config: Config) -> None:
    """Raises ConfigError when the policy was trained on other pictures than the run would show it."""
    if config.env.name == "tabletop" or config.policy.ignore_render_quality:
        return
    directory = policy_directory(config)
    try:
        trained = trained_quality(directory)
    except ValueError as error:
        raise ConfigError(f"policy.checkpoint: {error}") from error
    if trained not in (None, config.env.render_quality):
        raise ConfigError(
            f"env.render_quality: the policy {directory} was trained on {trained} pictures, not on "
            f"{config.env.render_quality} ones; set it to {trained}, or policy.ignore_render_quality to true"
        )


def policy_bytes(config: Config, horizon: int) -> int:
    """Memory of the machine that the policy takes: weights, samplers' buffers and activations; none on a GPU.

    One prompt length is counted, the longest; a run seldom has more than two.
    """
    if config.device == "cuda" or (config.device == "auto" and Path("/dev/nvidiactl").exists()):
        return 0
    directory = policy_directory(config)
    policy = dataclasses.replace(read_config(directory, find_tensors(directory)), action_horizon=horizon)
    bytes_per_value = 2 if config.policy.dtype == "bfloat16" else 4
    buckets = config.inference.buckets
    sizes = [size for size, before in zip(buckets, [0, *buckets], strict=False) if before < config.lanes]
    of_one = (policy, 1, policy.max_token_len, bytes_per_value)
    return (
        parameter_count(policy) * bytes_per_value
        + sum(sizes) * buffer_bytes(*of_one)
        + sizes[-1] * activation_bytes(*of_one)
    )


def one_scene(config: Config) -> bool:
    """Whether all actors have the same compiled scene of LIBERO, which is then the template's."""
    return config.env.name != "tabletop" and len(config.env.task_ids or ()) == 1


def actor_bytes(config: Config) -> int:
    """Estimated private memory of one actor with its environments."""
    if config.env.name == "tabletop":
        return ACTOR_BYTES + (config.envs_per_actor - 1) * ENVIRONMENT_BYTES
    own_scene = 0 if one_scene(config) else LIBERO_SCENE_BYTES
    return config.envs_per_actor * (LIBERO_ACTOR_BYTES[config.env.render_quality] + own_scene)


def template_bytes(config: Config) -> int:
    """Estimated memory of the actors' template, which they share; it has compiled the scene of each of an actor's
    environments."""
    return TEMPLATE_BYTES + (config.envs_per_actor * LIBERO_SCENE_BYTES if one_scene(config) else 0)


class MemoryNeed(NamedTuple):
    """Estimated bytes of the machine's memory that a run takes."""

    shared: int
    """The run's shared memory, mostly the replay ring."""
    policy: int
    """Weights, buffers and activations, where they are not on a GPU."""
    template: int
    """What all actors share."""
    actor: int
    """Private memory of one actor with its environments."""
    actors: int
    """How many actors."""

    @property
    def without_actors(self) -> int:
        return self.shared + self.policy + self.template + 2 * MODEL_PROCESS_BYTES

    @property
    def total(self) -> int:
        return self.without_actors + self.actors * self.actor


def memory_needed(config: Config, spec: EnvironmentSpec, horizon: int) -> MemoryNeed:
    return MemoryNeed(
        shared=layout(run_fields(config, spec, horizon))[1],
        policy=policy_bytes(config, horizon),
        template=template_bytes(config),
        actor=actor_bytes(config),
        actors=config.actors,
    )


def actors_that_fit(config: Config, spec: EnvironmentSpec, horizon: int, memory: float) -> int:
    """The most actors with which the run needs no more than `memory` bytes; 0 if not even one fits."""

    def need(actors: int) -> int:
        return memory_needed(config.model_copy(update={"actors": actors}), spec, horizon).total

    return bisect.bisect_right(range(1, MOST_ACTORS + 1), memory, key=need)


def check_memory(config: Config, spec: EnvironmentSpec, horizon: int, lower: str = "replay.capacity or actors") -> None:
    """Raises ConfigError, which advises to `lower` something, where less memory is available than is needed."""
    need, available = memory_needed(config, spec, horizon), available_memory()
    if need.total > available:
        halve = need.policy > need.shared and config.policy.dtype != "bfloat16"
        raise ConfigError(
            f"this run needs about {need.total / 2**30:.1f} GiB of memory ({need.shared / 2**30:.1f} of it shared, "
            f"mostly replay, and {need.policy / 2**30:.1f} the policy's) and {available / 2**30:.1f} are available; "
            f"lower {lower}{', or set policy.dtype to bfloat16' if halve else ''}"
        )


def check_device(key: str, name: str | None) -> None:
    """Raises ConfigError where the CUDA device that the setting `key` asks for is not there."""
    if name is not None and name.startswith("cuda"):
        import torch  # only here: the supervisor does without

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ConfigError(f"{key}: {name} was asked for, but torch finds no CUDA device; leave it out, or use cpu")
        if int(name.partition(":")[2] or 0) >= count:
            raise ConfigError(f"{key}: {name} was asked for, but the last of torch's CUDA devices is cuda:{count - 1}")


def open_run_directory(config: Config) -> tuple[Path, IO[str]]:
    """Make or reopen the run directory and lock it; returns it and the lock, which is held while it is open.

    Raises:
        ConfigError: it cannot be written, holds another run, belongs to a run that is going on, or has nothing that
            this configuration could continue.
    """
    run_dir = choose_run_directory(config)
    try:
        for directory in (run_dir / "logs", run_dir / "checkpoints"):
            directory.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"run_dir: cannot write to {run_dir}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"run_dir: {run_dir} is in use by another process") from error
    except OSError:
        pass  # this file system has no locks
    return run_dir, lock


def choose_run_directory(config: Config) -> Path:
    """The run directory, which need not exist yet; raises ConfigError when this run cannot be written there."""
    if config.run_dir is not None:
        run_dir = Path(config.run_dir)
    else:
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{config.env.name}"
        names = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
        run_dir = next(path for path in map(Path("runs").joinpath, names) if not path.exists())
    if config.resume is not None:
        check_resume(config, run_dir)
    elif run_dir.is_dir() and any(run_dir.iterdir()):
        raise ConfigError(
            f"run_dir: {run_dir} is not empty; choose another one, or continue it with --resume {run_dir}"
        )
    return run_dir


def check_resume(config: Config, run_dir: Path) -> None:
    if (checkpoint := checkpoints.find(run_dir)) is None:
        raise ConfigError(f"--resume {run_dir}: it has no checkpoint to continue from")
    done = sum(checkpoints.read_state(checkpoint)["counters"]["actor_decisions"])
    if config.max_decisions is not None and done >= config.max_decisions:
        raise ConfigError(f"max_decisions: {done} of {config.max_decisions} are done already; give a larger number")
    before = validate(read_yaml(run_dir / "config.yaml"))
    for key in FIXED_BY_RUN:
        if key == "env.render_quality" and config.policy.ignore_render_quality:
            continue
        if (now := get_key(config, key)) != (saved := get_key(before, key)):
            forced = ", or set policy.ignore_render_quality" if key == "env.render_quality" else ""
            raise ConfigError(
                f"{key}: the resumed run was made with {saved}, not {now}; leave it so, or start a new run{forced}"
            )


def check_descriptors(config: Config, key: str = "actors") -> None:
    """Every actor has an event of its own, which is an open file; raises ConfigError, naming `key`, if it may not."""
    limit = processes.raise_descriptor_limit()
    if config.actors + SPARE_DESCRIPTORS > limit:
        raise ConfigError(f"{key}: {config.actors} need more open files than the limit of {limit}; raise `ulimit -n`")


def cpu_threads(wanted: int | None) -> int:
    """Threads of a model process: as configured, or a quarter of the cores this process may use, at least one."""
    return wanted or max(1, available_cpus() // 4)
