"""From observations to the policy's inputs and back: pixels, robot state, prompt, actions.

The tensor functions work on given tensors without host synchronisation, so that they can be part of a
captured graph.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from dsrl_async.pi0.config import Pi0Config

STATISTICS = {"z_score": ("mean", "std"), "quantile": ("q01", "q99")}
EPSILON = 1e-6

NormStats = dict[str, dict[str, list[float]]]
"""{"state": {"mean": [...], "std": [...], "q01": [...], "q99": [...]}, "actions": {...}}"""


def scale_images(images: Tensor) -> Tensor:
    """uint8 [B, cameras, size, size, 3] -> float32 [B, cameras, 3, size, size] in [-1, 1]."""
    return images.permute(0, 1, 4, 2, 3).to(torch.float32) / 255 * 2 - 1


def load_norm_stats(path: Path) -> NormStats:
    """Reads openpi's `norm_stats.json`; raises ValueError naming the file when it has another form."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    stats = content.get("norm_stats") if isinstance(content, dict) else None
    if not isinstance(stats, dict) or not all(isinstance(stats.get(k), dict) for k in ("state", "actions")):
        raise ValueError(f'{path} must hold {{"norm_stats": {{"state": ..., "actions": ...}}}}')
    return {key: dict(stats[key]) for key in ("state", "actions")}


def save_norm_stats(stats: NormStats, path: Path) -> None:
    path.write_text(json.dumps({"norm_stats": stats}, indent=2) + "\n")


class Normaliser(nn.Module):
    """Scales robot states and actions as openpi does.

    z-score: (x - mean) / (std + 1e-6); quantile: (x - q01) / (q99 - q01 + 1e-6) * 2 - 1. Each is used
    in the form (x - offset) / scale. Dimensions beyond the robot's are zero.
    """

    state_offset: Tensor
    state_scale: Tensor
    action_offset: Tensor
    action_scale: Tensor

    def __init__(self, config: Pi0Config, stats: NormStats, source: str = "norm stats") -> None:
        """Raises ValueError, naming `source`, when a statistic is missing or has the wrong length."""
        super().__init__()
        self.config = config
        for name, key, width in (
            ("state", "state", config.robot_state_dim),
            ("action", "actions", config.robot_action_dim),
        ):
            first, second = (
                self._statistic(stats[key], statistic, key, width, config.action_dim, source)
                for statistic in STATISTICS[config.normalisation]
            )
            if config.normalisation == "z_score":
                offset, scale = first, second + EPSILON
            else:
                scale = (second - first + EPSILON) / 2
                offset = first + scale
            self.register_buffer(f"{name}_offset", offset.to(torch.float32), persistent=False)
            self.register_buffer(f"{name}_scale", scale.to(torch.float32), persistent=False)

    @staticmethod
    def _statistic(
        stats: dict[str, list[float]], statistic: str, key: str, width: int, most: int, source: str
    ) -> Tensor:
        if statistic not in stats:
            raise ValueError(f"{source}: {key} lacks '{statistic}'")
        values = stats[statistic]
        if not width <= len(values) <= most:
            raise ValueError(f"{source}: {key}.{statistic} has {len(values)} entries, expected {width} to {most}")
        return torch.tensor(values[:width], dtype=torch.float64)

    def state(self, state: Tensor) -> Tensor:
        """Raw float32 [..., robot_state_dim] -> normalised and zero-padded [..., action_dim]."""
        scaled = (state - self.state_offset) / self.state_scale
        return F.pad(scaled, (0, self.config.action_dim - self.config.robot_state_dim))

    def actions(self, actions: Tensor) -> Tensor:
        """Robot actions [..., robot_action_dim] -> the model's [..., action_dim] (training targets).

        With `delta_action_dims` the state must have been subtracted before.
        """
        scaled = (actions - self.action_offset) / self.action_scale
        return F.pad(scaled, (0, self.config.action_dim - self.config.robot_action_dim))

    def robot_actions(self, actions: Tensor, state: Tensor) -> Tensor:
        """The model's actions [B, H, action_dim] -> robot actions [B, H, robot_action_dim].

        state is the raw one [B, robot_state_dim]; `delta_action_dims` of it are added.
        """
        out = actions[..., : self.config.robot_action_dim] * self.action_scale + self.action_offset
        dims = self.config.delta_action_dims
        if dims:
            out = out + F.pad(state[:, None, :dims], (0, self.config.robot_action_dim - dims))
        return out


class PromptTokenizer:
    """Prompts to token ids as openpi's PaliGemma tokenizer does for pi0."""

    def __init__(self, tokenizer: Tokenizer, length: int, source: str = "tokenizer") -> None:
        """`length` is the number of language slots. Raises ValueError when there is no <bos> token."""
        bos = tokenizer.token_to_id("<bos>")
        if bos is None:
            raise ValueError(f"{source} has no token '<bos>'")
        pad = tokenizer.token_to_id("<pad>")
        self.tokenizer = tokenizer
        self.length = length
        self._bos: int = bos
        self._pad: int = 0 if pad is None else pad
        self._newline: list[int] = tokenizer.encode("\n", add_special_tokens=False).ids

    @classmethod
    def load(cls, path: Path, length: int) -> PromptTokenizer:
        """Reads a `tokenizer.json` of the tokenizers library; raises ValueError when it is not one."""
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from None
        return cls(tokenizer, length, str(path))

    def ids(self, prompt: str) -> list[int]:
        """[BOS] + prompt + newline, the newline encoded separately; neither padded nor truncated."""
        text = prompt.strip().replace("_", " ").replace("\n", " ")
        return [self._bos, *self.tokenizer.encode(text, add_special_tokens=False).ids, *self._newline]

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids int64 [B, L] and validity bool [B, L], padded or cut to the language slots."""
        rows = [self.ids(prompt)[: self.length] for prompt in prompts]
        tokens = torch.tensor([row + [self._pad] * (self.length - len(row)) for row in rows])
        mask = torch.tensor([[i < len(row) for i in range(self.length)] for row in rows])
        return tokens, mask
