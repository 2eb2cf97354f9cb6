"""The run directory: chosen, checked and locked."""

from __future__ import annotations

import fcntl
import itertools
from datetime import datetime
from pathlib import Path
from typing import IO

from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.run import checkpoints
from dsrl_async.run.preflight.resume import check_resume


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
        saved = checkpoints.latest(run_dir) is not None
        advice = f"continue it with --resume {run_dir}" if saved else "delete it: nothing was saved there"
        raise ConfigError(f"run_dir: {run_dir} is not empty; choose another one, or {advice}")
    return run_dir
