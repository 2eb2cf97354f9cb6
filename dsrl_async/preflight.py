"""Checks that need the machine and the files, made before anything is started; each failure is one sentence."""

from __future__ import annotations

import fcntl
import os
from datetime import datetime
from pathlib import Path
from typing import IO

import psutil

from dsrl_async import checkpoints
from dsrl_async.config import Config, ConfigError, read_yaml, save_yaml, validate
from dsrl_async.envs import EnvironmentSpec, environment_spec
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.shm.arena import layout
from dsrl_async.shm.memory import run_fields

EMBEDDED_POLICY = Path(__file__).resolve().parent / "assets" / "tabletop_pi0"
FIXED_BY_CHECKPOINT = (
    *("image_pool", "conv_channels", "conv_kernels", "conv_strides", "conv_padding", "image_latent_dim"),
    *("state_dim", "state_latent_dim", "hidden_dims", "num_q_heads", "actor_layer_norm", "critic_layer_norm"),
    *("noise_dim", "noise_layout"),
)
"""Keys of `sac` that shape the networks, so that a checkpoint fits only the values it was made with."""
ACTOR_BYTES, MODEL_PROCESS_BYTES = (
    80 << 20,
    500 << 20,
)  # private memory of an actor; of inference and of learner


def policy_directory(config: Config) -> Path:
    return Path(config.policy.checkpoint) if config.policy.checkpoint else EMBEDDED_POLICY


def check_policy(config: Config) -> tuple[Pi0Config, EnvironmentSpec]:
    """The policy's configuration and the environment's shapes; raises ConfigError unless they fit each other."""
    try:
        spec = environment_spec(config.env.model_dump())
    except ValueError as error:
        raise ConfigError(f"env.name: {error}") from error
    directory = policy_directory(config)
    for name in ("model.safetensors", "config.json", "norm_stats.json", "tokenizer.json"):
        if not (directory / name).is_file():
            raise ConfigError(f"policy.checkpoint: {directory} has no {name}; give a policy checkpoint directory")
    try:
        policy = Pi0Config.load(directory / "config.json")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for what, of_policy, of_env in (
        ("cameras", policy.cameras, spec.cameras),
        ("image size", policy.image_size, spec.image_size),
        ("robot state", policy.robot_state_dim, spec.state_dim),
        ("robot action", policy.robot_action_dim, spec.action_dim),
    ):
        if of_policy != of_env:
            raise ConfigError(
                f"policy.checkpoint: the {what} of {directory} is {of_policy}, "
                f"that of the environment {config.env.name} is {of_env}"
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
    return policy, spec


def available_memory() -> int:
    """Bytes that new processes can have: the machine's, or what a container's limit leaves if that is less."""
    available = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        available = min(available, int(text) - int(used.read_text()))
    return available


def check_memory(config: Config, spec: EnvironmentSpec, horizon: int) -> None:
    shared = layout(run_fields(config, spec, horizon))[1]
    weights = (policy_directory(config) / "model.safetensors").stat().st_size
    needed = shared + config.actors * ACTOR_BYTES + 2 * MODEL_PROCESS_BYTES + weights
    available = available_memory()
    if needed > available:
        raise ConfigError(
            f"this run needs about {needed / 2**30:.1f} GiB of memory ({shared / 2**30:.1f} of it shared, "
            f"mostly replay) and {available / 2**30:.1f} are available; lower replay.capacity or actors"
        )


def check_device(config: Config) -> None:
    if config.device == "cuda":
        import torch  # only here: the supervisor does without

        if not torch.cuda.is_available():
            raise ConfigError("device: cuda was asked for, but torch finds no CUDA device; use auto or cpu")


def open_run_directory(config: Config) -> tuple[Path, IO[str]]:
    """Make or reopen the run directory and lock it; returns it and the lock, which is held while it is open.

    Raises:
        ConfigError: it cannot be written, holds another run, or belongs to a run that is going on.
    """
    if config.run_dir is not None:
        run_dir = Path(config.run_dir)
    else:
        run_dir = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.env.name}"
    if config.resume is None and run_dir.is_dir() and any(run_dir.iterdir()):
        raise ConfigError(
            f"run_dir: {run_dir} is not empty; choose another one, or continue it with --resume {run_dir}"
        )
    if config.resume is not None:
        if checkpoints.find(run_dir) is None:
            raise ConfigError(f"--resume {run_dir}: it has no checkpoint to continue from")
        before = validate(read_yaml(run_dir / "config.yaml"))
        for name in FIXED_BY_CHECKPOINT:
            if getattr(config.sac, name) != (saved := getattr(before.sac, name)):
                raise ConfigError(f"sac.{name}: the networks of the resumed run were made with {saved}; leave it so")
    try:
        for directory in (run_dir / "logs", run_dir / "checkpoints"):
            directory.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"run_dir: cannot write to {run_dir}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConfigError(f"run_dir: {run_dir} is in use by another process") from error
    save_yaml(config, run_dir / "config.yaml")
    return run_dir, lock


def cpu_threads(wanted: int | None) -> int:
    """Threads of a model process: as configured, or a quarter of the cores this process may use, at least one."""
    return wanted or max(1, len(os.sched_getaffinity(0)) // 4)
