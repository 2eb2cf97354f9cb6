"""The steered policy: the SAC actor's noise, denoised by the frozen policy, over static buffers.

This is where the two networks meet; neither package knows of the other.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dsrl_async.config.settings import SacConfig
from dsrl_async.config.shapes import SAC_IMAGE_SIZE
from dsrl_async.host.graphs import HIGH_PRIORITY, Captured, MemoryPool, capture
from dsrl_async.host.stages import Stage, no_stage
from dsrl_async.run.frozen_policy import PolicyBatch
from dsrl_async.sac.networks import Actor, act, expand_noise

Mode = Literal["stochastic", "deterministic", "base"]


class SteeredPolicy:
    """Observations in, noise and action chunks out, for the batches of B rows that `policy` takes.

    Input buffers, to be filled in place before `run`:
    - `inputs`, by the field of `shm.slots.Slots` that is copied there: the policy's `images` and `state`, `sac_image`
      uint8 [B, 64, 64, 3], and `standard_normal` float32 [B, H * noise_dim];
    - the policy's prompts;
    - `warmup` bool [B]: where true, the noise is standard normal, unsquashed.
    Output buffer: `outputs` float32 [B, A + H * robot_action_dim], which is `noise` [B, A] and behind it `actions`
    [B, H, robot_action_dim] in the robot's units, so that one copy takes both from a GPU.

    Modes: `stochastic` samples the actor's distribution, `deterministic` takes its mode, `base` ignores the actor
    and starts every action slot from independent N(0, I), as the frozen policy was trained. `stage` times the halves.
    """

    def __init__(
        self, policy: PolicyBatch, actor: Actor, config: SacConfig, mode: Mode, stage: Stage = no_stage
    ) -> None:
        self.policy, self.actor, self.mode, self.stage = policy, actor, mode, stage
        self.noise_layout = config.noise_layout
        self.device = policy.noise.device
        batch_size, self.horizon, noise_dim = policy.noise.shape

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(batch_size, *shape, dtype=dtype, device=self.device)

        self.sac_image = zeros(SAC_IMAGE_SIZE, SAC_IMAGE_SIZE, 3, dtype=torch.uint8)
        self.standard_normal = zeros(self.horizon * noise_dim)
        self.warmup = zeros(dtype=torch.bool)
        self.inputs = {
            "images": policy.images,
            "state": policy.state,
            "sac_image": self.sac_image,
            "standard_normal": self.standard_normal,
        }
        width, action_dim = config.noise_width(self.horizon), policy.actions.shape[2]
        self.outputs = zeros(width + self.horizon * action_dim)
        self.noise = self.outputs[:, :width]
        self.actions = self.outputs[:, width:].unflatten(1, (self.horizon, action_dim))
        self.captured: Captured | None = None

    def fill_prompts(self, task_index: NDArray[np.int64]) -> None:
        """Write the prompts of the first rows; their `state` is there already."""
        self.policy.fill_prompts(task_index)

    @torch.no_grad()
    def encode(self) -> None:
        """First half: choose the noise, encode observation and prompt."""
        self._choose_noise()
        self.policy.encode()

    @torch.no_grad()
    def denoise(self) -> None:
        """Second half: from noise to the robot's actions."""
        self.policy.denoise()
        self.actions.copy_(self.policy.actions)

    def _choose_noise(self) -> None:
        """Write `noise` and the policy's initial noise."""
        normal = self.standard_normal
        width = self.noise.shape[1]
        if self.mode == "base":
            self.noise.copy_(normal[:, :width])
            self.policy.noise.copy_(normal.view_as(self.policy.noise))
            return
        self.noise.copy_(
            act(
                self.actor,
                self.sac_image,
                self.policy.state,
                normal[:, :width],
                self.warmup,
                deterministic=self.mode == "deterministic",
            )
        )
        self.policy.noise.copy_(expand_noise(self.noise, self.horizon, self.noise_layout))

    def capture(self, pool: MemoryPool | None = None) -> MemoryPool | None:
        """Have `run` replay CUDA graphs of both halves from now on, on a GPU (see `graphs.capture`).

        The actor's weights are read at each replay, so new ones, copied in place, need no new capture. Returns the
        pool for the next policy's capture.
        """
        halves, name = [self.encode, self.denoise], self.policy.name
        self.captured = capture(halves, self.device, pool, name, "policy.graphs", HIGH_PRIORITY)
        return pool if self.captured is None else self.captured.pool

    def run(self) -> None:
        """Compute the output buffers from the input buffers (only enqueued, on CUDA)."""
        encode, denoise = self.captured.replays if self.captured else (self.encode, self.denoise)
        with self.stage("prefix"):
            encode()
        with self.stage("denoise"):
            denoise()
