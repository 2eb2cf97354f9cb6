"""The steered policy: the SAC actor's noise, denoised by the frozen policy, over static buffers.

This is where the two networks meet; neither package knows of the other.
"""

from __future__ import annotations

from typing import Literal

import torch

from dsrl_async.config.settings import Config
from dsrl_async.config.shapes import SAC_IMAGE_SIZE
from dsrl_async.host.graphs import HIGH_PRIORITY, Captured, MemoryPool, capture
from dsrl_async.host.stages import Stage, no_stage
from dsrl_async.pi0.checkpoint import LoadedPolicy
from dsrl_async.pi0.processing import scale_images
from dsrl_async.pi0.sampler import Sampler
from dsrl_async.sac.networks import Actor, act, expand_noise

Mode = Literal["stochastic", "deterministic", "base"]


class SteeredPolicy:
    """Observations in, noise and action chunks out, for batches of B and prompts of up to L tokens.

    Input buffers, to be filled in place before `run`:
    - `images` uint8 [B, cameras, size, size, 3], `state` float32 [B, robot_state_dim] in the robot's units;
    - `tokens` int64 [B, L], `token_mask` bool [B, L];
    - `sac_image` uint8 [B, 64, 64, 3], `standard_normal` float32 [B, H * 32];
    - `warmup` bool [B]: where true, the noise is standard normal, unsquashed.
    Output buffers: `noise` float32 [B, A] and `actions` float32 [B, H, robot_action_dim] in the robot's units.

    Modes: `stochastic` samples the actor's distribution, `deterministic` takes its mode, `base` ignores the actor
    and starts every action slot from independent N(0, I), as the frozen policy was trained. `stage` times the halves.
    """

    def __init__(
        self,
        policy: LoadedPolicy,
        actor: Actor,
        config: Config,
        batch_size: int,
        language_length: int,
        mode: Mode,
        stage: Stage = no_stage,
    ) -> None:
        sizes, sac, steps = policy.config, config.sac, config.policy.denoise_steps
        self.actor, self.mode, self.noise_layout, self.stage = actor, mode, sac.noise_layout, stage
        self.normaliser = policy.normaliser
        self.horizon = sizes.action_horizon
        self.sampler = Sampler(policy.model, batch_size, language_length, steps, config.policy.compile)
        self.tokens, self.token_mask = self.sampler.tokens, self.sampler.token_mask
        self.device = self.sampler.noise.device

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(batch_size, *shape, dtype=dtype, device=self.device)

        self.images = zeros(sizes.cameras, sizes.image_size, sizes.image_size, 3, dtype=torch.uint8)
        self.state = zeros(sizes.robot_state_dim)
        self.sac_image = zeros(SAC_IMAGE_SIZE, SAC_IMAGE_SIZE, 3, dtype=torch.uint8)
        self.standard_normal = zeros(self.horizon * sac.noise_dim)
        self.warmup = zeros(dtype=torch.bool)
        self.inputs = {
            "images": self.images,
            "state": self.state,
            "sac_image": self.sac_image,
            "standard_normal": self.standard_normal,
        }  # as the fields of `shm.slots.Slots` are named
        self.noise = zeros(sac.noise_width(self.horizon))
        self.actions = zeros(self.horizon, sizes.robot_action_dim)
        self.captured: Captured | None = None

    @torch.no_grad()
    def encode(self) -> None:
        """First half: choose the noise, encode observation and prompt."""
        sampler = self.sampler
        self._choose_noise()
        scale_images(self.images, out=sampler.images)
        sampler.state.copy_(self.normaliser.state(self.state))
        sampler.encode()

    @torch.no_grad()
    def denoise(self) -> None:
        """Second half: from noise to the robot's actions."""
        self.sampler.denoise()
        self.actions.copy_(self.normaliser.robot_actions(self.sampler.actions, self.state))

    def _choose_noise(self) -> None:
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
                self.state,
                normal[:, :width],
                self.warmup,
                deterministic=self.mode == "deterministic",
            )
        )
        self.sampler.noise.copy_(expand_noise(self.noise, self.horizon, self.noise_layout))

    def capture(self, pool: MemoryPool | None = None) -> MemoryPool | None:
        """Have `run` replay CUDA graphs of both halves from now on, where that is possible (see `graphs.capture`).

        The actor's weights are read at each replay, so new ones, copied in place, need no new capture. Returns the
        pool for the next policy's capture.
        """
        sampler = self.sampler
        name = f"batch size {sampler.batch_size}, prompts of {sampler.language_length} tokens"
        self.captured = capture([self.encode, self.denoise], self.device, pool, name, HIGH_PRIORITY)
        return pool if self.captured is None else self.captured.pool

    def run(self) -> None:
        """Compute the output buffers from the input buffers (only enqueued, on CUDA)."""
        encode, denoise = self.captured.replays if self.captured else (self.encode, self.denoise)
        with self.stage("prefix"):
            encode()
        with self.stage("denoise"):
            denoise()
