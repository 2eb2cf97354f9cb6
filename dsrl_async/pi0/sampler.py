"""Samples action chunks for one batch size, over static buffers.

`Sampler.run` reads the input buffers and writes the output buffer; it runs the same operations on the same
storages in each call, never synchronises with the host, and has no data-dependent shape. On CUDA its two
halves are captured as graphs and replayed, elsewhere they are called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsrl_async.pi0.model import MASKED, Extend, Pi0, key_mask, step_rows, time_grid
from dsrl_async.pi0.processing import Normaliser, scale_images

logger = logging.getLogger(__name__)

MemoryPool = Any
"""What `torch.cuda.graph_pool_handle` returns; torch does not export its type."""

MASK_ALIGNMENT = 8
"""CUDA's memory-efficient attention copies a mask in every call unless its rows are a multiple of this."""


class Sampler:
    """A policy for one batch size B.

    Input buffers, to be filled in place before `run`:
    - `images` uint8 [B, cameras, size, size, 3], `state` float32 [B, robot_state_dim] (raw);
    - `tokens` int64 [B, L], `token_mask` bool [B, L];
    - `noise` float32 [B, H, action_dim].
    Output buffers: `actions` float32 [B, H, robot_action_dim] in the robot's units, and
    `model_actions` float32 [B, H, action_dim], the same before they are unnormalised.

    The model's weights are read when the sampler is made (step tables) and in each run: they must not
    change in between.
    """

    @torch.no_grad()
    def __init__(self, model: Pi0, normaliser: Normaliser, batch_size: int, denoise_steps: int) -> None:
        config = self.config = model.config
        self.model, self.normaliser = model, normaliser
        self.batch_size = batch_size
        device = model.action_out.weight.device
        length = config.prefix_length + config.state_tokens + config.action_horizon
        length += -length % MASK_ALIGNMENT

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=dtype, device=device)

        size = config.image_size
        self.images = zeros(config.cameras, size, size, 3, dtype=torch.uint8)
        self.state = zeros(config.robot_state_dim)
        self.tokens = zeros(config.max_token_len, dtype=torch.int64)
        self.token_mask = zeros(config.max_token_len, dtype=torch.bool)
        self.noise = zeros(config.action_horizon, config.action_dim)
        self.actions = zeros(config.action_horizon, config.robot_action_dim)
        self.model_actions = zeros(config.action_horizon, config.action_dim)

        cache = [zeros(2, config.kv_heads, length, config.head_dim, dtype=model.dtype) for _ in range(config.depth)]
        self._keys = [layer[:, 0] for layer in cache]
        self._values = [layer[:, 1] for layer in cache]
        before = config.cameras * config.image_tokens
        self._after = length - config.prefix_length
        self._state_end = config.prefix_length + config.state_tokens
        self._actions_end = self._state_end + config.action_horizon
        self._mask = key_mask(self.token_mask, before, self._after, model.dtype)
        self._mask[..., self._actions_end :] = MASKED
        self._language = slice(before, config.prefix_length)
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._rope = model.action_rope(position)

        times = time_grid(denoise_steps, config.time_grid)
        self._delta = -1.0 / denoise_steps
        self._steps = list(step_rows(model.step_tables(torch.tensor(times, device=device))))
        self._replay: tuple[Callable[[], None], Callable[[], None]] | None = None

    def _region(self, start: int, end: int, visible: int) -> Extend:
        """Writes a layer's new keys and values to [start, end) and shows [0, visible)."""

        def extend(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = self._keys[layer], self._values[layer]
            keys[:, :, start:end].copy_(key)
            values[:, :, start:end].copy_(value)
            return keys[:, :, :visible], values[:, :, :visible]

        return extend

    @torch.no_grad()
    def encode(self) -> None:
        """First half: images, prompt and state to keys and values, mask and positions."""
        config, model = self.config, self.model
        prefix = config.prefix_length
        model.run_prefix(scale_images(self.images), self.tokens, self.token_mask, self._region(0, prefix, prefix))
        self._mask[..., self._language].copy_(key_mask(self.token_mask, 0, 0, model.dtype))
        position = self.token_mask.sum(1) + self._language.start
        if config.state_tokens:
            end = self._state_end
            state = self.normaliser.state(self.state)
            model.run_state(state, position, self._mask[..., :end], self._region(prefix, end, end))
        rope = model.action_rope(position + config.state_tokens)
        self._rope.cos.copy_(rope.cos)
        self._rope.sin.copy_(rope.sin)

    @torch.no_grad()
    def denoise(self) -> None:
        """Second half: Euler steps from `noise` to `model_actions`, then `actions`."""
        x = self.model_actions
        x.copy_(self.noise)
        extend = self._region(self._state_end, self._actions_end, self._mask.shape[-1])
        for step in self._steps:
            x.add_(self.model.run_actions(x, step, self._rope, self._mask, extend), alpha=self._delta)
        self.actions.copy_(self.normaliser.robot_actions(x, self.state))

    def run(self) -> None:
        """Both halves: `actions` for what the input buffers hold now (enqueued only, on CUDA)."""
        encode, denoise = self._replay or (self.encode, self.denoise)
        encode()
        denoise()

    def capture(self, pool: MemoryPool | None = None) -> MemoryPool | None:
        """Captures both halves as CUDA graphs, which `run` replays from then on.

        `pool` is the memory pool of an earlier capture, to be shared by all samplers that never run at
        the same time; the pool used is returned. On another device, or when the capture fails, the reason
        is logged, None is returned and `run` stays eager. (Not exercised by the tests, which have no GPU.)
        """
        if self.noise.device.type != "cuda":
            logger.info("no CUDA graphs: the policy is on %s", self.noise.device)
            return None
        side = torch.cuda.Stream(self.noise.device)
        try:
            side.wait_stream(torch.cuda.current_stream(self.noise.device))
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.encode()
                    self.denoise()
            torch.cuda.current_stream(self.noise.device).wait_stream(side)
            torch.cuda.synchronize(self.noise.device)
            pool = torch.cuda.graph_pool_handle() if pool is None else pool
            replays = []
            for half in (self.encode, self.denoise):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    half()
                replays.append(graph.replay)
        except RuntimeError as error:
            logger.warning("no CUDA graphs for batch size %d, running eagerly: %s", self.batch_size, error)
            return None
        self._replay = (replays[0], replays[1])
        return pool
