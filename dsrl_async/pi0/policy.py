"""A Pi0 policy for given prompts: from observations in the robot's units to actions in the robot's units.

`Pi0Policy` is what a run uses, by the protocol of `dsrl_async.policies.protocol`. Between its buffers and those of the
`Sampler` lie the processing of images and states, the prompts' tokens, and the normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsrl_async.pi0.checkpoint import LoadedPolicy
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.packed import can_pack, pack_weights
from dsrl_async.pi0.processing import scale_images
from dsrl_async.pi0.sampler import Sampler
from dsrl_async.pi0.tokenizer import language_slots


class Pi0Policy:
    """A loaded policy and all prompts that it will be given.

    Args:
        loaded: the parts of the policy; in bfloat16 on a CPU its weights are packed, see `packed`.
        prompts: the run's prompts, known by their numbers from here on.
        denoise_steps: Euler steps from noise to actions.
        compiled: whether torch.compile fuses the kernels, see `Sampler`.
        kernels: torch's own, or those of `dsrl_async.pi0.kernels`.
    """

    capturable = True

    def __init__(
        self,
        loaded: LoadedPolicy,
        prompts: Sequence[str],
        denoise_steps: int,
        compiled: bool = False,
        kernels: Literal["torch", "triton"] = "torch",
    ) -> None:
        self.spec: Pi0Config = loaded.config
        self.loaded, self.prompts = loaded, list(prompts)
        self.denoise_steps, self.compiled, self.kernels = denoise_steps, compiled, kernels
        self.prompt_lengths = language_lengths(loaded, self.prompts)
        if not compiled and can_pack(loaded.model):
            pack_weights(loaded.model)
        device = loaded.model.action_out.weight.device
        self.tokens, self.token_mask = (table.to(device) for table in loaded.tokenizer(self.prompts))
        """int64 and bool [prompts, language slots], without the state, which `state_tokens` adds."""

    def state_tokens(self, prompts: NDArray[np.int64], state: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and mask on the CPU of prompts that hold the robot's state float32 [n, robot_state_dim]."""
        normalised = self.loaded.normaliser.state(state)[:, : self.spec.robot_state_dim]
        return self.loaded.tokenizer([self.prompts[number] for number in prompts], normalised)

    def batch(self, batch_size: int, prompt_length: int) -> Pi0Batch:
        return Pi0Batch(self, batch_size, prompt_length)


class Pi0Batch:
    """A `Pi0Policy` over static buffers, for batches of B and prompts of up to L tokens.

    Input buffers: `images` uint8 [B, cameras, size, size, 3], `state` float32 [B, robot_state_dim] in the robot's
    units, `noise` float32 [B, H, action_dim]; `tokens` int64 [B, L] and `token_mask` bool [B, L], which `fill_prompts`
    writes.
    Output buffers: `actions` float32 [B, H, robot_action_dim] in the robot's units, and `normalised_actions`, the same
    as the network computes them.
    """

    def __init__(self, policy: Pi0Policy, batch_size: int, prompt_length: int) -> None:
        config = policy.spec
        self.policy, self.normaliser = policy, policy.loaded.normaliser
        self.sampler = Sampler(
            policy.loaded.model, batch_size, prompt_length, policy.denoise_steps, policy.compiled, policy.kernels
        )
        self.name = f"batch size {batch_size}, prompts of {prompt_length} tokens"
        self.tokens, self.token_mask, self.noise = self.sampler.tokens, self.sampler.token_mask, self.sampler.noise
        device, size = self.noise.device, config.image_size
        self.images = torch.zeros(batch_size, config.cameras, size, size, 3, dtype=torch.uint8, device=device)
        self.state = torch.zeros(batch_size, config.robot_state_dim, device=device)
        self.actions = torch.zeros(batch_size, config.action_horizon, config.robot_action_dim, device=device)
        self.normalised_actions = self.sampler.actions[..., : config.robot_action_dim]
        self.prompts = torch.zeros(batch_size, dtype=torch.int64, pin_memory=device.type == "cuda")

    def fill_prompts(self, prompts: NDArray[np.int64]) -> None:
        """A look-up, except where prompts hold the state. The batch before it must have been computed."""
        if self.policy.spec.state_in_prompt:
            self._write_state_prompts(prompts)
            return
        numbers = self.prompts[: len(prompts)]  # page-locked on CUDA: the host need not wait until they are there
        numbers.numpy()[:] = prompts
        self.choose_prompts(numbers.to(self.tokens.device, non_blocking=True))

    def choose_prompts(self, prompts: Tensor) -> None:
        """As `fill_prompts`, int64 [n] on the device; waits for the device only where prompts hold the state."""
        policy, count, length = self.policy, len(prompts), self.tokens.shape[1]
        if policy.spec.state_in_prompt:
            self._write_state_prompts(prompts.cpu().numpy())
            return
        torch.index_select(policy.tokens[:, :length], 0, prompts, out=self.tokens[:count])
        torch.index_select(policy.token_mask[:, :length], 0, prompts, out=self.token_mask[:count])

    def _write_state_prompts(self, prompts: NDArray[np.int64]) -> None:
        count, length = len(prompts), self.tokens.shape[1]
        tokens, token_mask = self.policy.state_tokens(prompts, self.state[:count])
        self.tokens[:count].copy_(tokens[:, :length])
        self.token_mask[:count].copy_(token_mask[:, :length])

    def prefix(self) -> tuple[Tensor, ...]:
        return self.sampler.prefix()

    def load_prefix(self, prefix: tuple[Tensor, ...]) -> None:
        self.sampler.load_prefix(*prefix)

    @torch.no_grad()
    def encode(self) -> None:
        sampler = self.sampler
        scale_images(self.images, out=sampler.images)
        sampler.state.copy_(self.normaliser.state(self.state))
        sampler.encode()

    @torch.no_grad()
    def denoise(self) -> None:
        self.sampler.denoise()
        self.actions.copy_(self.normaliser.robot_actions(self.sampler.actions, self.state))

    @torch.no_grad()
    def normalise(self) -> None:
        self.sampler.actions.copy_(self.normaliser.of_robot_actions(self.actions, self.state))

    def invert(self, refinements: int) -> None:
        self.sampler.invert(refinements)


def language_lengths(policy: LoadedPolicy, prompts: Sequence[str]) -> NDArray[np.int64]:
    """`tokenizer.language_slots` of a loaded policy, int64 [prompts]."""
    return np.array(language_slots(policy.config, policy.tokenizer.ids, prompts), np.int64)
