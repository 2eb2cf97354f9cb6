"""Parity of the Triton kernels, on the CPU, in Triton's interpreter: `test_kernels.py` runs this file in a process that
has TRITON_INTERPRET=1. By hand, for longer:

    TRITON_INTERPRET=1 DSRL_KERNEL_EXAMPLES=200 python -m pytest tests/pi0/kernels/interpreted.py
"""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from typing import Any

import pytest
import support.triton_interpreter
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.pi0_models import fill, make_model, small_config
from torch import Tensor, nn

from dsrl_async.pi0 import kernels
from dsrl_async.pi0.fp8 import Fp8Linear, quantise, use_fp8
from dsrl_async.pi0.kernels.product import TILES, Tile
from dsrl_async.pi0.memory import fp8_weights
from dsrl_async.pi0.model import MASKED, Modulation, Pi0, Rope, attend, rms_norm, rotate_
from dsrl_async.pi0.sampler import Sampler

assert support.triton_interpreter
FUZZED = settings(max_examples=int(os.environ.get("DSRL_KERNEL_EXAMPLES", 4)), deadline=None, derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SEEDS = st.integers(0, 2**31)
SENTINEL = 77.0


class Draw:
    """Random tensors."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype or self.dtype)

    def weight(self, rows: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(rows, width, generator=self.generator) / width**0.5).to(dtype or self.dtype)

    def norm(self, width: int, shifted: bool) -> Modulation:
        single = torch.float32
        shift = self(width, dtype=single) if shifted else None
        return Modulation(1 + self(width, dtype=single), torch.tensor(0.4), shift)


def assert_rounded(actual: Tensor, exact: Tensor) -> None:
    """Whether `actual` is float32's `exact` up to its summation's order, rounded once to the type of `actual`."""
    assert actual.shape == exact.shape
    unit = 2.0**-8 if actual.dtype == torch.bfloat16 else 0.0  # half a unit in the last place
    assert exact.dtype == torch.float32
    assert ((actual.float() - exact).abs() <= 1.01 * unit * exact.abs() + 2e-5).all()


def assert_no_further(actual: Tensor, usual: Tensor, exact: Tensor, factor: float = 1.1) -> None:
    """Whether `actual` is no further from `exact` than `factor` times as far as `usual`, in the mean square, and never
    further than 4 times its furthest."""

    def distances(values: Tensor) -> Tensor:
        return (values.float() - exact).abs()

    assert actual.dtype == usual.dtype
    assert exact.dtype == torch.float32
    least = 1e-5 if actual.dtype == torch.float32 else 1e-9  # in float32, both are within the order of a sum
    assert distances(actual).square().mean().sqrt() <= factor * distances(usual).square().mean().sqrt() + least
    assert distances(actual).max() <= 4 * distances(usual).max() + least


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """In float32."""
    return F.linear(x.float(), weight.float())


@FUZZED
@given(SEEDS, DTYPES, st.integers(1, 3), st.integers(1, 150), st.booleans())
@example(seed=0, dtype=torch.bfloat16, rows=3, width=150, shifted=True)
def test_rms_norm(seed: int, dtype: torch.dtype, rows: int, width: int, shifted: bool) -> None:
    draw = Draw(seed, dtype)
    x, norm, out = draw(2, rows, width), draw.norm(width, shifted), torch.empty(2, rows, width, dtype=dtype)
    kernels.rms_norm(x, norm.scale, norm.floor, norm.shift, out)
    assert_rounded(out, rms_norm(x.float(), norm))


def test_rms_norm_of_zeros_is_finite() -> None:
    x, norm = torch.zeros(1, 2, 6), Draw(0, torch.float32).norm(6, False)
    out = torch.empty_like(x)
    kernels.rms_norm(x, norm.scale, norm.floor, None, out)
    assert (out == 0).all()


@pytest.mark.parametrize("size", [1.0, 1e-3])
@FUZZED
@given(SEEDS, DTYPES, st.integers(1, 4), st.integers(2, 150))
@example(seed=0, dtype=torch.bfloat16, rows=4, width=150)
def test_layer_norm(size: float, seed: int, dtype: torch.dtype, rows: int, width: int) -> None:
    """The smaller rows have a variance of about epsilon."""
    draw = Draw(seed, dtype)
    x, weight, bias, offset = draw(rows, width) + 3, draw(width), draw(width), draw(width, dtype=torch.float32)
    x, offset = x * size, offset * size
    out = kernels.layer_norm(x, offset, weight, bias, 1e-6)
    assert_rounded(out, F.layer_norm(x.float() + offset, (width,), weight.float(), bias.float(), 1e-6))


@torch.no_grad()
def test_the_vision_tower() -> None:
    """Of three layers, whose biases all count in the last norm; epsilon is no small number here."""
    config = dataclasses.replace(small_config(), image_size=24, patch_size=12, vision_depth=3)
    model, images = make_model(config)[0], Draw(0, torch.float32)(2, 3, 24, 24)
    for module in model.vision.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.2
    exact = model.vision(images)

    def actual() -> Tensor:
        return model.vision(images, partial(kernels._vision, kernels.vision_offsets(model.vision)))

    assert (actual() - exact).abs().max() <= 1e-5 * exact.abs().max()
    weights = {name: model.get_parameter(name) for name in fp8_weights(config)}
    model.set_dtype(torch.bfloat16)
    assert_no_further(actual(), model.vision(images), exact)
    added = torch.stack([bias for layer in model.vision.blocks for bias in (layer.out.bias, layer.fc2.bias)])
    assert torch.allclose(kernels.vision_offsets(model.vision)[-1], added.float().sum(0), rtol=0, atol=1e-6)
    use_fp8(model.float(), weights)
    for name, weight in weights.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, Fp8Linear)
        layer.fill(weight)
    assert_no_further(actual(), model.vision(images), exact)


class Rotation:
    """Tokens of `heads` queries and `groups` keys and values that go to slots from `start` on."""

    def __init__(self, draw: Draw, batch: int, tokens: int, heads: int, groups: int, half: int, start: int) -> None:
        self.heads, self.groups, self.width, self.shape = heads, groups, 2 * half, (batch, tokens)
        angle = draw(9, half, dtype=torch.float32)
        table = torch.cat([angle.cos(), -angle.sin(), angle.sin()], dim=-1).to(draw.dtype)
        self.rope = Rope.at(torch.randint(0, 9, (batch, tokens), generator=draw.generator), table)
        self.cos, self.sin = kernels._angles(self.rope)
        self.room = torch.full((batch, 2, groups, start + tokens + 2, 2 * half + 1), SENTINEL, dtype=draw.dtype)
        self.cache, self.start = self.room[..., :-1], start

    @property
    def rows(self) -> int:
        return (self.heads + 2 * self.groups) * self.width

    @property
    def slots(self) -> Tensor:
        return self.cache[:, :, :, self.start : self.start + self.shape[1]]

    def rotated(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """What qkv [B, T, rows] makes, in its type: queries, and what goes to the slots."""
        heads = qkv.unflatten(-1, (-1, self.width)).clone()
        rotate_(heads[:, :, : self.heads + self.groups], Rope(self.rope.cos.to(qkv.dtype), self.rope.sin.to(qkv.dtype)))
        return heads[:, :, : self.heads], heads[:, :, self.heads :].unflatten(2, (2, -1)).permute(0, 2, 3, 1, 4)

    def assert_nothing_else_written(self) -> None:
        outside = torch.ones_like(self.room)
        outside[:, :, :, self.start : self.start + self.shape[1], :-1] = 0
        assert (self.room[outside.bool()] == SENTINEL).all()


ROTATION = (st.integers(1, 2), st.integers(1, 4), st.integers(0, 3), st.integers(1, 2), st.integers(1, 20))
"""Batch, tokens, heads, groups, half a head's width."""


@FUZZED
@given(SEEDS, DTYPES, *ROTATION, st.integers(0, 3))
@example(seed=0, dtype=torch.bfloat16, batch=2, tokens=4, heads=3, groups=2, half=20, start=3)
def test_rotate(
    seed: int, dtype: torch.dtype, batch: int, tokens: int, heads: int, groups: int, half: int, start: int
) -> None:
    draw = Draw(seed, dtype)
    rotation = Rotation(draw, batch, tokens, heads, groups, half, start)
    qkv = draw(batch, tokens, rotation.rows)
    query = kernels.rotate(qkv.unflatten(-1, (-1, 2 * half)), rotation.cos, rotation.sin, rotation.slots)
    for actual, exact in zip((query, rotation.slots), rotation.rotated(qkv.float()), strict=True):
        assert_rounded(actual, exact)
    rotation.assert_nothing_else_written()


def with_offset(norm: Modulation, weight: Tensor) -> Tensor | None:
    return kernels._with_offset(norm, weight, None).offset


@FUZZED
@given(SEEDS, DTYPES, *ROTATION, st.integers(0, 3), st.integers(1, 150), st.booleans())
@example(seed=0, dtype=torch.bfloat16, batch=2, tokens=20, heads=3, groups=2, half=20, start=3, width=150, shifted=True)
def test_normed_rotate(
    seed: int, dtype: torch.dtype, batch: int, tokens: int, heads: int, groups: int, half: int, start: int,
    width: int, shifted: bool,
) -> None:  # fmt: skip
    draw = Draw(seed, dtype)
    rotation = Rotation(draw, batch, tokens, heads, groups, half, start)
    x, norm, weight = draw(batch, tokens, width), draw.norm(width, shifted), draw.weight(rotation.rows, width)
    query = kernels.normed_rotate(
        x, norm.scale, norm.floor, with_offset(norm, weight), weight, rotation.cos, rotation.sin, rotation.slots
    )
    usual = rotation.rotated(F.linear(rms_norm(x, norm), weight))
    exact = rotation.rotated(linear(rms_norm(x.float(), norm), weight))
    for found in zip((query, rotation.slots), usual, exact, strict=True):
        if found[0].numel():
            assert_no_further(*found, 1.1 if found[0].numel() > 500 else 4.0)
    rotation.assert_nothing_else_written()


@FUZZED
@given(SEEDS, DTYPES, *ROTATION, st.integers(1, 80), st.integers(0, 3))
@example(seed=0, dtype=torch.bfloat16, batch=2, tokens=4, heads=3, groups=2, half=20, keys=80, spare=3)
def test_attend(
    seed: int, dtype: torch.dtype, batch: int, tokens: int, heads: int, groups: int, half: int, keys: int, spare: int
) -> None:
    """Some keys are hidden, in the last row all of them; behind the keys there are more, which nobody may see, and
    behind the channels of each."""
    draw = Draw(seed, dtype)
    query = draw(batch, tokens, (1 + heads) * groups, 2 * half)
    room, mask = draw(batch, 2, groups, keys + spare, 2 * half + spare), draw(batch, 1, 1, keys + spare)
    room[:, :, :, keys:] = 1e4
    hidden = torch.rand(mask.shape, generator=draw.generator) < 0.5
    hidden[-1] = True
    mask[hidden] = MASKED
    given_ = query, room[:, :, :, :keys, : 2 * half], mask[..., :keys]
    exact = attend(*(tensor.float() for tensor in given_))
    actual, usual = kernels.attend(*given_), attend(*given_)
    assert_no_further(actual, usual, exact, 1.1 if actual.numel() > 500 else 4.0)


def test_more_queries_than_a_program_has() -> None:
    draw = Draw(0, torch.float32)
    query, cache, mask = draw(2, 30, 8, 20), draw(2, 2, 1, 70, 20), torch.zeros(2, 1, 1, 70)
    for rows in (16, 64):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dsrl_async.pi0.kernels.attention.query_rows", lambda *_, rows=rows: rows)
            assert (kernels.attend(query, cache, mask) - attend(query, cache, mask)).abs().max() < 1e-5


def test_whole_blocks_of_hidden_keys() -> None:
    """In front of, between and behind those that are seen, as where prompts are padded."""
    draw = Draw(0, torch.float32)
    query, cache, mask = draw(3, 2, 4, 20), draw(3, 2, 1, 130, 20), torch.zeros(3, 1, 1, 130)
    for row, hidden in enumerate((slice(0, 70), slice(30, 100), slice(60, 130))):
        mask[row, ..., hidden] = MASKED
    assert (kernels.attend(query, cache, mask) - attend(query, cache, mask)).abs().max() < 1e-5


@FUZZED
@given(SEEDS, DTYPES, st.integers(2, 5), st.integers(1, 300))
def test_quantise(seed: int, dtype: torch.dtype, rows: int, width: int) -> None:
    draw = Draw(seed, dtype)
    x = draw(rows, width) * 10 ** draw(rows, 1)
    x[0] = 0
    for actual, expected in zip(kernels.quantise(x), quantise(x), strict=True):
        assert torch.equal(actual.float(), expected.float())


@FUZZED
@given(SEEDS, DTYPES, st.integers(1, 3), st.sampled_from([1, 7, 150, 1030]))
def test_geglu(seed: int, dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up = Draw(seed, dtype)(rows, 2 * width)
    gate, up = gate_up.float().chunk(2, dim=-1)
    assert_rounded(kernels.geglu(gate_up), F.gelu(gate, approximate="tanh") * up)


@FUZZED
@given(SEEDS, DTYPES, st.integers(1, 40), st.integers(1, 90), st.integers(1, 150), st.booleans())
@example(seed=0, dtype=torch.bfloat16, rows=40, mlp=90, width=150, shifted=True)
def test_normed_geglu(seed: int, dtype: torch.dtype, rows: int, mlp: int, width: int, shifted: bool) -> None:
    draw = Draw(seed, dtype)
    check_normed_geglu(draw(1, rows, width), draw.norm(width, shifted), draw.weight(2 * mlp, width), 1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", TILES)
def test_every_tile(shape: Tile, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough numbers that the errors of both ways differ by little."""
    draw, rows = Draw(0, dtype), shape.rows + 3
    monkeypatch.setattr("dsrl_async.pi0.kernels.gelu.tile", lambda *_: shape)
    check_normed_geglu(draw(1, rows, 150), draw.norm(150, True), draw.weight(2 * 70, 150), 1.1)


def check_normed_geglu(x: Tensor, norm: Modulation, weight: Tensor, factor: float) -> None:
    actual = kernels.normed_geglu(x, norm.scale, norm.floor, with_offset(norm, weight), weight)
    gate, up = linear(rms_norm(x.float(), norm), weight).chunk(2, dim=-1)
    exact = F.gelu(gate, approximate="tanh") * up
    gate, up = F.linear(rms_norm(x, norm), weight).chunk(2, dim=-1)
    assert_no_further(actual, F.gelu(gate, approximate="tanh") * up, exact, factor if actual.numel() > 500 else 4.0)


@FUZZED
@given(SEEDS, st.integers(1, 40), st.integers(1, 40), st.integers(1, 130))
@example(seed=0, rows=40, inner=40, width=130)
def test_silu_linear(seed: int, rows: int, inner: int, width: int) -> None:
    draw = Draw(seed, torch.float32)
    x, weight, bias = draw(rows, inner), draw.weight(width, inner), draw(width)
    assert_rounded(kernels.silu_linear(x, weight, bias), F.silu(F.linear(x, weight, bias)))


@FUZZED
@given(SEEDS, DTYPES, st.integers(1, 40), st.integers(1, 40), st.integers(1, 150), st.booleans())
@example(seed=0, dtype=torch.bfloat16, rows=40, outputs=40, width=150, shifted=True)
def test_normed_linear(seed: int, dtype: torch.dtype, rows: int, outputs: int, width: int, shifted: bool) -> None:
    draw = Draw(seed, dtype)
    x, norm, weight, bias = draw(rows, width), draw.norm(width, shifted), draw.weight(outputs, width), draw(outputs)
    weight, bias = weight.float(), bias.float()
    offset = kernels._with_offset(norm, weight, bias).offset
    assert offset is not None
    assert_rounded(
        kernels.normed_linear(x, norm.scale, norm.floor, offset, weight),
        F.linear(rms_norm(x.float(), norm, dtype=torch.float32), weight, bias),
    )


def test_no_result_in_between_is_rounded() -> None:
    """But what goes into a product: in bfloat16 the error is hardly more than that of rounding the exact result."""
    draw = Draw(0, torch.bfloat16)
    attended = draw(2, 24, 4, 40), draw(2, 2, 2, 200, 40), draw(2, 1, 1, 200)
    x, norm, weight = draw(1, 80, 150), draw.norm(150, True), draw.weight(2 * 70, 150)
    rotation = Rotation(draw, 1, 80, 3, 2, 20, 3)
    rotated = draw.weight(rotation.rows, 150)
    scaled, angles = (norm.scale, norm.floor), (rotation.cos, rotation.sin, rotation.slots)
    query = kernels.normed_rotate(x, *scaled, with_offset(norm, rotated), rotated, *angles)
    normed = rms_norm(x.float(), norm)
    gate, up = linear(normed, weight).chunk(2, dim=-1)
    exact_query, exact_slots = rotation.rotated(linear(normed, rotated))
    geglu = kernels.normed_geglu(x, *scaled, with_offset(norm, weight), weight)
    for actual, exact, factor in (
        (kernels.attend(*attended), attend(*(tensor.float() for tensor in attended)), 1.3),
        (geglu, F.gelu(gate, approximate="tanh") * up, 1.1),
        (query, exact_query, 1.1),
        (rotation.slots, exact_slots, 1.1),
    ):
        assert_no_further(actual, exact.to(torch.bfloat16), exact, factor)


def operations() -> dict[str, tuple[Any, ...]]:
    draw = Draw(0, torch.bfloat16)
    norm = draw.norm(12, True)
    rotation = Rotation(draw, 2, 3, 2, 1, 4, 1)
    x, weight, angles = draw(2, 3, 12), draw.weight(rotation.rows, 12), (rotation.cos, rotation.sin, rotation.slots)
    single = Draw(1, torch.float32)
    scaled = (norm.scale, norm.floor)
    return {
        "rms_norm": (x, *scaled, norm.shift, torch.empty_like(x)),
        "layer_norm": (x, draw(12, dtype=torch.float32), draw(12), draw(12), 1e-6),
        "rotate": (draw(2, 3, 4, 8), *angles),
        "quantise": (draw(3, 12),),
        "attend": (draw(2, 3, 2, 8), rotation.cache, torch.zeros(2, 1, 1, rotation.cache.shape[3])),
        "normed_rotate": (x, *scaled, None, weight, *angles),
        "geglu": (draw(2, 3, 10),),
        "normed_geglu": (x, *scaled, None, draw.weight(10, 12)),
        "silu_linear": (single(2, 3, 5), single(7, 5), single(7)),
        "normed_linear": (x, *scaled, single(5), single(5, 12)),
    }


@pytest.mark.parametrize("name", list(operations()))
def test_what_torch_is_told_of_an_operation_is_so(name: str) -> None:
    """Shapes and types without computing, what it changes, and that nothing it returns shares memory."""
    operation = getattr(torch.ops.dsrl_async, name).default
    changed = {one.name for one in operation._schema.arguments if one.alias_info and one.alias_info.is_write}
    assert changed == {"rms_norm": {"out"}, "rotate": {"cache"}, "normed_rotate": {"cache"}}.get(name, set())
    torch.library.opcheck(operation, operations()[name], test_utils=("test_schema", "test_faketensor"))


def small_sampler(model: Pi0, which: Any, seed: int = 0) -> Tensor:
    sampler = Sampler(model, 2, 6, 2, kernels=which)
    fill(sampler, seed)
    sampler.run()
    return sampler.actions


def small_model(pi05: bool) -> Pi0:
    config = small_config(pi05, kv_heads=2 if pi05 else 1)
    config = dataclasses.replace(config, image_size=24, patch_size=12, action_horizon=5, vlm_mlp=72, expert_mlp=40)
    return make_model(dataclasses.replace(config, depth=2, vision_depth=1))[0]


@pytest.mark.parametrize("pi05", [False, True])
def test_a_sample_in_float32(pi05: bool) -> None:
    model = small_model(pi05)
    assert (small_sampler(model, "torch") - small_sampler(model, "triton")).abs().max() <= 1e-5


@pytest.mark.parametrize("pi05", [False, True])
def test_a_sample_in_bfloat16(pi05: bool) -> None:
    model = small_model(pi05).set_dtype(torch.bfloat16)
    usual, actual = small_sampler(model, "torch"), small_sampler(model, "triton")
    exact = small_sampler(model.float(), "torch")
    of_torch, of_triton = ((actions - exact).square().mean().sqrt() for actions in (usual, actual))
    print(f"pi0.5={pi05}: torch's kernels are {of_torch:.1e} off, Triton's {of_triton / of_torch:.2f} times as far")
    assert_no_further(actual, usual, exact, 1.25)  # of 320 numbers, whose errors depend on one another
