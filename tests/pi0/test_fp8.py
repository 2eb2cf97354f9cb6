"""`policy.prefill_precision: fp8`: its numbers, what it asks of a GPU, and which weights it keeps in 8 bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support.pi0_models import make_model, make_sampler, small_config
from torch import Tensor, nn

from dsrl_async.config.settings import PolicyConfig
from dsrl_async.pi0.checkpoint import empty_model, parts_of, read_policy
from dsrl_async.pi0.config import EMBEDDED_POLICY, Pi0Config
from dsrl_async.pi0.files import find_policy
from dsrl_async.pi0.fp8 import FLOAT8, Fp8Linear, quantise, scaled_product, use_fp8
from dsrl_async.pi0.memory import fp8_weights, weight_bytes
from dsrl_async.pi0.sampler import Sampler
from dsrl_async.policies.pi0 import pi0_record

CONFIG = dataclasses.replace(small_config(), head_dim=32)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(values: Tensor, scale: Tensor) -> Tensor:
    return values.double() * scale.double()


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_is_rounded_by_its_own_scale(dtype: torch.dtype) -> None:
    rows = (normal(6, 64) * torch.tensor([1e-6, 1e-3, 1.0, 40.0, 1e6, 0.0])[:, None]).to(dtype)
    values, scale = quantise(rows)
    assert (values.dtype, values.shape, scale.dtype, scale.shape) == (FLOAT8, rows.shape, torch.float32, (6, 1))
    assert values.float().abs().amax(1).tolist() == [448, 448, 448, 448, 448, 0]
    largest = rows.double().abs().amax(1, keepdim=True)
    # half of the last of 4 bits, or, near zero, half of the smallest step, 2^-9 in units of the scale
    error = (exact(values, scale) - rows.double()).abs()
    assert (error <= torch.maximum(rows.double().abs() * 2**-4, largest / 448 * 2**-10) * 1.001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_multiplies_the_rounded_numbers(dtype: torch.dtype, bias: bool) -> None:
    """The reference multiplies in float64, so that only the result's own rounding is left."""
    linear = nn.Linear(96, 48, bias).to(dtype).requires_grad_(False)
    x = normal(2, 5, 96, seed=1).to(dtype) * 3
    layer = Fp8Linear(linear)
    rounded_x, rounded_weight = (exact(*quantise(rows)) for rows in (x.flatten(0, 1), linear.weight.float()))
    expected = rounded_x @ rounded_weight.t() + (linear.bias.double() if bias else 0)
    got = layer(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected.view(2, 5, 48), rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch multiplies row-wise scaled float8 on a CPU from 2.13 on")
def test_the_simulation_is_what_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own row-wise product, called as on a GPU; it exists on the CPU, too, where the policy does without."""
    values, x_scale = quantise(normal(40, 128))
    weight, weight_scale = quantise(normal(64, 128, seed=1) * torch.linspace(0.01, 10, 64)[:, None])
    operands, bias = (values, x_scale, weight, weight_scale.t()), normal(64, seed=2).bfloat16()
    simulated = scaled_product(*operands, bias, torch.bfloat16)
    theirs = torch._scaled_mm(
        values, weight.t(), x_scale, weight_scale.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=False
    )
    torch.testing.assert_close(simulated, theirs, rtol=2**-8, atol=0)
    assert (simulated != theirs).float().mean() < 0.01, "but for sums in another order they are equal"


# --- what a GPU is asked --------------------------------------------------------------------------------------------


def test_what_a_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The observation's pass on the meta device, where torch checks shapes and layouts as it does on a GPU.

    Two observations, so that the tokens' number is that of no width, and no multiple of 16.
    """
    asked: list[dict[str, Any]] = []
    original = torch._scaled_mm

    def scaled_mm(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        asked.append({"x": x, "weight": weight, **options})
        return original(x, weight, **options)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    sampler = Sampler(empty_model(CONFIG, "meta", torch.bfloat16, fp8=True), 2, 5, 1)
    sampler.encode()
    sampler.denoise()
    tokens = {2 * CONFIG.cameras * CONFIG.image_tokens, 2 * (CONFIG.cameras * CONFIG.image_tokens + 5)}
    assert len(asked) == len(fp8_weights(CONFIG)) == 4 * CONFIG.vision_depth + 3 * (CONFIG.depth - 1)
    assert {call["x"].shape[0] for call in asked} == tokens
    for call in asked:
        x, weight, x_scale, weight_scale = (call[name] for name in ("x", "weight", "scale_a", "scale_b"))
        (rows, width), channels = x.shape, weight.shape[1]
        assert (x.dtype, weight.dtype, x_scale.dtype, weight_scale.dtype) == (FLOAT8, FLOAT8, *2 * [torch.float32])
        assert (x.stride(), weight.stride()) == ((width, 1), (1, width)), "tokens in rows, output channels in columns"
        assert width % 16 == channels % 16 == 0
        assert (x_scale.shape, weight_scale.shape) == ((rows, 1), (1, channels))
        assert x_scale.is_contiguous()
        assert weight_scale.is_contiguous()
        assert call["out_dtype"] == torch.bfloat16
        assert call["use_fast_accum"] is False
        assert call["bias"] is None or (call["bias"].dtype, call["bias"].shape) == (torch.bfloat16, (channels,))
    assert {call["bias"] is None for call in asked} == {True, False}, "vision has biases, the language model has none"


# --- weights --------------------------------------------------------------------------------------------------------


def eight_bit(model: nn.Module) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Fp8Linear)}


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({}, ()),
        ({"vision_float32": True}, ("vision.",)),
        ({"vision_mlp": 200}, (".fc1.", ".fc2.")),
        ({"vlm_mlp": 264}, (".down.",)),
        ({"vlm_width": 88}, ("vlm.",)),
    ],
)
def test_which_weights_have_8_bits(changes: dict[str, Any], left_out: tuple[str, ...]) -> None:
    """None of the expert, none that make keys and values of the language model, none that keep float32, none of a
    width that `torch._scaled_mm` does not take."""
    config = dataclasses.replace(CONFIG, **changes)
    model = empty_model(config, "meta", torch.bfloat16, fp8=True)
    everything = {
        f"{name}.weight"
        for stack in ("vision", "vlm")
        for name, module in empty_model(config, "meta", torch.float32).named_modules()
        if name.startswith(f"{stack}.layers.") and isinstance(module, nn.Linear)
    }
    left_out += tuple(f"vlm.layers.{layer}.qkv." for layer in range(config.depth))
    out = {name for name in everything if any(part in name for part in left_out)}
    assert eight_bit(model) == set(fp8_weights(config)) == everything - out
    kept = sum(tensor.nbytes for tensor in model.parameters())
    assert kept == weight_bytes(config, 2, fp8=True)
    assert weight_bytes(Pi0Config(), 2, fp8=True) < 0.66 * weight_bytes(Pi0Config(), 2)


