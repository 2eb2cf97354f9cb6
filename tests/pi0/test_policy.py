"""A policy over static buffers, where these are on a device that the host's memory does not belong to."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.devices import CountCopies
from torch import Tensor

from dsrl_async.pi0.checkpoint import load_policy
from dsrl_async.pi0.config import EMBEDDED_POLICY
from dsrl_async.pi0.policy import Pi0Batch, Pi0Policy

PROMPTS = ("put the block on the red plate", "put", "the block")


def make_batch(state_in_prompt: bool, rows: int) -> Pi0Batch:
    loaded = load_policy(EMBEDDED_POLICY)
    config = dataclasses.replace(loaded.config, state_in_prompt=state_in_prompt)
    policy = Pi0Policy(dataclasses.replace(loaded, config=config), PROMPTS, denoise_steps=2)
    return policy.batch(rows, int(policy.prompt_lengths.max()))


def expected_rows(batch: Pi0Batch, prompts: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    policy, length = batch.policy, batch.tokens.shape[1]
    texts = [PROMPTS[number] for number in prompts]
    states = None
    if policy.spec.state_in_prompt:
        states = policy.loaded.normaliser.state(batch.state[: len(prompts)])[:, : policy.spec.robot_state_dim]
    tokens, token_mask = policy.loaded.tokenizer(texts, states)
    return tokens[:, :length], token_mask[:, :length]


@pytest.mark.parametrize("state_in_prompt", [False, True])
def test_prompts_fill_the_first_rows(state_in_prompt: bool) -> None:
    batch = make_batch(state_in_prompt, rows=4)
    batch.state.normal_(generator=torch.Generator().manual_seed(0))
    for prompts in (np.array([2, 0, 1, 0]), np.array([1, 2])):
        batch.fill_prompts(prompts)
        tokens, token_mask = expected_rows(batch, prompts)
        assert (batch.tokens[: len(prompts)] == tokens).all()
        assert (batch.token_mask[: len(prompts)] == token_mask).all()


@pytest.mark.parametrize("state_in_prompt", [False, True])
def test_prompts_reach_buffers_on_another_device(state_in_prompt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that hold the state come from the tokenizer, on the host; the others from a table on the device.

    The state is read back from a real device; from this one nothing can be, so that what holds it is made beforehand.
    """
    batch = make_batch(state_in_prompt, rows=3)
    prompts = np.array([1, 2])
    made = batch.policy.loaded.tokenizer([PROMPTS[number] for number in prompts])
    monkeypatch.setattr(batch.policy, "state_tokens", lambda *arguments: made)
    for owner in (batch.policy, batch):
        owner.tokens, owner.token_mask = owner.tokens.to("meta"), owner.token_mask.to("meta")
    with CountCopies() as copies:
        batch.fill_prompts(prompts)
    assert copies.up == (2 if state_in_prompt else 1)
    assert batch.tokens.is_meta
    assert batch.token_mask.is_meta
