"""The steered policy of a run, for every batch size and prompt length that can occur."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsrl_async.config.settings import Config
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.host.graphs import graphs_of
from dsrl_async.host.stages import Stage, no_stage
from dsrl_async.policies import FrozenPolicy, PolicyRecord
from dsrl_async.run.inference.steering import SteeredPolicy
from dsrl_async.run.instructions import Instructions, instructions_of
from dsrl_async.sac.networks import Actor
from dsrl_async.shm.counters import Counters, Start

logger = logging.getLogger(__name__)


class SteeredBatch(Protocol):
    """What `InferenceServer` needs of a `steering.SteeredPolicy`, for batches of B."""

    inputs: dict[str, Tensor]  # field of `Slots` -> buffer [B, ...], to be filled from it
    outputs: Tensor  # float32 [B, A + H * robot_action_dim]: noise, then actions in the robot's units, see there

    def fill_modes(self, modes: NDArray[np.uint8]) -> None: ...
    def fill_prompts(self, task_index: NDArray[np.int64]) -> None: ...
    def run(self) -> None: ...


@dataclass
class Policies:
    """The steered policy for every batch size and prompt length of a run."""

    steered_batches: Mapping[tuple[int, int], SteeredBatch]
    """(batch size, prompt length) -> policy."""
    actor: Actor
    prompt_lengths: NDArray[np.int64]
    """int64 [prompts], see `FrozenPolicy`."""
    stage: Stage = no_stage
    """Times what the device does, see `host.stages`."""
    snapshot: Actor | None = None
    """The actor of an evaluation that is going on; None where there is none in the configuration."""
    frozen: FrozenPolicy | None = None
    """The policy that is steered."""
    instructions: Instructions | None = None
    """What the agent is told of its tasks, if anything."""

    @property
    def device(self) -> torch.device:
        return self.actor.flat.device


def load_frozen_policy(
    config: Config, record: PolicyRecord, device: torch.device, prompts: Sequence[str], progress: Callable[[], None]
) -> FrozenPolicy:
    """Load the weights of a policy. `progress` is called as this proceeds."""
    return record.load(config.policy, device, prompts, progress)


def load_policies(
    config: Config,
    spec: EnvironmentSpec,
    device: torch.device,
    record: PolicyRecord,
    counters: Counters,
    stage: Stage = no_stage,
    learned: Sequence[str] | None = None,
) -> Policies:
    """Load the weights of the frozen policy of `record`, ready for every batch size and prompt length that can occur.

    The actor's weights are random until others are loaded. `counters` are told how far this is, and whether the policy
    is captured; `stage` times the policy; `learned` is as in `instructions_of`. Raises CaptureError, see
    `graphs.capture`, and ConfigError, see `instructions_of`.
    """

    def progress() -> None:
        counters.inference_loading_ns[0] = time.monotonic_ns()

    counters.note_start(Start.LOADING, counters.inference_start)
    instructions = instructions_of(config.sac, record, spec.prompts, learned)
    table = None if instructions is None else torch.from_numpy(instructions.table).to(device)
    frozen = load_frozen_policy(config, record, device, spec.prompts, progress)
    actor = Actor(config.sac, frozen.spec.action_horizon, device, config.seed)
    snapshot = Actor(config.sac, frozen.spec.action_horizon, device, config.seed) if config.evaluation.lanes else None
    steered = {
        (size, length): SteeredPolicy(frozen.batch(size, length), actor, config.sac, snapshot, stage, table)
        for size in reversed(config.batch_sizes())  # the largest first, so that the others fit into its captured memory
        for length in sorted(set(frozen.prompt_lengths.tolist()), reverse=True)
    }
    if device.type != "cuda":
        logger.info("no CUDA graphs: the policy runs on %s", device)
    pool = None
    counters.note_start(Start.PREPARING, counters.inference_start)
    counters.inference_prepared[:] = 0, len(steered)
    with graphs_of(config.policy.graphs, device, counters.inference_graphs) as graphs:
        for policy in steered.values():
            if config.policy.compile:
                policy.run()  # compiles, now and not while workers wait
                progress()
            if graphs and frozen.capturable:
                pool = policy.capture(pool)
                progress()
            counters.inference_prepared[0] += 1
    return Policies(steered, actor, frozen.prompt_lengths, stage, snapshot, frozen, instructions)
