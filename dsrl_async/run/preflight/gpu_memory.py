"""How much memory of GPUs a run needs, checked before it starts. Nothing of this has run on a GPU yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.policies import PolicyNeeds, PolicySizes
from dsrl_async.run.preflight.checked_run import CheckedRun
from dsrl_async.run.preflight.host import DEVICE_KEYS, cuda_devices, cuda_index
from dsrl_async.run.preflight.learner_memory import (
    actor_parameters,
    device_bytes,
    mirror_bytes,
    policy_copy,
    prefixes_bytes,
    row_of,
)

GIB = 2**30
LIBRARIES_BYTES = 256 << 20
"""Assumed for a process: kernels that are loaded, and the libraries' workspaces."""
CONTEXT_BYTES = 512 << 20
"""Assumed for CUDA's context in a second process on a GPU; the process that is asked for the free memory has the
first one's."""
SPARE = 0.05
"""Share of what is needed that is assumed to be lost between the allocator's blocks."""
WORTH_SAYING = 0.05
"""A change is advised if it spares such a share of what is needed."""


class GpuNeed(NamedTuple):
    """Estimated bytes that a run takes of one GPU."""

    weights: int = 0
    """The policy's."""
    buffers: int = 0
    """The policy's, for every batch size and prompt length, with the actor."""
    activations: int = 0
    """The policy's. Captured, the pool of all graphs has those of the largest batch, and the next one's warm-up takes
    its own beside it."""
    mirror: int = 0
    """The learner's copy of the replay ring."""
    learner: int = 0
    """The agent, the batch and the activations of an update."""
    copy: int = 0
    """The learner's own copy of the policy, for DSRL-NA."""
    prefixes: int = 0
    """The keys and values that it keeps."""
    processes: int = 0
    """Contexts and libraries of the processes, and what is lost between blocks."""

    @property
    def total(self) -> int:
        return sum(self)


def steering_bytes(config: Config, policy: PolicySizes) -> int:
    """What a `SteeredPolicy` has for a row beside the policy's own: image, standard normal noise, actor's noise, the
    number of the task, and what the agent is told of it."""
    sac, horizon = config.sac, policy.action_horizon
    numbers = sac.normal_width(horizon) + sac.noise_width(horizon) + sac.instruction_dim
    return math.prod(sac.image_shape) + 1 + 8 + 4 * numbers


def policy_need(config: Config, policy: PolicyNeeds, prompt_lengths: Sequence[int]) -> GpuNeed:
    """What the inference process takes, with prompts of these lengths (each once)."""
    sizes = config.batch_sizes()
    pairs = [(size, length) for size in sorted(sizes, reverse=True) for length in sorted(prompt_lengths, reverse=True)]
    batches = [policy.memory(config.policy, True, *pair) for pair in pairs]
    buffers = sum(batch.buffers for batch in batches)
    buffers += sum(size for size, _ in pairs) * steering_bytes(config, policy.spec)
    actors = 1 + bool(config.evaluation.lanes)
    return GpuNeed(
        weights=batches[0].weights,
        buffers=buffers + actors * 4 * actor_parameters(config.sac, policy.spec.action_horizon),
        activations=sum(batch.activations for batch in batches[: 1 if config.policy.graphs == "off" else 2]),
    )


def learner_need(config: Config, policy: PolicyNeeds) -> GpuNeed:
    """What the learner takes on a GPU."""
    horizon, of_actions = policy.spec.action_horizon, row_of(config, policy.spec)
    return GpuNeed(
        mirror=mirror_bytes(config, horizon, of_actions),
        learner=device_bytes(config.sac, horizon, of_actions),
        copy=sum(policy_copy(config, policy, on_gpu=True)),
        prefixes=prefixes_bytes(config, policy, on_gpu=True),
    )


def gpu_needs(
    config: Config, policy: PolicyNeeds, prompt_lengths: Sequence[int], keys: Sequence[str] = DEVICE_KEYS
) -> dict[int, GpuNeed]:
    """What a run takes of each GPU that it uses, by the number of the CUDA device.

    `keys` are the settings that count: an evaluation has no learner.
    """
    of_device: dict[int, list[GpuNeed]] = {}
    for key in keys:
        if (device := cuda_index(config, key)) is not None:
            learner = key == "learner.device"
            need = learner_need(config, policy) if learner else policy_need(config, policy, prompt_lengths)
            for group in range(1 if learner or not config.group.gpus else config.groups):
                of_device.setdefault(device + group * config.group.gpus, []).append(need)
    needs = {}
    for device, parts in of_device.items():
        need = GpuNeed(*map(sum, zip(*parts, strict=True)))
        processes = len(parts) * LIBRARIES_BYTES + (len(parts) - 1) * CONTEXT_BYTES
        needs[device] = need._replace(processes=processes + round(SPARE * need.total))
    return needs


