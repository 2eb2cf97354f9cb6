"""How much of the machine's memory a run needs, checked before it starts."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from dsrl_async.config.load import get_key
from dsrl_async.config.settings import MOST_ACTORS, Config, ConfigError
from dsrl_async.envs import EnvironmentRecord, EnvironmentSpec
from dsrl_async.host.machine import available_memory
from dsrl_async.policies import PolicyNeeds
from dsrl_async.run.preflight.checked_run import CheckedRun
from dsrl_async.run.preflight.gpu_memory import WORTH_SAYING
from dsrl_async.run.preflight.host import cuda_index
from dsrl_async.run.preflight.learner_memory import (
    acting_bytes,
    learner_bytes,
    policy_copy,
    prefixes_bytes,
    row_bytes,
    row_of,
)
from dsrl_async.shm import order
from dsrl_async.shm.arena import layout
from dsrl_async.shm.memory import demonstration_fields, run_fields

MODEL_PROCESS_BYTES = 500 << 20
"""Upper estimate of the private memory of the learner, and of the inference process, without agent and policy. A run's
summary has both as `memory_mb`: `python -m dsrl_async.launch --max-decisions 700`, where policy and agent are small."""


def policy_bytes(config: Config, policy: PolicyNeeds) -> int:
    """Memory of the machine that the policy takes: weights, buffers and activations; none on a GPU.

    One prompt length is counted, the longest; a run seldom has more than two.
    """
    if cuda_index(config, "device") is not None:
        return 0
    batches = [policy.memory(config.policy, False, size, policy.longest_prompt) for size in config.batch_sizes()]
    return batches[0].weights + sum(batch.buffers for batch in batches) + batches[-1].activations


class MemoryNeed(NamedTuple):
    """Estimated bytes of the machine's memory that a run takes."""

    shared: int
    """The run's shared memory, mostly the replay ring."""
    policy: int
    """Weights, buffers and activations, where they are not on a GPU."""
    agent: int
    """Networks, optimisers, batches and DSRL-NA's copy of the policy in the learner, an actor in the inference process,
    where they are not on a GPU, and checkpoints while they are written."""
    template: int
    """What all environment workers share."""
    worker: int
    """Private memory of one worker with its environment."""
    workers: int
    """How many workers."""

    @property
    def without_workers(self) -> int:
        return self.shared + self.policy + self.agent + self.template + 2 * MODEL_PROCESS_BYTES

    @property
    def total(self) -> int:
        return self.without_workers + self.workers * self.worker


def agent_bytes(config: Config, policy: PolicyNeeds, learning: bool) -> int:
    """Memory of the machine that the agent takes, with the learner's copy of the policy."""
    horizon, acting, learner = policy.spec.action_horizon, 0, 0
    if cuda_index(config, "device") is None:
        acting = acting_bytes(config, horizon)
    if learning:
        on_gpu = cuda_index(config, "learner.device") is not None
        learner = learner_bytes(config, horizon, on_gpu, row_of(config, policy.spec))
        if not on_gpu:
            learner += sum(policy_copy(config, policy, on_gpu)) + prefixes_bytes(config, policy, on_gpu)
    return acting + learner


def memory_needed(
    config: Config, environment: EnvironmentRecord, spec: EnvironmentSpec, policy: PolicyNeeds, learning: bool = True
) -> MemoryNeed:
    """What a run needs with an environment of these shapes, which need not be installed; without `learning`, what an
    evaluation does."""
    return MemoryNeed(
        shared=layout(run_fields(config, spec, policy.spec.action_horizon))[1],
        policy=policy_bytes(config, policy),
        agent=agent_bytes(config, policy, learning),
        template=environment.template_bytes,
        worker=environment.worker_bytes,
        workers=config.lanes,
    )


def memory_of_algorithm(run: CheckedRun) -> str | None:
    """What DSRL-NA takes more memory for than DSRL-SAC, in a sentence; None for the latter."""
    config, policy = run.config, run.policy.needs
    if (of_actions := row_of(config, policy.spec)) is None:
        return None
    row = row_bytes(config, run.horizon, of_actions)
    on_gpu, kept = cuda_index(config, "learner.device") is not None, ""
    copy = policy_copy(config, policy, on_gpu)
    if prefixes := prefixes_bytes(config, policy, on_gpu):
        each = prefixes / config.replay.capacity
        kept = f", its keys and values {each / 1e3:,.1f} kB a row and {prefixes / 2**30:.1f} GiB"
    return (
        f"sac.algorithm na: a row of the replay ring takes {row / 1e3:,.1f} kB, and replay.capacity "
        f"{row * config.replay.capacity / 2**30:.1f} GiB; the learner's own copy of the policy takes "
        f"{sum(copy) / 1e6:,.0f} MB, {copy.weights / 1e6:,.0f} of them weights{kept}"
    )


