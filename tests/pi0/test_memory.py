"""The memory that a run is told to need against what sampling allocates."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsrl_async.config.load import validate
from dsrl_async.config.settings import ConfigError
from dsrl_async.pi0.checkpoint import empty_model
from dsrl_async.pi0.config import EMBEDDED_POLICY, Pi0Config
from dsrl_async.pi0.memory import activation_bytes, buffer_bytes
from dsrl_async.pi0.sampler import Sampler
from dsrl_async.pi0.tensors import parameter_count
from dsrl_async.run import preflight
from dsrl_async.run.preflight.memory import policy_bytes


class Allocations(TorchDispatchMode):
    """Most bytes of the storages that were made in this mode and alive at the same time."""

    def __init__(self, kept: object) -> None:
        super().__init__()
        self.kept = set(storages(kept))
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for pointer, storage in storages(out).items():
            if pointer not in self.kept:
                self.alive[pointer] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {pointer: entry for pointer, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def storages(tree: object) -> dict[int, torch.UntypedStorage]:
    found = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return {storage._cdata: storage for storage in found}


@pytest.mark.parametrize(
    ("config", "batch_size", "language_length", "dtype"),
    [
        (Pi0Config(), 16, 48, torch.float32),
        (Pi0Config(), 4, 24, torch.bfloat16),
        (Pi0Config(pi05=True, max_token_len=200, action_horizon=10), 8, 200, torch.bfloat16),
    ],
)
def test_memory_of_a_sampler(config: Pi0Config, batch_size: int, language_length: int, dtype: torch.dtype) -> None:
    """The sampler runs on the meta device, which computes nothing and allocates what the CPU does."""
    model = empty_model(config, "meta", dtype)
    sampler = Sampler(model, batch_size, language_length, 1)
    weights, made = [*model.parameters(), *model.buffers()], list(vars(sampler).values())
    buffers = sum(storage.nbytes() for pointer, storage in storages(made).items() if pointer not in storages(weights))
    with Allocations([weights, made]) as allocations:
        sampler.encode()
        sampler.denoise()
    sizes = (config, batch_size, language_length, dtype.itemsize)
    assert buffers == pytest.approx(buffer_bytes(*sizes), rel=0.03)
    assert allocations.peak == pytest.approx(activation_bytes(*sizes), rel=0.03)


def test_samplers_count_in_what_a_run_needs() -> None:
    """Those of all batch sizes up to the number of actors, and the activations of the largest; on a GPU, nothing."""
    full = Pi0Config()
    settings = {"actors": 12, "device": "cpu", "inference": {"buckets": [2, 8, 16, 32]}}
    sizes, rows = (full, 1, full.max_token_len, 4), 2 + 8 + 16
    expected = rows * buffer_bytes(*sizes) + 16 * activation_bytes(*sizes) + 4 * parameter_count(full)
    assert policy_bytes(validate(settings), full) == expected
    assert policy_bytes(validate(settings | {"actors": 40}), full) > expected + 32 * buffer_bytes(*sizes)
    assert policy_bytes(validate(settings | {"device": "cuda"}), full) == 0


def test_too_little_memory_for_the_policy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsrl_async.run.preflight.memory.available_memory", lambda: 15 << 30)
    config = validate({"device": "cpu", "policy": {"checkpoint": str(EMBEDDED_POLICY)}})
    run = preflight.check_run(config)
    run = dataclasses.replace(run, policy=run.policy._replace(config=Pi0Config()))
    with pytest.raises(
        ConfigError, match=r"needs about 1\d\.\d GiB .* 1\d\.\d the policy's\) .* policy\.dtype to bfloat16$"
    ):
        preflight.check_memory(run)
    preflight.check_memory(run.with_actors(1))
