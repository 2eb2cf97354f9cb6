"""Sampling in bfloat16 on a CPU: packed weights, GELU inside products, attention by products."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.pi0_models import make_model, make_sampler, small_config
from torch import Tensor, nn

from dsrl_async.config.settings import PolicyConfig
from dsrl_async.pi0.config import EMBEDDED_POLICY
from dsrl_async.pi0.files import find_policy
from dsrl_async.pi0.model import MASKED, attend
from dsrl_async.pi0.packed import PackedGateUp, PackedLinear, attend_by_products, can_pack, is_packed, pack_weights
from dsrl_async.policies.pi0 import pi0_record

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU does not multiply bfloat16"
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def rms_error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


@pytest.mark.parametrize("rows", [1, 7, 50, 136])
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_sums_are_the_same_bits(rows: int, bias: bool) -> None:
    """For any number of rows: a weight is packed once for all batch sizes."""
    x, weight, residual = normal(2, rows, 96), normal(176, 96, seed=1) / 10, normal(2, rows, 176, seed=2)
    added = normal(176, seed=3) if bias else None
    layer = PackedLinear(weight, added)
    assert torch.equal(layer(x), F.linear(x, weight, added))
    if not bias:
        summed = torch.addmm(residual.flatten(0, 1), x.flatten(0, 1), weight.t()).view_as(residual)
        assert torch.equal(layer.add_to(residual, x), summed)
        return
    exact = residual.double() + F.linear(x.double(), weight.double(), added.double() if added is not None else None)
    assert rms_error(layer.add_to(residual, x), exact) < 2.5e-3, "rounded once"


def test_gelu_is_of_the_product_before_it_is_rounded() -> None:
    x, weight, bias = normal(40, 96), normal(352, 96, seed=1) / 10, normal(352, seed=2)
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    plain = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    ours = PackedLinear(weight, bias).gelu(x)
    assert rms_error(ours, exact) < 0.9 * rms_error(plain, exact)
    assert (ours == exact.bfloat16()).float().mean() > 0.98, "with tanh: without it, one in eight differs"

    gate, up = F.linear(x.double(), weight.double()).chunk(2, -1)
    exact = F.gelu(gate, approximate="tanh") * up
    gate, up = F.linear(x, weight).chunk(2, -1)
    plain = F.gelu(gate, approximate="tanh") * up
    assert rms_error(PackedGateUp(weight)(x), exact) < 0.9 * rms_error(plain, exact)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_that_of_the_model(groups: int, masked: bool) -> None:
    """Also where one row sees the first key alone, and among keys that are every second of a buffer."""
    query, cache = normal(3, 5, 4, 32), normal(3, 2, groups, 48, 32, seed=1)
    keys_values = cache[:, :, :, :40]
    mask = torch.zeros(3, 1, 1, 40)
    mask[0, ..., 1:] = MASKED
    mask[2, ..., 7:20] = MASKED
    given = mask if masked else None
    exact = attend(query.double(), keys_values.double(), None if given is None else given.double())
    got = attend_by_products(query, keys_values, None if given is None else given.bfloat16())
    assert got.shape == exact.shape
    assert rms_error(got, exact) < 8e-3
    if masked:
        assert torch.equal(got[0], keys_values[0, 1, :, 0].repeat_interleave(4 // groups, 0).flatten().expand(5, -1))


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(("pi05", "vision_float32"), [(False, False), (True, False), (False, True)])
def test_a_packed_model_is_as_close_to_float32(pi05: bool, vision_float32: bool, kv_heads: int) -> None:
    config = dataclasses.replace(small_config(pi05, kv_heads), vision_float32=vision_float32)
    model, _ = make_model(config)

    def actions(model: Any) -> Tensor:
        sampler = make_sampler(model, 3)
        sampler.run()
        return sampler.actions.double()

    exact = actions(model)
    model.set_dtype(torch.bfloat16)
    packed = copy.deepcopy(model)
    assert can_pack(packed)
    pack_weights(packed)
    assert is_packed(packed)
    assert not can_pack(packed)
    plain, ours = rms_error(actions(model), exact), rms_error(actions(packed), exact)
    assert 1e-3 < ours < 1.5 * plain


def test_the_plain_weights_are_given_up() -> None:
    model, _ = make_model(small_config())
    model.set_dtype(torch.bfloat16).requires_grad_(False)
    layers = [*model.vision.blocks, *model.vlm.blocks, *model.expert.blocks]
    weights = [
        weakref.ref(linear.weight) for layer in layers for linear in layer.children() if isinstance(linear, nn.Linear)
    ]
    assert len(weights) == 4 * (model.config.vision_depth + 2 * model.config.depth) - 3
    pack_weights(model)
    del layers
    assert [weight for weight in weights if weight() is not None] == []


@pytest.mark.parametrize(
    ("settings", "packed"),
    [
        ({"dtype": "bfloat16"}, True),
        ({"dtype": "float32"}, False),
        ({"dtype": "auto"}, False),
        ({"dtype": "bfloat16", "compile": True}, False),
        ({"dtype": "bfloat16", "prefill_precision": "fp8"}, False),
    ],
)
def test_which_policies_are_packed(settings: dict[str, Any], packed: bool) -> None:
    """Float32, the default on a CPU, keeps torch's own products, with which runs are reproduced bit for bit."""
    record = pi0_record(find_policy(EMBEDDED_POLICY))
    given = PolicyConfig.model_validate(settings)
    policy: Any = record.load(given, torch.device("cpu"), ["put the block on the red plate"], lambda: None)
    assert is_packed(policy.loaded.model) == packed
