"""The environments that a worker steps, behind one chunk-at-a-time protocol.

Nothing here imports torch, and asking what is known of a shipped environment does not import a simulator, so that
processes which only need that stay small.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsrl_async.envs import libero_files
from dsrl_async.envs.protocol import (
    ChunkOutcome,
    Environment,
    EnvironmentRecord,
    EnvironmentSpec,
    NumberedScenes,
    Settings,
    UserEnvironment,
    check_chunk,
)
from dsrl_async.envs.shipped import LIBERO_SETTINGS, TABLETOP_SETTINGS, libero_record, tabletop_record
from dsrl_async.envs.user import USER_SETTINGS, describe, user_record

__all__ = [
    "OWN_SETTINGS",
    "ChunkOutcome",
    "Environment",
    "EnvironmentRecord",
    "EnvironmentSpec",
    "NumberedScenes",
    "UserEnvironment",
    "check_chunk",
    "environment_record",
    "environment_spec",
    "make_environment",
    "shipped_record",
]

OWN_SETTINGS = TABLETOP_SETTINGS | LIBERO_SETTINGS | USER_SETTINGS
"""The keys of `env` that only environments of one kind read; every environment reads the others."""


def shipped_record(settings: Settings) -> EnvironmentRecord | None:
    """What is known of the environment with these settings, if it comes with this package."""
    name = settings["name"]
    if name == "tabletop":
        return tabletop_record(settings)
    # Which suites there are is LIBERO's matter, see `libero_files.task_names`.
    if name.startswith(libero_files.PREFIX) and ":" not in name:
        return libero_record(settings)
    return None


def environment_record(settings: Settings) -> EnvironmentRecord:
    """What is known of the environment with these settings; raises ValueError if there is none of that name.

    For a user's environment this imports the user's module. It is meant for environment workers, their template and
    tests; every other process asks `dsrl_async.host.environments.environment_record`. The two are the one place where
    a name becomes an environment.
    """
    return shipped_record(settings) or user_record(settings, describe(settings))


def environment_spec(settings: Settings) -> EnvironmentSpec:
    """The shapes of the environment; raises ValueError as `environment_record` and its `spec` do."""
    return environment_record(settings).spec()


def make_environment(settings: Settings, agent_cameras: Sequence[int] = (0,)) -> Environment:
    """Makes the environment, which shows the agent the cameras of these numbers (`sac.cameras`).

    Raises ValueError as `environment_record` and its `make` do.
    """
    return environment_record(settings).make(agent_cameras)
