"""Demonstrations are looked at before anything starts: what is in the files, and whether the policy can be inverted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dsrl_async.config.settings import ConfigError
from dsrl_async.run import demonstrations
from dsrl_async.run.preflight.checked_run import CheckedRun

KEY = "replay.demonstrations"


def check_demonstrations(run: CheckedRun) -> CheckedRun:
    """The run, which knows how many rows its demonstrations have; raises ConfigError if they cannot be used.

    A run that is resumed has made its rows, and its files are not asked for any more.
    """
    config = run.config
    if config.replay.demonstrations is None:
        return run
    if not run.policy.normalised:
        raise ConfigError(
            f"{KEY}: they become noise by running a Pi0 backwards, and {run.policy.type} is none; leave it out"
        )
    if config.env.reward == "environment":
        raise ConfigError(
            f"{KEY}: they say when the task succeeded, not what the environment would have rewarded; set "
            "env.reward to success"
        )
    try:
        rows = None
        if config.resume is not None and config.run_dir is not None:
            rows = demonstrations.count_rows(Path(config.run_dir))
        if rows is None:
            rows = demonstrations.count(config, run.spec).rows
    except ValueError as error:
        raise ConfigError(f"{KEY}: {error}") from error
    if not rows:
        raise ConfigError(f"{KEY}: there is no demonstration in the files; give others, or leave it out")
    return dataclasses.replace(run, demonstration_rows=rows)
