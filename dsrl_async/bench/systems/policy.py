"""This project's policy with the weights of `synthetic`. As a program it is the measured process (`serving`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsrl_async.bench import synthetic
from dsrl_async.bench.systems.serving import Prepare, Sample, StageMeter, serve
from dsrl_async.pi0.checkpoint import empty_model, parts_of
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.model import Pi0
from dsrl_async.pi0.packed import can_pack, pack_weights
from dsrl_async.pi0.sampler import Sampler
from dsrl_async.pi0.tokenizer import language_bucket


@torch.no_grad()
def seeded_policy(config: Pi0Config, dtype: torch.dtype, seed: int) -> Pi0:
    """A policy on the CPU, filled tensor by tensor, so that a full-size one takes no more memory than its weights."""
    policy = empty_model(config, "cpu", dtype)
    for part, rows in parts_of(policy):
        rows.copy_(torch.from_numpy(synthetic.weight(part.name, part.shape, seed)))
    return policy


def language_length(token_mask: np.ndarray) -> int:
    """Number of language slots for the prompts of a batch, bool [B, L], in which valid tokens come first."""
    return language_bucket(int(token_mask.sum(1).max()), token_mask.shape[1])


def load(config: synthetic.Sizes, dtype: str, seed: int) -> Prepare:
    policy = seeded_policy(Pi0Config(**config), getattr(torch, dtype), seed)
    if can_pack(policy):  # as in a run
        pack_weights(policy)

    def prepare(inputs: dict[str, np.ndarray], denoise_steps: int) -> Sample:
        batch, length = len(inputs["noise"]), language_length(inputs["token_mask"])
        sampler = Sampler(policy, batch, length, denoise_steps)
        for name, array in inputs.items():
            given = array[:, :length] if name in ("tokens", "token_mask") else array
            getattr(sampler, name).copy_(torch.from_numpy(given))

        def sample(meter: StageMeter) -> Tensor:
            hooks = [
                policy.vision.register_forward_pre_hook(lambda *_: meter.enter("vision")),
                policy.vision.register_forward_hook(lambda *_: meter.enter("prefill")),
            ]
            sampler.encode()
            meter.enter("denoise")
            sampler.denoise()
            for hook in hooks:
                hook.remove()
            return sampler.actions

        return sample

    return prepare


if __name__ == "__main__":
    serve(load)
