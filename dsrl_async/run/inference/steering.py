"""The steered policy: the SAC actor's noise, denoised by the frozen policy, over static buffers.

This is where the two networks meet; neither package knows of the other.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dsrl_async.config.settings import SacConfig
from dsrl_async.host.graphs import HIGH_PRIORITY, Captured, MemoryPool, capture
from dsrl_async.host.stages import Stage, no_stage
from dsrl_async.policies import NormalisedBatch, PolicyBatch
from dsrl_async.sac.layout import NoiseLayout
from dsrl_async.sac.networks import Actor, act
from dsrl_async.shm.counters import NoiseMode


class SteeredPolicy:
    """Observations in, noise and action chunks out, for the batches of B rows that `policy` takes.

    Input buffers, to be filled in place before `run`:
    - `inputs`, by the field of `shm.slots.Slots` that is copied there: the policy's `images` and `state`, `sac_image`
      uint8 [B, 64, 64, 3 * cameras], and `standard_normal` float32
      [B, config.normal_width(H)], for the H slots and with `shift` behind them for the agent's vector;
    - the policy's prompts, and among `inputs` their `task_index` int64 [B] if the agent is told its task;
    - `mode` uint8 [B]: how the noise of each row is chosen, a `NoiseMode`.
    Output buffer: `outputs` float32 [B, A + H * robot_action_dim], which is `noise` [B, A] and behind it `actions`
    [B, H, robot_action_dim] in the robot's units, so that one copy takes both from a GPU; for DSRL-NA behind them the
    same as the policy computes them, `normalised`.

    `snapshot` is the actor of the modes that ask for one; without it, no second actor is computed. `stage` times the
    halves. `instructions`, fp32 [prompts, config.instruction_dim], is what the agent is told of each prompt, or None.
    """

    def __init__(
        self,
        policy: PolicyBatch,
        actor: Actor,
        config: SacConfig,
        snapshot: Actor | None = None,
        stage: Stage = no_stage,
        instructions: torch.Tensor | None = None,
    ) -> None:
        assert (instructions is not None) == (config.instruction_dim > 0)
        self.instructions = instructions
        self.policy, self.actor, self.snapshot, self.stage = policy, actor, snapshot, stage
        of_actions, self.device = config.algorithm == "na", policy.noise.device
        batch_size, self.horizon, _ = policy.noise.shape
        self.layout = NoiseLayout(config, self.horizon, self.device)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(batch_size, *shape, dtype=dtype, device=self.device)

        self.sac_image = zeros(*config.image_shape, dtype=torch.uint8)
        self.standard_normal = zeros(config.normal_width(self.horizon))
        self.mode = zeros(dtype=torch.uint8)
        self.inputs = {
            "images": policy.images,
            "state": policy.state,
            "sac_image": self.sac_image,
            "standard_normal": self.standard_normal,
        }
        self.task_index = zeros(dtype=torch.int64)
        if instructions is not None:
            self.inputs["task_index"] = self.task_index
        width, action_dim = self.layout.width, policy.actions.shape[2]
        self.outputs = zeros(width + (1 + of_actions) * self.horizon * action_dim)
        self.noise = self.outputs[:, :width]
        actions = self.outputs[:, width:].unflatten(1, (-1, self.horizon, action_dim))
        self.actions = actions[:, 0]
        self.normalised = actions[:, 1] if of_actions else None
        self._normalised_actions = None
        if of_actions:
            assert isinstance(policy, NormalisedBatch)
            self._normalised_actions = policy.normalised_actions
        self.captured: Captured | None = None

    def fill_prompts(self, task_index: NDArray[np.int64]) -> None:
        """Write the prompts of the first rows; their `state` is there already."""
        self.policy.fill_prompts(task_index)

    def fill_modes(self, modes: NDArray[np.uint8]) -> None:
        """Write the modes of the first rows, uint8 [n], n <= B. Where all are the same, nothing goes up to a GPU."""
        if (modes == modes[0]).all():
            self.mode.fill_(int(modes[0]))
        else:
            self.mode[: len(modes)].copy_(torch.from_numpy(modes))

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
        if self.normalised is not None and self._normalised_actions is not None:
            self.normalised.copy_(self._normalised_actions)

    def _choose_noise(self) -> None:
        """Write `noise` and the policy's initial noise."""
        mode, width = self.mode, self.layout.width
        of_slots = self.standard_normal[:, : self.policy.noise[0].numel()].view_as(self.policy.noise)
        of_agent = self.standard_normal[:, -width:] if self.layout.shifts else self.standard_normal[:, :width]
        base, deterministic = mode == NoiseMode.BASE, mode == NoiseMode.DETERMINISTIC
        unsquashed = base | (mode == NoiseMode.WARM_UP)
        snapshot = None
        if self.snapshot is not None:
            snapshot = self.snapshot, mode >= NoiseMode.SNAPSHOT_STOCHASTIC
            deterministic = deterministic | (mode == NoiseMode.SNAPSHOT_DETERMINISTIC)
        self.noise.copy_(
            act(
                self.actor,
                self.sac_image,
                self.policy.state,
                of_agent,
                unsquashed,
                deterministic,
                snapshot,
                None if self.instructions is None else self.instructions.index_select(0, self.task_index),
            )
        )
        if self.layout.shifts:
            self.noise.masked_fill_(base[:, None], 0.0)  # the policy's own noise is not shifted
        laid_out = self.layout.expand(self.noise, of_slots)
        self.policy.noise.copy_(torch.where(base[:, None, None], of_slots, laid_out))

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
