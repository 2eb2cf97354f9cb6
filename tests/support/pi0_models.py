"""Small Pi0 models with random weights, and samplers of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from support.pi0_reference import random_state_dict
from torch import Tensor

from dsrl_async.pi0.checkpoint import parts_of
from dsrl_async.pi0.config import Pi0Config, tabletop_config
from dsrl_async.pi0.model import Pi0
from dsrl_async.pi0.processing import NormStats
from dsrl_async.pi0.sampler import Sampler


def small_config(pi05: bool = False, kv_heads: int = 1) -> Pi0Config:
    """Sizes that are all different, so that no two axes can be confused."""
    return dataclasses.replace(
        tabletop_config(), pi05=pi05, kv_heads=kv_heads, vlm_width=80, expert_width=48, head_dim=28, depth=3
    )


def norm_stats() -> NormStats:
    generator = torch.Generator().manual_seed(1)

    def of(width: int) -> dict[str, list[float]]:
        mean = torch.randn(width, generator=generator)
        std = torch.rand(width, generator=generator) + 0.5
        parts = {"mean": mean, "std": std, "q01": mean - 2 * std, "q99": mean + 2.5 * std}
        return {name: part.tolist() for name, part in parts.items()}

    return {"state": of(8), "actions": of(7)}


@torch.no_grad()
def import_tensors(model: Pi0, tensors: Mapping[str, Tensor]) -> None:
    """Fills the model from tensors under openpi's names, cast to the model's dtypes."""
    for part, target in parts_of(model):
        target.copy_(tensors[part.name])


def make_model(config: Pi0Config, seed: int = 0) -> tuple[Pi0, dict[str, Tensor]]:
    tensors = random_state_dict(config, seed)
    model = Pi0(config)
    import_tensors(model, tensors)
    return model, tensors


def make_sampler(model: Pi0, batch: int, steps: int = 10, seed: int = 0, length: int | None = None) -> Sampler:
    sampler = Sampler(model, batch, length or model.config.max_token_len, steps)
    fill(sampler, seed)
    return sampler


def fill(sampler: Sampler, seed: int) -> None:
    """Random inputs; row i has a prompt of 4 i + 1 tokens (all slots from the last on)."""
    generator = torch.Generator().manual_seed(seed)
    sampler.images.uniform_(-1, 1, generator=generator)
    sampler.state.normal_(generator=generator)
    sampler.tokens.random_(0, sampler.model.config.vocab_size, generator=generator)
    length = torch.arange(sampler.batch_size)[:, None] * 4 + 1
    sampler.token_mask.copy_(torch.arange(sampler.language_length) < length)
    sampler.noise.normal_(generator=generator)
