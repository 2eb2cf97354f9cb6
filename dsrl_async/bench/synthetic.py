"""Policies and observations made from a seed, so that two programs can compute the same without exchanging files.

This module needs only numpy and the standard library, since the published implementations, in environments of their
own, import it too. A tensor depends only on the seed, its name and its shape, and is made from the raw output of a
counter-based generator, which numpy promises never to change.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Sizes = dict[str, Any]
"""Fields of `dsrl_async.pi0.config.Pi0Config`."""

FULL: Sizes = {
    "cameras": 2,
    "image_size": 224,
    "patch_size": 14,
    "vision_width": 1152,
    "vision_depth": 27,
    "vision_heads": 16,
    "vision_mlp": 4304,
    "vlm_width": 2048,
    "vlm_mlp": 16384,
    "expert_width": 1024,
    "expert_mlp": 4096,
    "depth": 18,
    "heads": 8,
    "kv_heads": 1,
    "head_dim": 256,
    "vocab_size": 257152,
    "action_dim": 32,
}
SIZES: dict[str, Sizes] = {
    "full": FULL,
    "two_layers": {**FULL, "vision_depth": 2, "depth": 2, "vocab_size": 512},
    "toy": {
        **FULL,
        "vision_width": 72,
        "vision_heads": 4,
        "vision_mlp": 100,
        "vlm_width": 80,
        "vlm_mlp": 144,
        "expert_width": 64,
        "expert_mlp": 112,
        "head_dim": 32,
        "vocab_size": 300,
    },
}
"""`full` is what openpi published (3.2 G parameters in use); `two_layers` has its widths, `toy` its depths."""
MODELS: dict[str, Sizes] = {
    "pi0": {"pi05": False, "action_horizon": 50, "max_token_len": 48},
    "pi05": {"pi05": True, "action_horizon": 10, "max_token_len": 200},
}
"""The two published models as openpi configures them for LIBERO."""
EMBEDDING = "paligemma_with_expert.paligemma.lm_head.weight"
"""The name under which openpi stores the embedding table. Its modules have it under a second name, too."""


def sizes(model: str, size: str) -> Sizes:
    """The fields of `Pi0Config` for a model of `MODELS` in a size of `SIZES`."""
    return {**SIZES[size], **MODELS[model]}


def uniform(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """float32 in [-1, 1], determined by the name, the number of elements and the seed."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    count = math.prod(shape)
    raw = np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)).random_raw((count + 1) // 2)
    values = raw.view(np.uint32)[:count].astype(np.float32)
    values *= np.float32(2.0**-31)
    values -= np.float32(1.0)
    return values.reshape(shape)


def weight(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """A policy's tensor under openpi's name, float32.

    Matrices preserve the variance of what passes through them (the embedding table: after openpi's factor of
    sqrt(width)). Biases, norms and the position table are far from the values that would have no effect.
    """
    values = uniform(name, shape, seed)
    if name.endswith("position_embedding.weight"):
        return values
    if len(shape) > 1:
        values *= np.float32(math.sqrt(3 / math.prod(shape[1:])))
        return values
    values *= np.float32(0.5)
    if "vision_model" in name and name.endswith("weight"):  # LayerNorm; Gemma's norms add the 1 themselves
        values += np.float32(1.0)
    return values


def observation(config: Sizes, prompt_lengths: Sequence[int], seed: int) -> dict[str, np.ndarray]:
    """Processed inputs for a batch with a row per prompt length.

    They are `images` float32 [B, cameras, 3, S, S] in [-1, 1], `tokens` int64 [B, L], `token_mask` bool [B, L], `state`
    float32 [B, action_dim] and `noise` float32 [B, H, action_dim]. Row i does not depend on the other rows. Empty
    language slots hold arbitrary ids, which must not matter.
    """

    def rows(name: str, *shape: int) -> np.ndarray:
        return np.stack([uniform(f"{name}/{row}", shape, seed) for row in range(len(prompt_lengths))])

    size, slots = config["image_size"], config["max_token_len"]
    unit = (rows("tokens", slots).astype(np.float64) + 1) / 2
    return {
        "images": rows("images", config["cameras"], 3, size, size),
        "tokens": np.minimum(unit * config["vocab_size"], config["vocab_size"] - 1).astype(np.int64),
        "token_mask": np.arange(slots) < np.array(prompt_lengths)[:, None],
        "state": rows("state", config["action_dim"]),
        "noise": rows("noise", config["action_horizon"], config["action_dim"]) * np.float32(math.sqrt(3)),
    }


def prompt_lengths(config: Sizes, batch: int) -> list[int]:
    """Prompt lengths for a batch, from a few tokens to all language slots. The first is typical of LIBERO."""
    slots = config["max_token_len"]
    usual = [17, slots, 5, slots // 2, 24, 9, 31, 12]
    return [usual[row % len(usual)] for row in range(batch)]
