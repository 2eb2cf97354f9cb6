"""The memory that a run is told to need against what sampling allocates."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, cast

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsrl_async.config.load import validate
from dsrl_async.config.settings import ConfigError, InferenceConfig
from dsrl_async.pi0.checkpoint import empty_model
from dsrl_async.pi0.config import EMBEDDED_POLICY, Pi0Config
from dsrl_async.pi0.memory import activation_bytes, buffer_bytes, weight_bytes
from dsrl_async.pi0.policy import Pi0Batch, Pi0Policy
from dsrl_async.pi0.processing import Normaliser
from dsrl_async.policies.pi0 import pi0_needs
from dsrl_async.run import preflight
from dsrl_async.run.inference.steering import SteeredPolicy
from dsrl_async.run.preflight.gpu_memory import policy_need
from dsrl_async.run.preflight.memory import policy_bytes
from dsrl_async.sac.networks import Actor


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


PI05 = Pi0Config(pi05=True, max_token_len=200, action_horizon=10)


def kept_bytes(tree: object, but: object = ()) -> int:
    """Bytes of the storages of `tree` that are not among those of `but`."""
    known = storages(but)
    return sum(storage.nbytes() for pointer, storage in storages(tree).items() if pointer not in known)


@pytest.mark.parametrize(
    ("config", "batch_size", "language_length", "dtype", "precision"),
    [
        (Pi0Config(), 16, 48, torch.float32, "dtype"),
        (Pi0Config(), 4, 24, torch.bfloat16, "dtype"),
        (Pi0Config(), 4, 24, torch.bfloat16, "fp8"),
        (PI05, 8, 200, torch.bfloat16, "dtype"),
        (dataclasses.replace(PI05, vision_float32=True), 1, 64, torch.bfloat16, "dtype"),
        (dataclasses.replace(PI05, vision_float32=True), 1, 64, torch.bfloat16, "fp8"),
    ],
)
def test_memory_of_a_policy(
    config: Pi0Config, batch_size: int, language_length: int, dtype: torch.dtype, precision: str
) -> None:
    """All runs on the meta device, which computes nothing and allocates what the CPU, or in 8 bits a GPU, does."""
    fp8 = precision == "fp8"
    model = empty_model(config, "meta", dtype, fp8)
    statistics = {name: [0.5] * 32 for name in ("mean", "std", "q01", "q99")}
    normaliser = Normaliser(config, {"state": statistics, "actions": statistics}).to("meta")
    loaded = types.SimpleNamespace(model=model, normaliser=normaliser)
    policy = types.SimpleNamespace(spec=config, loaded=loaded, denoise_steps=10, compiled=False, kernels="torch")
    batch = Pi0Batch(cast(Pi0Policy, policy), batch_size, language_length)
    sac = validate({}).sac
    with torch.device("meta"):
        actor = Actor(sac, config.action_horizon, "meta")
    steered = SteeredPolicy(batch, actor, sac)
    weights, sampler = [*model.parameters(), *model.buffers()], list(vars(batch.sampler).values())
    made = [list(vars(steered).values()), list(vars(batch).values()), sampler]
    sampler_and_weights = [weights, sampler]
    with Allocations(sampler_and_weights) as allocations:
        batch.sampler.encode()
        batch.sampler.denoise()
    sizes = (config, batch_size, language_length, dtype.itemsize)
    need = policy_need(
        validate({"policy": {"dtype": str(dtype).removeprefix("torch."), "prefill_precision": precision}}).model_copy(
            update={"inference": InferenceConfig(buckets=[batch_size]), "actors": batch_size}
        ),
        pi0_needs(config),
        [language_length],
    )
    of_weights, of_buffers, of_actor = kept_bytes(weights), kept_bytes(made, weights), actor.flat.nbytes
    assert of_weights == pytest.approx(weight_bytes(config, dtype.itemsize, fp8), rel=1e-4)
    assert of_buffers == pytest.approx(need.buffers - of_actor, rel=5e-3)
    assert allocations.peak == pytest.approx(activation_bytes(*sizes), rel=1e-2)
    assert (need.weights, need.activations) == (weight_bytes(config, dtype.itemsize, fp8), activation_bytes(*sizes))


def test_samplers_count_in_what_a_run_needs() -> None:
    """Those of all batch sizes up to the number of actors, and the activations of the largest; on a GPU, nothing."""
    full, needs = Pi0Config(), pi0_needs(Pi0Config())
    settings = {"actors": 12, "device": "cpu", "inference": {"buckets": [2, 8, 16, 32]}}
    sizes = (full.max_token_len, 4)
    expected = sum(buffer_bytes(full, rows, *sizes) for rows in (2, 8, 16))
    expected += activation_bytes(full, 16, *sizes) + weight_bytes(full, 4)
    assert policy_bytes(validate(settings), needs) == expected
    assert policy_bytes(validate(settings | {"actors": 40}), needs) > expected + buffer_bytes(full, 32, *sizes)
    assert policy_bytes(validate(settings | {"device": "cuda"}), needs) == 0


def test_too_little_memory_for_the_policy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsrl_async.run.preflight.memory.available_memory", lambda: 15 << 30)
    config = validate({"device": "cpu", "policy": {"checkpoint": str(EMBEDDED_POLICY)}})
    run = preflight.check_run(config)
    run = dataclasses.replace(run, policy=dataclasses.replace(run.policy, needs=pi0_needs(Pi0Config())))
    with pytest.raises(
        ConfigError, match=r"needs about 1\d\.\d GiB .* 1\d\.\d the policy's\) .* policy\.dtype to bfloat16$"
    ):
        preflight.check_memory(run)
    preflight.check_memory(run.with_actors(1))
