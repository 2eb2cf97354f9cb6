"""The steered policy: the SAC actor's noise, denoised by the frozen policy, for one batch size and static buffers.

This is where the two networks meet; neither package knows of the other.
"""

from __future__ import annotations

from typing import Literal

import torch

from dsrl_async.config import SacConfig
from dsrl_async.envs import SAC_IMAGE_SIZE
from dsrl_async.pi0.checkpoint import LoadedPolicy
from dsrl_async.sac.networks import Actor, act, expand_noise

Mode = Literal["stochastic", "deterministic", "base"]


class SteeredPolicy:
    """Observations in, noise and action chunks out, for a batch of B.

    Input buffers, to be filled in place before `run`: `sac_image` uint8 [B, 64, 64, 3], `standard_normal` float32
    [B, H * 32], `warmup` bool [B] (true: the noise is standard normal, unsquashed), and the sampler's `images`,
    `state`, `tokens`, `token_mask`. Output buffers: `noise` float32 [B, A] and the sampler's `actions` [B, H, 7].

    Modes: `stochastic` samples the actor's distribution, `deterministic` takes its mode, `base` ignores the actor
    and starts every action slot from independent N(0, I), as the frozen policy was trained.
    """

    def __init__(
        self,
        policy: LoadedPolicy,
        actor: Actor,
        sac: SacConfig,
        batch_size: int,
        denoise_steps: int,
        mode: Mode,
    ) -> None:
        self.actor, self.mode, self.noise_layout = actor, mode, sac.noise_layout
        self.horizon = policy.config.action_horizon
        self.sampler = policy.sampler(batch_size, denoise_steps)
        device = self.sampler.noise.device
        width = sac.noise_width(self.horizon)
        self.sac_image = torch.zeros(batch_size, SAC_IMAGE_SIZE, SAC_IMAGE_SIZE, 3, dtype=torch.uint8, device=device)
        self.standard_normal = torch.zeros(batch_size, self.horizon * sac.noise_dim, device=device)
        self.warmup = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.noise = torch.zeros(batch_size, width, device=device)

    @torch.no_grad()
    def choose_noise(self) -> None:
        """Write `noise` and the sampler's initial noise."""
        normal = self.standard_normal
        width = self.noise.shape[1]
        if self.mode == "base":
            self.noise.copy_(normal[:, :width])
            self.sampler.noise.copy_(normal.view_as(self.sampler.noise))
            return
        self.noise.copy_(
            act(
                self.actor,
                self.sac_image,
                self.sampler.state,
                normal[:, :width],
                self.warmup,
                deterministic=self.mode == "deterministic",
            )
        )
        self.sampler.noise.copy_(expand_noise(self.noise, self.horizon, self.noise_layout))

    def run(self) -> None:
        """Compute the output buffers from the input buffers (only enqueued, on CUDA)."""
        self.choose_noise()
        self.sampler.run()
