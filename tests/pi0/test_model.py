"""The policy network against a naive reference, and its training path."""

from __future__ import annotations

import pytest
import torch
from support.pi0_models import import_tensors, make_model, make_sampler, small_config
from support.pi0_reference import Reference, tensor_shapes
from torch import Tensor

from dsrl_async.pi0.checkpoint import export_tensors
from dsrl_async.pi0.config import Pi0Config, tabletop_config
from dsrl_async.pi0.model import Pi0, time_grid
from dsrl_async.pi0.sampler import Sampler


def inputs(sampler: Sampler) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return sampler.images, sampler.tokens, sampler.token_mask, sampler.state


@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("pi05", [False, True])
def test_sampler_equals_naive_reference(pi05: bool, kv_heads: int, steps: int) -> None:
    model, tensors = make_model(small_config(pi05, kv_heads))
    sampler = make_sampler(model, batch=3, steps=steps)
    sampler.run()
    expected = Reference(model.config, tensors).sample(*inputs(sampler), sampler.noise, steps)
    assert expected.abs().max() > 2  # not a trivial output
    assert (sampler.actions - expected).abs().max() <= 1e-5


def test_tensor_names_are_openpis() -> None:
    for pi05 in (False, True):
        config = small_config(pi05)
        exported = export_tensors(Pi0(config))
        shapes = tensor_shapes(config)
        assert {name: tuple(tensor.shape) for name, tensor in exported.items()}.items() <= shapes.items()
        # what is not exported: 6 weights of the last VLM layer, the VLM's final norm, the expert's lm_head
        assert len(shapes) - len(exported) == 8


def test_published_sizes() -> None:
    with torch.device("meta"):
        pi0, pi05 = Pi0(Pi0Config()), Pi0(Pi0Config(pi05=True, max_token_len=200))
    assert len(tensor_shapes(pi0.config)) == 777
    assert len(tensor_shapes(pi05.config)) == 812
    # 3501.4 M and 3616.8 M, less the unused expert lm_head (263.3 M) and the last VLM layer's unused part
    unused = 257152 * 1024 + 2 * 2048 * 2048 + 3 * 2048 * 16384 + 2 * 2048
    assert sum(p.numel() for p in pi0.parameters()) + unused == pytest.approx(3501.4e6, abs=0.05e6)
    assert sum(p.numel() for p in pi05.parameters()) + unused == pytest.approx(3616.8e6, abs=0.05e6)
    assert sum(p.numel() for p in Pi0(tabletop_config()).parameters()) == pytest.approx(650e3, rel=0.05)


def test_rows_of_a_batch_are_independent() -> None:
    model, _ = make_model(small_config())
    together = make_sampler(model, batch=4)
    together.run()
    alone = make_sampler(model, batch=1)
    for row in range(4):
        for name in ("images", "state", "tokens", "token_mask", "noise"):
            getattr(alone, name).copy_(getattr(together, name)[row : row + 1])
        alone.run()
        assert (alone.actions[0] - together.actions[row]).abs().max() <= 3e-6


def test_empty_language_slots_do_not_matter_and_used_ones_do() -> None:
    model, _ = make_model(small_config())
    sampler = make_sampler(model, batch=2)
    sampler.run()
    before = sampler.actions.clone()
    sampler.tokens[~sampler.token_mask] = (sampler.tokens[~sampler.token_mask] + 1) % 40
    sampler.run()
    assert torch.equal(before, sampler.actions)
    sampler.tokens[1, 0] = (sampler.tokens[1, 0] + 1) % 40
    sampler.run()
    assert torch.equal(before[0], sampler.actions[0])
    assert not torch.allclose(before[1], sampler.actions[1])


@pytest.mark.parametrize("name", ["images", "state", "noise"])
def test_every_input_matters(name: str) -> None:
    model, _ = make_model(small_config())
    sampler = make_sampler(model, batch=1)
    sampler.run()
    before = sampler.actions.clone()
    buffer = getattr(sampler, name)
    buffer.copy_(buffer.flip(-1))
    sampler.run()
    assert not torch.allclose(before, sampler.actions, atol=1e-3)


def test_accumulated_time_grid_is_openpis() -> None:
    grid = time_grid(10, "accumulated")
    assert len(grid) == 10
    assert grid[:4] == pytest.approx([1, 0.899999976, 0.799999952, 0.699999928], abs=1e-9)
    assert grid[-1] == pytest.approx(0.0999999269, abs=1e-9)
    assert time_grid(10, "exact")[-1] == pytest.approx(0.1, abs=1e-12)
    for steps in (4, 8, 16):
        assert time_grid(steps, "accumulated") == time_grid(steps, "exact")
    for steps in (1, 3, 7, 100, 1000):
        assert len(time_grid(steps, "accumulated")) == steps


@pytest.mark.parametrize("pi05", [False, True])
def test_training_path_agrees_with_the_sampler(pi05: bool) -> None:
    model, _ = make_model(small_config(pi05))
    sampler = make_sampler(model, batch=3)
    sampler.run()
    prefix = model.encode_prefix(*inputs(sampler))
    x = sampler.noise
    for time in time_grid(10, "accumulated"):
        x = x - 0.1 * model.velocity(x, torch.full((3,), time), prefix).detach()
    assert (x - sampler.actions).abs().max() <= 1e-5


def test_velocity_takes_a_time_per_row_and_repeated_prefixes() -> None:
    model, _ = make_model(small_config())
    sampler = make_sampler(model, batch=2)
    prefix = model.encode_prefix(*inputs(sampler)).repeat(2)
    x, times = torch.randn(4, 10, 32), torch.tensor([0.1, 0.9, 0.4, 0.6])
    together = model.velocity(x, times, prefix)
    for i in range(4):
        row = [part[i // 2 : i // 2 + 1] for part in inputs(sampler)]
        one = model.velocity(x[i : i + 1], times[i : i + 1], model.encode_prefix(*row))
        assert (one[0] - together[i]).abs().max() <= 1e-5


@pytest.mark.parametrize("pi05", [False, True])
def test_every_parameter_gets_a_gradient(pi05: bool) -> None:
    model, _ = make_model(small_config(pi05))
    sampler = make_sampler(model, batch=2)
    prefix = model.encode_prefix(*inputs(sampler))
    model.velocity(sampler.noise, torch.tensor([0.3, 0.8]), prefix).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("pi05", [False, True])
def test_bfloat16_keeps_what_openpi_keeps_and_stays_close(pi05: bool) -> None:
    model, tensors = make_model(small_config(pi05))
    exact = make_sampler(model, batch=2)
    exact.run()
    half = Pi0(model.config).set_dtype(torch.bfloat16)
    import_tensors(half, tensors)
    kept = {name for name, parameter in half.named_parameters() if parameter.dtype == torch.float32}
    assert {"vision.patch.weight", "vision.position", "action_in.weight", "time_in.weight"} <= kept
    for name, parameter in half.named_parameters():
        if name.startswith(("vlm", "expert")):
            assert (parameter.dtype == torch.float32) == ("norm" in name), name
    rough = make_sampler(half, batch=2)
    rough.run()
    error = (rough.actions - exact.actions).square().mean().sqrt()
    assert 0 < error < 0.02 * exact.actions.square().mean().sqrt()
