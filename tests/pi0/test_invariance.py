"""A row's actions depend on that row alone: not on its batch, on padding, or on the number of language slots."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsrl_async.bench import synthetic
from dsrl_async.bench.systems.policy import seeded_policy
from dsrl_async.pi0 import sample_actions
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.model import Pi0

Leak = Callable[[dict[str, Tensor]], None]
"""Changes a batch's inputs so that its rows are no longer independent."""
PROMPTS = (17, 5, 24, 9)
"""Lengths of the four rows' prompts."""
FLOAT32_TOLERANCE = 1e-6
"""Allowed share of the row's largest action: a few last places, as matrix products sum in another order."""
BFLOAT16_TOLERANCE = 0.01
"""The same for bfloat16: about what it differs from float32 by."""
VARIANTS: dict[str, tuple[list[int], int | None]] = {
    "second of two": ([1, 0], 24),
    "last of four": ([3, 2, 1, 0], 24),
    "padded to eight": ([0, 1, 1, 1, 1, 1, 1, 1], 24),
    "32 slots": ([0], 32),
    "all slots": ([0], None),
    "all of it": ([1, 2, 0], None),
}
"""Which observations are sampled together, and how many language slots they get (None: as many as the model has)."""


@functools.lru_cache(maxsize=1)
def policy_of(model: str, dtype: torch.dtype) -> Pi0:
    return seeded_policy(Pi0Config(**synthetic.sizes(model, "toy")), dtype, seed=0)


def sample(policy: Pi0, model: str, rows: list[int], slots: int, leak: Leak | None) -> Tensor:
    """Actions of the given rows of one batch of observations, in this order, with so many language slots."""
    arrays = synthetic.observation(synthetic.sizes(model, "toy"), PROMPTS, seed=0)
    inputs: dict[str, Any] = {
        name: torch.from_numpy(np.ascontiguousarray(array[rows])) for name, array in arrays.items()
    }
    for name in ("tokens", "token_mask"):
        inputs[name] = inputs[name][:, :slots]
    if leak is not None:
        leak(inputs)
    return sample_actions(policy, **inputs)


def largest_difference(
    model: str, dtype: torch.dtype, variants: Sequence[str] = tuple(VARIANTS), leak: Leak | None = None
) -> dict[str, float]:
    """How far row 0's actions are from those that it gets alone with 24 slots, over the largest of these."""
    policy = policy_of(model, dtype)
    alone = sample(policy, model, [0], 24, leak)[0]
    differences = {}
    for name in variants:
        rows, slots = VARIANTS[name]
        actions = sample(policy, model, rows, slots or policy.config.max_token_len, leak)[rows.index(0)]
        differences[name] = ((actions - alone).abs().max() / alone.abs().max()).item()
    print(f"\n{model} {dtype}: " + ", ".join(f"{name} {value:.1e}" for name, value in differences.items()), end="")
    return differences


@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_float32_rows_are_independent(model: str) -> None:
    differences = largest_difference(model, torch.float32)
    assert max(differences.values()) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_bfloat16_rows_differ_no_more_than_by_rounding(model: str) -> None:
    differences = largest_difference(model, torch.bfloat16)
    assert max(differences.values()) <= BFLOAT16_TOLERANCE


def neighbours_are_seen(inputs: dict[str, Tensor]) -> None:
    inputs["images"] += 1e-3 * inputs["images"].mean(0)


def padding_is_seen(inputs: dict[str, Tensor]) -> None:
    inputs["token_mask"].fill_(True)


@pytest.mark.parametrize(("leak", "variant"), [(neighbours_are_seen, "second of two"), (padding_is_seen, "32 slots")])
def test_a_leak_is_found(leak: Leak, variant: str) -> None:
    difference = largest_difference("pi0", torch.float32, [variant], leak)[variant]
    assert difference > 10 * FLOAT32_TOLERANCE
