"""That the sampler can be captured in a CUDA graph, as far as a CPU can tell."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_pi0 import fill, make_model, make_sampler, norm_stats, small_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.model import Pi0
from dsrl_async.pi0.processing import Normaliser
from dsrl_async.pi0.sampler import Sampler

torch.set_num_threads(1)

SYNC = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
}
CREATE = {"empty", "empty_like", "new_empty", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "full"}
CREATE |= {"full_like", "new_full", "arange", "linspace", "scalar_tensor", "lift_fresh", "cat", "stack"}


class Watch(TorchDispatchMode):
    """Records every operation, and fails at a forbidden one."""

    def __init__(self, forbidden: set[str], static: dict[int, str]) -> None:
        super().__init__()
        self.forbidden, self.static = forbidden, static
        self.trace: list[tuple[str, tuple[object, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.forbidden:
            raise AssertionError(f"forbidden operation {name}")
        leaves = tree_leaves((args, kwargs))
        seen = tuple(self.describe(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        self.trace.append((name, seen))
        return func(*args, **(kwargs or {}))

    def describe(self, tensor: Tensor) -> tuple[object, ...]:
        """Shape, stride, dtype, and which static storage it is in, if in one."""
        where = self.static.get(tensor.untyped_storage().data_ptr(), "temporary")
        return (where, tensor.storage_offset() if where != "temporary" else 0, tensor.shape, tensor.dtype)


def static_storages(sampler: Sampler) -> dict[int, str]:
    found: dict[int, str] = {}
    owners = {
        **vars(sampler),
        **dict(sampler.model.named_parameters()),
        **dict(sampler.normaliser.named_buffers()),
    }
    for name, value in owners.items():
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                found[leaf.untyped_storage().data_ptr()] = name
    return found


def watched(sampler: Sampler) -> list[tuple[str, tuple[object, ...]]]:
    """The trace of one run; fails on a host sync anywhere, or on a creation in the denoise loop."""
    trace = []
    for half, forbidden in ((sampler.encode, SYNC), (sampler.denoise, SYNC | CREATE)):
        with Watch(forbidden, static_storages(sampler)) as watch:
            half()
        trace += watch.trace
    return trace


@pytest.mark.parametrize("pi05", [False, True])
def test_no_sync_no_creation_and_the_same_trace_for_any_input(pi05: bool) -> None:
    model, _ = make_model(small_config(pi05))
    sampler = make_sampler(model, batch=2)
    first = watched(sampler)
    fill(sampler, seed=1)
    sampler.token_mask.fill_(True)
    second = watched(sampler)
    assert len(first) > 500
    assert first == second


@pytest.mark.parametrize(
    ("half", "violation"),
    [
        ("run_actions", lambda x: x.sum().item()),
        ("run_actions", lambda x: bool(x.sum() > 0)),
        ("run_actions", lambda x: torch.zeros(3)),
        ("run_actions", lambda x: torch.tensor(0.1)),
        ("run_actions", lambda x: torch.cat([x, x])),
        ("run_prefix", lambda x: x.sum().item()),
    ],
)
def test_planted_violations_are_found(half: str, violation: Callable[[Tensor], object]) -> None:
    model, _ = make_model(small_config())
    sampler = make_sampler(model, batch=1)
    honest = getattr(model, half)

    def planted(x: Tensor, *rest: Any) -> Tensor:
        violation(x)
        result: Tensor = honest(x, *rest)
        return result

    object.__setattr__(model, half, planted)
    with pytest.raises(AssertionError, match="forbidden operation"):
        watched(sampler)


def test_a_data_dependent_operation_changes_the_trace() -> None:
    model, _ = make_model(small_config())
    sampler = make_sampler(model, batch=1)
    honest = model.run_actions

    def planted(x: Tensor, *rest: Any) -> Tensor:
        return honest(x, *rest) * (1 if sampler.state.numpy().sum() > 0 else 2)

    object.__setattr__(model, "run_actions", planted)
    sampler.state.fill_(1)
    first = watched(sampler)
    sampler.state.fill_(-1)
    assert first != watched(sampler)


def test_runs_leave_no_trace_of_earlier_ones() -> None:
    model, _ = make_model(small_config())
    sampler = make_sampler(model, batch=2)
    sampler.run()
    first = sampler.actions.clone()
    fill(sampler, seed=1)
    sampler.run()
    assert not torch.equal(first, sampler.actions)
    fill(sampler, seed=0)
    sampler.run()
    assert torch.equal(first, sampler.actions)


@pytest.mark.parametrize("config", [Pi0Config(), Pi0Config(pi05=True, max_token_len=200, action_horizon=10)])
def test_full_size_runs_on_the_meta_device(config: Pi0Config) -> None:
    with torch.device("meta"):
        model = Pi0(config).set_dtype(torch.bfloat16)
    sampler = Sampler(model, Normaliser(config, norm_stats()).to("meta"), batch_size=8, denoise_steps=2)
    sampler.run()
    assert sampler.actions.shape == (8, config.action_horizon, 7)


def test_capture_falls_back_to_eager_off_cuda(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = make_model(small_config())
    sampler = make_sampler(model, batch=1)
    with caplog.at_level(logging.INFO):
        assert sampler.capture() is None
    assert "no CUDA graphs" in caplog.text
    sampler.run()
    assert sampler.actions.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_run_equals_the_eager_one() -> None:
    model, _ = make_model(small_config())
    model.cuda()
    sampler = Sampler(model, Normaliser(model.config, norm_stats()).cuda(), 2, 10)
    sampler.noise.normal_()
    sampler.token_mask.fill_(True)
    sampler.run()
    expected = sampler.actions.clone()
    assert sampler.capture() is not None
    sampler.actions.zero_()
    sampler.run()
    torch.cuda.synchronize()
    assert (sampler.actions - expected).abs().max() <= 1e-5
