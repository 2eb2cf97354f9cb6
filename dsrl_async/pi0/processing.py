"""From observations to the policy's inputs and back: pixels, robot state, prompt, actions.

The tensor functions do not synchronise with the host, so that they can be part of a captured graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.files import NormStats, scaling
from dsrl_async.pi0.tokenizer import make_encoder, pad_ids, prompt_ids


def scale_images(images: Tensor, out: Tensor | None = None) -> Tensor:
    """uint8 [B, cameras, size, size, 3] -> float32 [B, cameras, 3, size, size] in [-1, 1], written to `out` if given.

    pixel / 127.5 - 1 equals openpi's pixel / 255 * 2 - 1 to the last bit, since a factor of 2 rounds nothing.
    """
    return torch.div(images.permute(0, 1, 4, 2, 3), 127.5, out=out).sub_(1)


class Normaliser(nn.Module):
    """Scales robot states and actions, and adds the state to actions, as the config says (`files.scaling`).

    Dimensions beyond those of the robot are zero.
    """

    state_offset: Tensor
    state_scale: Tensor
    action_offset: Tensor
    action_scale: Tensor

    def __init__(self, config: Pi0Config, stats: NormStats, source: Path | str = "norm stats") -> None:
        """Raises ValueError, naming `source`, when a statistic is missing or has the wrong length."""
        super().__init__()
        self.config = config
        for name, values in scaling(config, stats, source)._asdict().items():
            self.register_buffer(name, torch.from_numpy(values).to(torch.float32), persistent=False)

    def state(self, state: Tensor) -> Tensor:
        """Raw float32 [..., robot_state_dim] -> normalised and zero-padded [..., action_dim]."""
        scaled = (state - self.state_offset) / self.state_scale
        return F.pad(scaled, (0, self.config.action_dim - self.config.robot_state_dim))

    def actions(self, actions: Tensor) -> Tensor:
        """Robot actions [..., robot_action_dim] -> the model's [..., action_dim] (training targets).

        If there are `delta_action_dims`, the state must already have been subtracted.
        """
        scaled = (actions - self.action_offset) / self.action_scale
        return F.pad(scaled, (0, self.config.action_dim - self.config.robot_action_dim))

    def robot_actions(self, actions: Tensor, state: Tensor) -> Tensor:
        """The model's actions [B, H, action_dim] -> robot actions [B, H, robot_action_dim].

        `state` is raw, [B, robot_state_dim]; its first `delta_action_dims` are added.
        """
        out = actions[..., : self.config.robot_action_dim] * self.action_scale + self.action_offset
        dims = self.config.delta_action_dims
        if dims:
            out = out + F.pad(state[:, None, :dims], (0, self.config.robot_action_dim - dims))
        return out

    def of_robot_actions(self, actions: Tensor, state: Tensor) -> Tensor:
        """The inverse of `robot_actions`: [B, H, robot_action_dim] and [B, robot_state_dim] -> [B, H, action_dim]."""
        config = self.config
        if dims := config.delta_action_dims:
            actions = actions - F.pad(state[:, None, :dims], (0, config.robot_action_dim - dims))
        return self.actions(actions)


class PromptTokenizer:
    """Turns prompts into token ids as openpi's PaliGemma tokenizer does."""

    def __init__(self, tokenizer: Any, length: int, source: Path | str = "tokenizer") -> None:
        """`tokenizer` comes from the tokenizers or sentencepiece library; `length` is the number of language slots.

        Raises ValueError, naming `source`, when there is no token <bos>.
        """
        self.tokenizer = tokenizer
        self.length = length
        self._encoder = make_encoder(tokenizer, source)

    def ids(self, prompt: str, state: NDArray[np.float32] | None = None) -> list[int]:
        """Ids of a prompt, neither padded nor cut. `state` is as in `tokenizer.prompt_ids`."""
        return prompt_ids(self._encoder, prompt, state)

    def __call__(self, prompts: Sequence[str], states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Token ids int64 [B, L] and validity bool [B, L] on the CPU, padded or cut to the language slots.

        `states` are normalised, float32 [B, robot_state_dim], for a policy with `state_in_prompt`.
        """
        rows = [None] * len(prompts) if states is None else list(states.cpu().numpy())
        ids = [self.ids(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
        tokens, mask = pad_ids(self._encoder, ids, self.length)
        return torch.from_numpy(tokens), torch.from_numpy(mask)