def actors_that_fit(
    config: Config, environment: EnvironmentRecord, spec: EnvironmentSpec, policy: PolicyNeeds, memory: float
) -> int:
    """The most environment workers with which the run needs no more than `memory` bytes; 0 if not even one fits."""

    def need(actors: int) -> int:
        return memory_needed(config.model_copy(update={"actors": actors}), environment, spec, policy).total

    return bisect.bisect_right(range(1, MOST_ACTORS + 1), memory, key=need)


def _half(value: Any) -> Any:
    return [_half(item) for item in value] if isinstance(value, list) else max(1, value // 2)


def _lowered(config: Config, policy: PolicyNeeds, key: str) -> Iterator[tuple[Config, PolicyNeeds]]:
    """Yield the same with half of a setting, and with its default; of `inference.buckets` with those up to half the
    largest that is used."""
    if key == "policy.action_horizon":
        if policy.with_horizon is not None:
            policy = policy.with_horizon(max(config.env.chunk, policy.spec.action_horizon // 2))
        yield config, policy
        return
    values: list[Any] = [get_key(DEFAULTS, key), _half(get_key(config, key))]
    if key == "inference.buckets":
        sizes = config.batch_sizes()
        values[1] = [size for size in sizes if size <= sizes[-1] // 2] or [min(sizes[0], config.actors)]
    section, _, name = key.rpartition(".")
    for value in values:
        changed = {name: value} if not section else {section: getattr(config, section).model_copy(update={name: value})}
        yield config.model_copy(update=changed), policy


DEFAULTS = Config()
USUAL = "replay.capacity or actors"
OF_THE_RUN = ("replay.capacity", "actors")
OF_BATCHES = ("inference.buckets", "policy.action_horizon")
OF_THE_AGENT = (
    "sac.batch_size",
    "sac.num_q_heads",
    "sac.hidden_dims",
    "sac.image_latent_dim",
    "sac.state_latent_dim",
    "sac.conv_channels",
    "sac.conv_padding",
    "learner.policy_rows",
)
"""Settings that memory depends on."""


def what_to_lower(
    config: Config,
    environment: EnvironmentRecord,
    spec: EnvironmentSpec,
    policy: PolicyNeeds,
    usual: str = USUAL,
    learning: bool = True,
) -> str:
    """The settings of which the default or half would spare the most memory, or the `usual` ones if those of the run
    do."""

    def needed(config: Config, policy: PolicyNeeds) -> int:
        return memory_needed(config, environment, spec, policy, learning).total

    need = needed(config, policy)
    keys = (*OF_THE_RUN, *OF_BATCHES, *OF_THE_AGENT)
    spared = {key: max(need - needed(*lowered) for lowered in _lowered(config, policy, key)) for key in keys}
    most = max(spared.values())
    if most < WORTH_SAYING * need or most == max(spared[key] for key in OF_THE_RUN):
        return usual
    return " or ".join(key for key in sorted(keys, key=lambda key: -spared[key]) if spared[key] > 0.9 * most)


def check_memory(run: CheckedRun, lower: str = USUAL, learning: bool = True, copies: int = 1) -> None:
    """Raises ConfigError where processes cannot share memory, or where less of it is available than is needed.

    It advises to `lower` something, unless a setting of the agent or of batches takes the most. `learning` is as in
    `memory_needed`. There will be so many `copies` of all of it.
    """
    try:
        order.barrier()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        os.close(os.memfd_create("dsrl_async-check"))  # what the arena is made of
    except OSError as error:
        raise ConfigError(
            f"processes cannot share memory here, since memfd_create fails ({error.strerror}); where a container or a "
            "sandbox filters system calls, allow that one"
        ) from error
    parts = run.config, run.environment, run.spec, run.policy.needs
    need, available = memory_needed(*parts, learning), available_memory()
    if run.demonstration_rows:
        fields = demonstration_fields(run.config, run.spec, run.horizon, run.demonstration_rows)
        need = need._replace(shared=need.shared + layout(fields)[1])
    if copies * need.total > available:
        if lower == USUAL and run.config.evaluation.lanes:
            lower = "replay.capacity, actors or evaluation.actors"
        can_halve = "dtype" in run.policy.own_settings and run.config.policy.dtype != "bfloat16"
        gib = copies / 2**30
        halve = need.policy > need.shared and need.policy > need.agent and can_halve
        raise ConfigError(
            f"this run needs about {gib * need.total:.1f} GiB of memory ({gib * need.shared:.1f} of it shared, "
            f"mostly replay, {gib * need.agent:.1f} the agent's, and {gib * need.policy:.1f} the policy's) and "
            f"{available / 2**30:.1f} are available; lower {what_to_lower(*parts, lower, learning)}"
            f"{', or set policy.dtype to bfloat16' if halve else ''}"
        )
