"""The environments that a worker steps, behind one chunk-at-a-time protocol.

Nothing here imports torch, and asking what is known of an environment does not import a simulator, so that processes
which only need that stay small.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsrl_async.envs import libero_files
from dsrl_async.envs.libero_files import SUITES
from dsrl_async.envs.protocol import (
    ChunkOutcome,
    Environment,
    EnvironmentRecord,
    EnvironmentSpec,
    Settings,
    check_chunk,
)
from dsrl_async.envs.shipped import libero_record, tabletop_record

__all__ = [
    "ChunkOutcome",
    "Environment",
    "EnvironmentRecord",
    "EnvironmentSpec",
    "check_chunk",
    "environment_record",
    "environment_spec",
    "make_environment",
]


def environment_record(settings: Settings) -> EnvironmentRecord:
    """What is known of the environment with these settings; raises ValueError if there is none of that name.

    This is the one place where a name becomes an environment, and one of two doors for a user's own: the other is
    `env.name` in config/settings.py, which today admits only the shipped names.
    """
    name = settings["name"]
    if name == "tabletop":
        return tabletop_record(settings)
    if name.startswith(libero_files.PREFIX):  # which suites there are is LIBERO's matter, see `libero_files.task_names`
        return libero_record(settings)
    raise ValueError(f"unknown environment {name!r}; choose one of tabletop, {', '.join(SUITES)}")


def environment_spec(settings: Settings) -> EnvironmentSpec:
    """The shapes of the environment; raises ValueError as `environment_record` and its `spec` do."""
    return environment_record(settings).spec()


def make_environment(settings: Settings, agent_cameras: Sequence[int] = (0,)) -> Environment:
    """Makes the environment, which shows the agent the cameras of these numbers (`sac.cameras`).

    Raises ValueError as `environment_record` and its `make` do.
    """
    return environment_record(settings).make(agent_cameras)
