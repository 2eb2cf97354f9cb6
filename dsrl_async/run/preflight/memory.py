"""How much of the machine's memory a run needs, checked before it starts."""

from __future__ import annotations

import bisect
import dataclasses
from pathlib import Path
from typing import NamedTuple

from dsrl_async.config.settings import MOST_ACTORS, Config, ConfigError
from dsrl_async.envs import EnvironmentSpec, environment_record
from dsrl_async.host.machine import available_memory
from dsrl_async.pi0.files import read_config
from dsrl_async.pi0.memory import activation_bytes, buffer_bytes
from dsrl_async.pi0.tensors import find_tensors, parameter_count
from dsrl_async.run.preflight.policy import policy_directory
from dsrl_async.shm.arena import layout
from dsrl_async.shm.memory import run_fields

MODEL_PROCESS_BYTES = 500 << 20
"""Private memory of the inference process without the policy, and of the learner."""


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
    sizes = [size for size, before in zip(buckets, [0, *buckets], strict=False) if before < config.actors]
    of_one = (policy, 1, policy.max_token_len, bytes_per_value)
    return (
        parameter_count(policy) * bytes_per_value
        + sum(sizes) * buffer_bytes(*of_one)
        + sizes[-1] * activation_bytes(*of_one)
    )


def actor_bytes(config: Config) -> int:
    """Estimated private memory of one actor."""
    return environment_record(config.env.model_dump()).worker_bytes


def template_bytes(config: Config) -> int:
    """Estimated memory of the actors' template, which they share."""
    return environment_record(config.env.model_dump()).template_bytes


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
