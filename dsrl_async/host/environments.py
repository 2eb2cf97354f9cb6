"""What is known of an environment, for the processes that must not import a user's module: a child is asked."""

from __future__ import annotations

from dsrl_async.config.settings import ConfigError
from dsrl_async.envs import EnvironmentRecord, EnvironmentSpec, shipped_record, user
from dsrl_async.envs.protocol import Settings
from dsrl_async.host import probe

TIME_LIMIT_S = 120.0
"""How long a user's module may take to be imported, and its function to return."""


def environment_record(settings: Settings) -> EnvironmentRecord:
    """What is known of the environment with these settings; raises ConfigError if there is none of that name.

    This and `dsrl_async.envs.environment_record`, which imports a user's module here, are the one place where a name
    becomes an environment. A child is asked once for each environment, whatever comes of it.
    """
    if (shipped := shipped_record(settings)) is not None:
        return shipped
    question = {"name": settings["name"], "options": settings["options"]}
    silence = f"env.name: the process that was to say what {settings['name']} is did not answer"
    asked = probe.ask_once(user.answer, question, TIME_LIMIT_S, silence)
    if "refused" in asked:
        raise ConfigError(asked["refused"])
    return user.user_record(settings, asked["described"])


def environment_spec(settings: Settings) -> EnvironmentSpec:
    """The shapes of the environment; raises ValueError as `environment_record` and its `spec` do."""
    return environment_record(settings).spec()