def prompt_lengths(run: CheckedRun) -> list[int]:
    """The prompt lengths that the policy has buffers for, each once."""
    return sorted(set(run.policy.prompt_lengths(run.spec.prompts)))


def _policy(**update: object) -> Callable[[Config], Config]:
    return lambda config: config.model_copy(update={"policy": config.policy.model_copy(update=update)})


def _smaller_batches(config: Config) -> Config:
    sizes = config.batch_sizes()
    buckets = [size for size in sizes if size <= max(sizes[0], sizes[-1] // 2)]
    return config.model_copy(update={"inference": config.inference.model_copy(update={"buckets": buckets})})


def _fewer_actors(config: Config) -> Config:
    return config.model_copy(update={"actors": max(1, config.actors // 2)})


def _half_the_ring(config: Config) -> Config:
    replay = config.replay.model_copy(update={"capacity": config.replay.capacity // 2})
    return config.model_copy(update={"replay": replay})


def _half_the_batch(config: Config) -> Config:
    sac = config.sac.model_copy(update={"batch_size": max(1, config.sac.batch_size // 2)})
    return config.model_copy(update={"sac": sac})


def _half_the_policy_rows(config: Config) -> Config:
    rows = max(1, config.learner.policy_rows // 2)
    return config.model_copy(update={"learner": config.learner.model_copy(update={"policy_rows": rows})})


def _encoding_again(config: Config) -> Config:
    return config.model_copy(update={"learner": config.learner.model_copy(update={"policy_prefixes": "encode"})})


def _learner_on_the_cpu(config: Config) -> Config:
    return config.model_copy(update={"learner": config.learner.model_copy(update={"device": "cpu"})})


CHANGES: dict[str, Callable[[Config], Config]] = {
    "policy.dtype: bfloat16": _policy(dtype="bfloat16"),
    "inference.buckets up to half the largest": _smaller_batches,
    "half the actors": _fewer_actors,
    "half the replay.capacity": _half_the_ring,
    "half the sac.batch_size": _half_the_batch,
    "half the learner.policy_rows": _half_the_policy_rows,
    "learner.policy_prefixes: encode": _encoding_again,
    "learner.device: cpu, or another GPU": _learner_on_the_cpu,
}
"""What a user can do about too large a need."""


def advice(config: Config, needed: Callable[[Config], int]) -> str:
    """The `CHANGES` that spare something worth saying of the bytes `needed`, and how much; what helps most is first."""
    need = needed(config)
    spared = {what: need - needed(change(config)) for what, change in CHANGES.items()}
    worth = sorted((what for what in spared if spared[what] > WORTH_SAYING * need), key=lambda what: -spared[what])
    return "; ".join(f"{what} (spares {spared[what] / GIB:.1f})" for what in worth) or "a larger GPU"


def describe(need: GpuNeed) -> str:
    """`9.1 GiB (5.8 the policy's weights, ...)`."""
    names = {
        "weights": "the policy's weights",
        "buffers": "its buffers",
        "activations": "its activations",
        "mirror": "the copy of the replay ring",
        "learner": "the learner",
        "copy": "the learner's copy of the policy",
        "prefixes": "keys and values of the replay ring",
        "processes": "CUDA's own",
    }
    parts = [f"{size / GIB:.1f} {names[field]}" for field, size in need._asdict().items() if size]
    return f"{need.total / GIB:.1f} GiB ({', '.join(parts)})"


class GpuMemory(NamedTuple):
    """What a run needs of a GPU, and the bytes that are free and that there are."""

    need: GpuNeed
    free: int
    total: int


def check_gpu_memory(run: CheckedRun, keys: Sequence[str] = DEVICE_KEYS) -> dict[int, GpuMemory]:
    """The memory of each GPU that the run uses; raises ConfigError where less is free than is needed.

    `check_devices` comes first: the GPUs have to be there. `keys` are as in `gpu_needs`.
    """
    config, policy = run.config, run.policy.needs
    if all(cuda_index(config, key) is None for key in keys):
        return {}
    lengths, found, checked = prompt_lengths(run), cuda_devices(), {}
    for device, need in gpu_needs(config, policy, lengths, keys).items():
        memory = GpuMemory(need, found["free_bytes"][device], found["total_bytes"][device])
        if need.total > memory.free:

            def needed(changed: Config, device: int = device) -> int:
                return gpu_needs(changed, policy, lengths, keys).get(device, GpuNeed()).total

            raise ConfigError(
                f"this run needs about {describe(need)} of cuda:{device}, and {memory.free / GIB:.1f} are free; what "
                f"helps, most first: {advice(config, needed)}"
            )
        checked[device] = memory
    return checked