def test_weights_are_rounded_once_from_what_the_file_holds() -> None:
    files = find_policy(EMBEDDED_POLICY)
    plain = read_policy(files, "cpu", torch.float32).model
    rounded = read_policy(files, "cpu", torch.bfloat16, fp8=True).model
    assert eight_bit(rounded) == set(fp8_weights(plain.config)) != set()
    for name in eight_bit(rounded):
        layer = rounded.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, Fp8Linear)
        values, scale = quantise(plain.get_parameter(name))
        assert torch.equal(layer.weight.float(), values.float()), name
        assert torch.equal(layer.scale, scale.t()), name
    others = {name: tensor for name, tensor in rounded.named_parameters() if tensor.dtype != FLOAT8}
    for name, tensor in read_policy(files, "cpu", torch.bfloat16).model.named_parameters():
        if name in others:
            assert torch.equal(others[name], tensor), name


@pytest.mark.parametrize("pi05", [False, True])
def test_actions_are_close_to_the_policys_own(pi05: bool) -> None:
    """Random weights, float32 beside, so that all of the difference comes from 8 bits: 2.8e-2 and 1.2e-2 of the RMS."""
    model, _ = make_model(dataclasses.replace(CONFIG, pi05=pi05))
    sampler = make_sampler(model, 3)
    sampler.run()
    plain = sampler.actions.clone()
    use_fp8(model, fp8_weights(model.config))
    sampler = make_sampler(model, 3)
    sampler.run()
    error = (sampler.actions - plain).square().mean().sqrt() / plain.square().mean().sqrt()
    assert 1e-3 < error < 0.1


@pytest.mark.parametrize("precision", ["dtype", "fp8"])
def test_the_setting_decides(precision: str) -> None:
    settings = PolicyConfig.model_validate({"prefill_precision": precision})
    record = pi0_record(find_policy(EMBEDDED_POLICY))
    policy: Any = record.load(settings, torch.device("cpu"), ["put the block on the red plate"], lambda: None)
    model, config = policy.loaded.model, policy.spec
    assert eight_bit(model) == (set(fp8_weights(config)) if precision == "fp8" else set())
    need = record.needs.memory(settings, False, 1, 12)
    assert need.weights == sum(tensor.nbytes for tensor in model.parameters())
    assert len(list(parts_of(model))) > 0
