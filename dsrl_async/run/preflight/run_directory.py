"""The run directory: chosen, checked and locked."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.host.files import open_to_append
from dsrl_async.run import checkpoints
from dsrl_async.run.preflight.resume import check_resume

RUNS = Path("runs")
"""Where a run is written to that was given no directory."""


def open_run_directory(config: Config) -> tuple[Path, IO[str]]:
    """Make or reopen the run directory and lock it; returns it and the lock, which is held while it is open.

    Raises:
        ConfigError: it cannot be written, holds another run, belongs to a run that is going on, or has nothing that
            this configuration could continue.
    """
    run_dir = RUNS if config.run_dir is None else choose_run_directory(config)
    try:
        if config.run_dir is None:
            run_dir = _make_default(config)
        for directory in (run_dir / "logs", run_dir / "checkpoints"):
            directory.mkdir(parents=True, exist_ok=True)
        lock = os.fdopen(open_to_append(run_dir / "lock"), "a")
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
        run_dir = next(path for path in _default_names(config) if not path.exists())
    if config.resume is not None:
        check_resume(config, run_dir)
    elif run_dir.is_dir() and any(run_dir.iterdir()):
        saved = checkpoints.latest(run_dir) is not None
        advice = f"continue it with --resume {run_dir}" if saved else "delete it: nothing was saved there"
        raise ConfigError(f"run_dir: {run_dir} is not empty; choose another one, or {advice}")
    return run_dir


def _default_names(config: Config) -> Iterator[Path]:
    environment = re.sub(r"[^\w.-]+", "-", config.env.name)
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{environment}"
    return (RUNS / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))


def _make_default(config: Config) -> Path:
    """Make the first directory that there is not yet, even if another run does so at the same moment."""
    RUNS.mkdir(exist_ok=True)
    for run_dir in _default_names(config):
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir()
            return run_dir
    raise AssertionError("there is always a next name")
