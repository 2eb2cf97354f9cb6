"""A run whose parts are there and fit each other, as everything after the check takes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from dsrl_async.config.settings import Config
from dsrl_async.envs import EnvironmentRecord, EnvironmentSpec
from dsrl_async.host.environments import environment_record
from dsrl_async.host.waiting import silence
from dsrl_async.policies import PolicyRecord
from dsrl_async.run.evaluation.episodes import held_out
from dsrl_async.run.preflight.hub import do_nothing, fetch_policy
from dsrl_async.run.preflight.policy import (
    check_algorithm,
    check_checkpoint,
    check_environment,
    check_files,
    check_fit,
    check_graphics,
    check_instructions,
    check_prompts,
    check_render_quality,
    fit_agent,
)


@dataclass(frozen=True)
class CheckedRun:
    """What `check_run` has found out, so that nobody in this process asks or reads it again."""

    config: Config
    """The settings, with the widths of environment and policy where the user gave none."""
    environment: EnvironmentRecord
    spec: EnvironmentSpec
    """The shapes of the environment."""
    policy: PolicyRecord
    """What is known of the policy."""
    warnings: tuple[str, ...] = ()
    """What the user should know of the environment's files and prompts, and of the policy."""

    demonstration_rows: int = 0
    """Rows of the demonstrations, see `check_demonstrations`."""

    @property
    def horizon(self) -> int:
        """Action slots of one sampled chunk."""
        return self.policy.spec.action_horizon

    def with_actors(self, actors: int) -> CheckedRun:
        """The same with another number of environments, on which nothing depends that was checked."""
        return dataclasses.replace(self, config=self.config.model_copy(update={"actors": actors}))


def check_run(
    config: Config,
    before: Config | None = None,
    meanwhile: Callable[[], object] = do_nothing,
    wait: Callable[[str], AbstractContextManager[object]] = silence,
    learning: bool = True,
) -> CheckedRun:
    """Reads the policy's files; raises ConfigError unless policy, environment and agent are there and fit each other.

    A policy of the hub is downloaded first, see `fetch_policy`, and the run's settings then name its commit.
    What the machine has to have for the run is checked by itself: `check_memory`, `check_devices`, `check_descriptors`.
    `before` are settings that have been accepted already, see `check_effect`. `wait` says what is being done, but for
    the download, which says it itself. Without `learning`, the instructions need not be those that the agent learned
    with, which is for the caller to check.
    """
    with wait("asking the environment for its shapes"):
        spec = check_environment(config, before)
    config = fetch_policy(config, meanwhile)
    with wait("reading the policy's files"):
        policy = check_checkpoint(config, before)
    config = fit_agent(config, policy.spec, spec)
    check_fit(config, policy.spec, spec)
    check_algorithm(config, policy)
    told = check_prompts(policy, spec)
    told += check_instructions(config, policy, spec, before) if learning else ()
    check_render_quality(config, policy.maker)
    environment = environment_record(config.env.model_dump())
    check_graphics(environment)
    if config.evaluation.lanes:
        held_out(environment, config)
    return CheckedRun(config, environment, spec, policy, (*check_files(environment), *policy.warnings, *told))
