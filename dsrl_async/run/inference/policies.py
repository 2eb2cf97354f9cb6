"""The steered policy of a run, for every batch size and prompt length that can occur."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dsrl_async.config.settings import Config
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.host.stages import Stage, no_stage
from dsrl_async.pi0.checkpoint import LoadedPolicy, load_policy, resolve_dtype
from dsrl_async.pi0.sampler import language_bucket
from dsrl_async.pi0.tokenizer import longest_prompt
from dsrl_async.run.inference.batching import batch_sizes
from dsrl_async.run.inference.steering import Mode, SteeredPolicy
from dsrl_async.sac.networks import Actor

logger = logging.getLogger(__name__)


class BatchPolicy(Protocol):
    """What `InferenceServer` needs of a `steering.SteeredPolicy`, for batches of B and prompts of up to L tokens."""

    inputs: dict[str, Tensor]  # field of `Slots` -> buffer [B, ...], to be filled from it
    state: Tensor  # one of them
    tokens: Tensor  # int64 [B, L]
    token_mask: Tensor  # bool [B, L]
    warmup: Tensor  # bool [B]
    noise: Tensor  # float32 [B, A]
    actions: Tensor  # float32 [B, H, robot_action_dim]

    def run(self) -> None: ...


@dataclass
class Policies:
    """The steered policy for every batch size and prompt length of a run."""

    batch_policies: Mapping[tuple[int, int], BatchPolicy]
    """(batch size, language length) -> policy."""
    actor: Actor
    tokens: Tensor
    """int64 [prompts, language slots]; all prompts of the run."""
    token_mask: Tensor
    """bool, as `tokens`."""
    language_length: np.ndarray
    """int64 [prompts], see `language_lengths`."""
    state_prompts: Callable[[np.ndarray, Tensor], tuple[Tensor, Tensor]] | None = None
    """(task_index [B], state [B, S]) -> tokens and mask; for policies whose prompts hold the state."""
    stage: Stage = no_stage
    """Times what the device does, see `telemetry.stages`."""

    def fill_prompts(self, policy: BatchPolicy, task_index: np.ndarray, length: int) -> None:
        """Write the first `length` tokens of each row's prompt: a look-up, except where prompts hold the state."""
        count = len(task_index)
        tokens, token_mask = self.tokens, self.token_mask
        rows = torch.from_numpy(task_index).to(tokens.device)
        if self.state_prompts is not None:
            tokens, token_mask = self.state_prompts(task_index, policy.state[:count])
            rows = torch.arange(count, device=tokens.device)
        torch.index_select(tokens[:, :length], 0, rows, out=policy.tokens[:count])
        torch.index_select(token_mask[:, :length], 0, rows, out=policy.token_mask[:count])


def load_policies(
    config: Config,
    spec: EnvironmentSpec,
    device: torch.device,
    mode: Mode,
    directory: Path,
    stage: Stage = no_stage,
) -> Policies:
    """Load the frozen policy in `directory`, ready for every batch size and prompt length that can occur.

    The actor's weights are random until others are loaded. `mode` is how noise is chosen, see `SteeredPolicy`; `stage`
    times the policy.
    """
    frozen = load_policy(directory, device, resolve_dtype(config.policy.dtype, device), **config.policy.overrides())
    tokens, token_mask = (table.to(device) for table in frozen.tokenizer(spec.prompts))
    lengths = language_lengths(frozen, spec.prompts)
    actor = Actor(config.sac, frozen.config.action_horizon, device, config.seed)
    steered = {
        (size, length): SteeredPolicy(frozen, actor, config, size, length, mode, stage)
        for size in reversed(batch_sizes(config))  # the largest first, so that the others fit into its captured memory
        for length in sorted(set(lengths.tolist()), reverse=True)
    }
    if device.type != "cuda":
        logger.info("no CUDA graphs: the policy runs on %s", device)
    pool = None
    for policy in steered.values():
        if config.policy.compile:
            policy.run()  # compiles, now and not while actors wait
        if device.type == "cuda":
            pool = policy.capture(pool)

    def state_prompts(task_index: np.ndarray, state: Tensor) -> tuple[Tensor, Tensor]:
        normalised = frozen.normaliser.state(state)[:, : frozen.config.robot_state_dim]
        return frozen.tokenizer([spec.prompts[task] for task in task_index], normalised)

    in_prompt = state_prompts if frozen.config.state_in_prompt else None
    return Policies(steered, actor, tokens, token_mask, lengths, in_prompt, stage)


def language_lengths(policy: LoadedPolicy, prompts: Sequence[str]) -> np.ndarray:
    """Language slots that each prompt needs, rounded up so that there are few different lengths: int64 [prompts].

    A run's prompts are known when it starts, so a batch needs no more slots than its longest prompt has tokens.
    """
    config, tokenizer = policy.config, policy.tokenizer
    state_width = config.robot_state_dim if config.state_in_prompt else None
    lengths = [longest_prompt(tokenizer.ids, prompt, tokenizer.length, state_width) for prompt in prompts]
    return np.array([language_bucket(length, tokenizer.length) for length in lengths])
