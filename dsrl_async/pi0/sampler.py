"""Samples action chunks for one batch size and one prompt length, over static buffers.

`Sampler.run` reads the input buffers and writes the output buffer; it runs the same operations on the same
storages in each call, never synchronises with the host, and has no data-dependent shape, so that its two halves can
be captured as CUDA graphs (`dsrl_async/host/graphs.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from dsrl_async.pi0.model import (
    ATTENTION_KERNELS,
    MASKED,
    TORCH,
    Extend,
    LayerExtend,
    Pi0,
    Rope,
    Step,
    key_mask,
    prefix_position,
    step_rows,
    time_grid,
)
from dsrl_async.pi0.packed import PACKED, is_packed

MASK_ALIGNMENT = 8
"""CUDA's memory-efficient attention copies a mask in every call unless its rows are a multiple of this."""
COMPILED_SAMPLERS = 256
"""How many samplers torch.compile may specialise its two functions for; its own limit is 8."""


@dataclass
class Slots:
    """Where a layer's new keys and values [B, 2, G, T, D] go, and those [B, 2, G, S, D] that are then attended to."""

    new: Tensor
    visible: Tensor

    def __call__(self, keys_values: Tensor) -> Tensor:
        self.new.copy_(keys_values)
        return self.visible


class Sampler:
    """A policy network for batches of B and prompts of up to L tokens.

    Input buffers, to be filled in place before `run`:
    - `images` float32 [B, cameras, 3, size, size] in [-1, 1];
    - `tokens` int64 [B, L], `token_mask` bool [B, L];
    - `state` float32 [B, action_dim], normalised and padded with zeros (pi0.5 does not read it);
    - `noise` float32 [B, H, action_dim].
    Output buffer: `actions` float32 [B, H, action_dim], normalised.

    The model's weights are read when the sampler is made (tables over the denoising steps) and in each run: they
    must not change in between.

    With `compiled`, torch.compile fuses the observation's pass and one Euler step (which is then run several times)
    at their first call, which takes a minute or more at full size. `kernels` is `torch`, or `triton` for the kernels of
    `dsrl_async.pi0.kernels`, which need a GPU (or Triton's interpreter) and are not compiled besides.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Pi0,
        batch_size: int,
        language_length: int,
        denoise_steps: int,
        compiled: bool = False,
        kernels: Literal["torch", "triton"] = "torch",
    ) -> None:
        config = model.config
        assert not (compiled and kernels == "triton"), "each replaces the other's kernels"
        if not 1 <= language_length <= config.max_token_len:
            raise ValueError(f"language_length must be from 1 to {config.max_token_len}, not {language_length}")
        self.model, self.batch_size, self.language_length = model, batch_size, language_length
        device = model.action_out.weight.device

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=dtype, device=device)

        self.images = zeros(config.cameras, 3, config.image_size, config.image_size)
        self.tokens = zeros(language_length, dtype=torch.int64)
        self.token_mask = zeros(language_length, dtype=torch.bool)
        self.state = zeros(config.action_dim)
        self.noise = zeros(config.action_horizon, config.action_dim)
        self.actions = zeros(config.action_horizon, config.action_dim)

        before = config.cameras * config.image_tokens
        self._prefix_end = before + language_length
        self._state_end = self._prefix_end + config.state_tokens
        self._actions_end = self._state_end + config.action_horizon
        length = self._actions_end + -self._actions_end % MASK_ALIGNMENT
        self._language = slice(before, self._prefix_end)
        self._keys_values = [
            zeros(2, config.kv_heads, length, config.head_dim, dtype=model.dtype) for _ in range(config.depth)
        ]
        self._mask = key_mask(self.token_mask, before, length - self._prefix_end, model.dtype)
        self._mask[..., self._actions_end :] = MASKED
        self._state_mask = self._mask.clone()
        self._state_mask[..., self._state_end :] = MASKED

        def scratch(tokens: int, width: int) -> Tensor | None:
            """For the results of norms; what is compiled has them in one kernel with their input."""
            return None if compiled else zeros(tokens, width, dtype=model.dtype)

        self._prefix_scratch = scratch(self._prefix_end, config.vlm_width)
        self._state_scratch = scratch(1, config.expert_width)
        self._action_scratch = scratch(config.action_horizon, config.expert_width)
        self._rope_table = model.rope_table()
        self._rope_rows = zeros(config.action_horizon, self._rope_table.shape[1], dtype=model.dtype)
        self._rope = Rope.of_rows(self._rope_rows)
        self._action_offset = torch.arange(config.state_tokens + config.action_horizon, device=device)

        times = time_grid(denoise_steps, config.time_grid)
        self._delta = -1.0 / denoise_steps
        table = model.step_tables(torch.tensor(times, device=device))
        self._kernels = PACKED if is_packed(model) else TORCH
        if kernels == "triton":
            from dsrl_async.pi0.kernels import prepare, triton_kernels  # which need Triton

            self._kernels, table = triton_kernels(model), prepare(model, table)
        self._steps = list(step_rows(table))
        self._vlm_norms = model.vlm_norms()
        self._encode, self._step = self._run_encode, self._run_step
        if compiled:
            limits = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, COMPILED_SAMPLERS)
            limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, COMPILED_SAMPLERS)
            self._encode = torch.compile(self._run_encode, fullgraph=True, dynamic=False)
            self._step = torch.compile(self._run_step, fullgraph=True, dynamic=False)

    def _region(self, start: int, end: int, visible: int) -> Extend:
        """Writes a layer's new keys and values to [start, end) and shows [0, visible)."""

        def extend(layer: int) -> LayerExtend:
            cache = self._keys_values[layer]
            return Slots(cache[:, :, :, start:end], cache[:, :, :, :visible])

        return extend

    @torch.no_grad()
    def encode(self) -> None:
        """First half: images, prompt and state to keys and values, mask and positions."""
        with sdpa_kernel(ATTENTION_KERNELS, set_priority=True):
            self._encode()

    @torch.no_grad()
    def denoise(self) -> None:
        """Second half: Euler steps from `noise` to `actions`."""
        self.actions.copy_(self.noise)
        with sdpa_kernel(ATTENTION_KERNELS, set_priority=True):
            for step in self._steps:
                self._step(step)

    @torch.no_grad()
    def invert(self, refinements: int) -> None:
        """`denoise` backwards, after `encode`: from `actions` to a `noise` of which `denoise` would make them.

        Each Euler step x' = x + d v(x, t), of the same d and t as in `denoise`, is undone by iterating
        x <- x' - d v(x, t) from x = x', once and `refinements` times more. Where that does not converge, `noise` is not
        what was looked for: `denoise`, which has to be called for `actions` to mean something again, says how far off.
        """
        self.noise.copy_(self.actions)
        extend = self._region(self._state_end, self._actions_end, self._mask.shape[-1])
        with sdpa_kernel(ATTENTION_KERNELS, set_priority=True):
            for step in reversed(self._steps):
                for _ in range(1 + refinements):
                    velocity = self.model.run_actions(
                        self.actions, step, self._rope, self._mask, extend, self._action_scratch, self._kernels
                    )
                    torch.add(self.noise, velocity, alpha=-self._delta, out=self.actions)
                self.noise.copy_(self.actions)

    def _run_encode(self) -> None:
        model, end, state_end = self.model, self._prefix_end, self._state_end
        self._mask[..., self._language].copy_(key_mask(self.token_mask, 0, 0, model.dtype))
        position = prefix_position(self.token_mask, self._language.start)
        rope, extend = Rope.at(position, self._rope_table), self._region(0, end, end)
        mask, scratch = self._mask[..., :end], self._prefix_scratch
        model.run_prefix(self.images, self.tokens, mask, rope, self._vlm_norms, extend, scratch, self._kernels)
        rows = F.embedding(position[:, -1:] + 1 + self._action_offset, self._rope_table)
        if model.config.state_tokens:
            # the state token gets to see the whole buffer too, for a length that every attention kernel takes
            self._state_mask[..., self._language].copy_(self._mask[..., self._language])
            rope, extend = Rope.of_rows(rows[:, :1]), self._region(end, state_end, self._mask.shape[-1])
            norms = self._steps[0].norms
            scratch = self._state_scratch
            model.run_state(self.state, self._state_mask, rope, norms, extend, scratch, self._kernels)
        self._rope_rows.copy_(rows[:, model.config.state_tokens :])

    def _run_step(self, step: Step) -> None:
        """One Euler step of `actions`, in place."""
        extend = self._region(self._state_end, self._actions_end, self._mask.shape[-1])
        velocity = self.model.run_actions(
            self.actions, step, self._rope, self._mask, extend, self._action_scratch, self._kernels
        )
        self.actions.add_(velocity, alpha=self._delta)

    def prefix(self) -> tuple[Tensor, Tensor]:
        """What `encode` has computed, for `load_prefix`: keys and values [B, depth, 2, kv_heads, tokens, head_dim] in
        the model's dtype, and `token_mask`. They share no memory with the sampler."""
        keys_values = [cache[:, :, :, : self._state_end] for cache in self._keys_values]
        return torch.stack(keys_values, 1), self.token_mask.clone()

    @torch.no_grad()
    def load_prefix(self, keys_values: Tensor, token_mask: Tensor) -> None:
        """Instead of `encode`: the first n rows get what `prefix` gave for n observations, of any samplers with the
        same model and `language_length`. What else there is of a prefix, mask and positions, follows from it."""
        count, model = len(token_mask), self.model
        for layer, cache in enumerate(self._keys_values):
            cache[:count, :, :, : self._state_end].copy_(keys_values[:, layer])
        self.token_mask[:count].copy_(token_mask)
        self._mask[..., self._language].copy_(key_mask(self.token_mask, 0, 0, model.dtype))
        position = prefix_position(self.token_mask, self._language.start)
        rows = F.embedding(position[:, -1:] + 1 + self._action_offset, self._rope_table)
        self._rope_rows.copy_(rows[:, model.config.state_tokens :])

    def run(self) -> None:
        """Both halves (only enqueued, on CUDA)."""
        self.encode()
        self.denoise()


def sample_actions(
    model: Pi0,
    images: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    state: Tensor,
    noise: Tensor,
    denoise_steps: int = 10,
) -> Tensor:
    """Normalised actions float32 [B, H, action_dim] from inputs that are already processed.

    images float32 [B, cameras, 3, size, size] in [-1, 1]; tokens int64 [B, L] and token_mask bool [B, L] with L up to
    the config's `max_token_len`; state float32 [B, action_dim], normalised and zero-padded (ignored by pi0.5); noise
    float32 [B, H, action_dim]. For one call; a loop keeps a `Sampler`. Raises ValueError when a shape does not fit.
    """
    sampler = Sampler(model, noise.shape[0], tokens.shape[1], denoise_steps)
    given = {"images": images, "tokens": tokens, "token_mask": token_mask, "state": state, "noise": noise}
    for name, tensor in given.items():
        buffer: Tensor = getattr(sampler, name)
        if buffer.shape != tensor.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, the model expects {list(buffer.shape)}")
        buffer.copy_(tensor)
    sampler.run()
    return sampler.actions
