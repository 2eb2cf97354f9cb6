"""How much of the machine's memory a run needs, checked before it starts."""

from __future__ import annotations

import bisect
from typing import NamedTuple

from dsrl_async.config.settings import MOST_ACTORS, Config, ConfigError
from dsrl_async.envs import EnvironmentRecord, EnvironmentSpec
from dsrl_async.host.machine import available_memory
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.memory import activation_bytes, buffer_bytes, weight_bytes
from dsrl_async.run.preflight.checked_run import CheckedRun
from dsrl_async.run.preflight.host import cuda_index
from dsrl_async.shm import order
from dsrl_async.shm.arena import layout
from dsrl_async.shm.memory import run_fields

MODEL_PROCESS_BYTES = 500 << 20
"""Upper estimate of the private memory of the learner, and of the inference process without the policy. A run's summary
has both as `memory_mb`: `python -m dsrl_async.launch --max-decisions 700`, where the policy takes 3 MB of it."""


def policy_bytes(config: Config, policy: Pi0Config) -> int:
    """Memory of the machine that the policy takes: weights, buffers and activations; none on a GPU.

    One prompt length is counted, the longest; a run seldom has more than two.
    """
    if cuda_index(config, "device") is not None:
        return 0
    bytes_per_value = 2 if config.policy.dtype == "bfloat16" else 4
    sizes, of_batch = config.batch_sizes(), (policy.max_token_len, bytes_per_value)
    return (
        weight_bytes(policy, bytes_per_value)
        + sum(buffer_bytes(policy, size, *of_batch, config.policy.denoise_steps) for size in sizes)
        + activation_bytes(policy, sizes[-1], *of_batch)
    )


class MemoryNeed(NamedTuple):
    """Estimated bytes of the machine's memory that a run takes."""

    shared: int
    """The run's shared memory, mostly the replay ring."""
    policy: int
    """Weights, buffers and activations, where they are not on a GPU."""
    template: int
    """What all environment workers share."""
    worker: int
    """Private memory of one worker with its environment."""
    workers: int
    """How many workers."""

    @property
    def without_workers(self) -> int:
        return self.shared + self.policy + self.template + 2 * MODEL_PROCESS_BYTES

    @property
    def total(self) -> int:
        return self.without_workers + self.workers * self.worker


def memory_needed(
    config: Config, environment: EnvironmentRecord, spec: EnvironmentSpec, policy: Pi0Config
) -> MemoryNeed:
    """What a run needs with an environment of these shapes, which need not be installed."""
    return MemoryNeed(
        shared=layout(run_fields(config, spec, policy.action_horizon))[1],
        policy=policy_bytes(config, policy),
        template=environment.template_bytes,
        worker=environment.worker_bytes,
        workers=config.lanes,
    )


def actors_that_fit(
    config: Config, environment: EnvironmentRecord, spec: EnvironmentSpec, policy: Pi0Config, memory: float
) -> int:
    """The most environment workers with which the run needs no more than `memory` bytes; 0 if not even one fits."""

    def need(actors: int) -> int:
        return memory_needed(config.model_copy(update={"actors": actors}), environment, spec, policy).total

    return bisect.bisect_right(range(1, MOST_ACTORS + 1), memory, key=need)


def check_memory(run: CheckedRun, lower: str = "replay.capacity or actors") -> None:
    """Raises ConfigError where processes cannot share memory, or, which advises to `lower` something, where less of it
    is available than is needed."""
    try:
        order.barrier()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    need, available = memory_needed(run.config, run.environment, run.spec, run.policy.config), available_memory()
    if need.total > available:
        halve = need.policy > need.shared and run.config.policy.dtype != "bfloat16"
        raise ConfigError(
            f"this run needs about {need.total / 2**30:.1f} GiB of memory ({need.shared / 2**30:.1f} of it shared, "
            f"mostly replay, and {need.policy / 2**30:.1f} the policy's) and {available / 2**30:.1f} are available; "
            f"lower {lower}{', or set policy.dtype to bfloat16' if halve else ''}"
        )
