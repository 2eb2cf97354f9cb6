"""The run directory: chosen, checked and locked."""

from __future__ import annotations

import fcntl
import itertools
from datetime import datetime
from pathlib import Path
from typing import IO

from dsrl_async.config.load import get_key, read_run_settings, validate
from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.run import checkpoints

FIXED_BY_RUN = (
    *("env.name", "env.layout", "env.render_quality"),
    *("sac.image_pool", "sac.conv_channels", "sac.conv_kernels", "sac.conv_strides", "sac.conv_padding"),
    *("sac.image_latent_dim", "sac.state_dim", "sac.state_latent_dim", "sac.hidden_dims", "sac.num_q_heads"),
    *("sac.actor_layer_norm", "sac.critic_layer_norm", "sac.noise_dim", "sac.noise_layout", "sac.alpha_type"),
)
"""Keys that a resumed run keeps: what it learned from, and what shapes its networks."""


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
    before = validate(read_run_settings(run_dir))
    for key in FIXED_BY_RUN:
        if key == "env.render_quality" and config.policy.ignore_render_quality:
            continue
        if (now := get_key(config, key)) != (saved := get_key(before, key)):
            forced = ", or set policy.ignore_render_quality" if key == "env.render_quality" else ""
            raise ConfigError(
                f"{key}: the resumed run was made with {saved}, not {now}; leave it so, or start a new run{forced}"
            )
