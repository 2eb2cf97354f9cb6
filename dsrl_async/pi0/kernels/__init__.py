"""The sampler's kernels in Triton, for a GPU: `policy.kernels: triton`. **None of them has run on one yet.**

`triton_kernels` is the table of functions that takes the place of `model.TORCH`. What it replaces, and by what:

- `norm.py`: RMSNorm in one kernel, and the vision tower's LayerNorm, which adds the biases of earlier products;
- `rope.py`: rotation of queries and keys, and writing of keys and values to the cache, in one;
- `gelu.py`: gelu(gate) * up in one;
- `product.py`: the expert's products behind a norm, with the norm on the way in, and rotation or GeGLU on the way out;
- `quantise.py`: rounding to 8 bits, with `policy.prefill_precision: fp8`, in one;
- `attention.py`: attention under a mask, for which torch has no kernel as fast as without;
- `euler.py`: the two ends of an Euler step.

The language model's products, of thousands of rows, are left to cuBLAS, and so is every product that ends in a
residual, which it adds itself. The expert has 50 rows per observation, ten times over; there a launch costs as much as
a product, so that its norms, rotations and GeGLU go into the products, which makes five kernels of a layer: two
products of our own, two of cuBLAS, and attention.

All kernels compute in float32 and round once. The tiles are fixed: nothing is tuned while a graph is captured, and two
runs compute the same. Each is an operation of torch's, `torch.ops.dsrl_async.*`, with its shapes known on the meta
device.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsrl_async.pi0.fp8 import Fp8Linear
from dsrl_async.pi0.kernels.attention import attend
from dsrl_async.pi0.kernels.euler import normed_linear, silu_linear
from dsrl_async.pi0.kernels.gelu import geglu, normed_geglu
from dsrl_async.pi0.kernels.norm import layer_norm, rms_norm
from dsrl_async.pi0.kernels.quantise import quantise
from dsrl_async.pi0.kernels.rope import normed_rotate, rotate
from dsrl_async.pi0.model import GemmaLayer, Kernels, LayerKernels, Modulation, Pi0, Rope, Step, VisionTower


def triton_kernels(model: Pi0) -> Kernels:
    """The table for sampling with this model; the caches of `extend` are `sampler.Slots`."""
    for layer in model.modules():
        if isinstance(layer, Fp8Linear):
            layer.quantise = quantise
    vlm = LayerKernels(_heads, _keys_values, _gated, _attend)
    expert = LayerKernels(_normed_heads, _normed_keys_values, _normed_gated, _attend)
    return Kernels(partial(_vision, vision_offsets(model.vision)), vlm, expert, _embed_actions, _velocity)


def prepare(model: Pi0, table: Step) -> Step:
    """`table` of `Pi0.step_tables` with the offset of every norm."""
    weights: list[tuple[Tensor, Tensor | None]] = []
    for block in model.expert.blocks:
        weights += [(block.qkv.weight, None), (block.gate_up.weight, None)]
    weights.append((model.action_out.weight, model.action_out.bias))
    norms = [_with_offset(norm, *weight) for norm, weight in zip(table.norms, weights, strict=True)]
    return table._replace(norms=tuple(norms))


def _with_offset(norm: Modulation, weight: Tensor, bias: Tensor | None) -> Modulation:
    offset = bias if norm.shift is None else F.linear(norm.shift, weight.to(norm.shift.dtype), bias)
    return norm._replace(offset=offset)


def _normed(x: Tensor, norm: Modulation, scratch: Tensor | None) -> Tensor:
    assert scratch is not None
    rms_norm(x, norm.scale, norm.floor, norm.shift, scratch)
    return scratch


def _angles(rope: Rope) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, D/2]."""
    return rope.cos[:, :, 0, 0], rope.sin[:, :, 0, 1]


def _heads(
    layer: GemmaLayer, x: Tensor, norm: Modulation, rope: Rope, slots: Any, scratch: Tensor | None
) -> tuple[Tensor, Tensor]:
    qkv = layer.qkv(_normed(x, norm, scratch)).unflatten(-1, (-1, layer.head_dim))
    return rotate(qkv, *_angles(rope), slots.new), slots.visible


def _keys_values(
    layer: GemmaLayer, x: Tensor, norm: Modulation, rope: Rope, slots: Any, scratch: Tensor | None
) -> None:
    rotate(layer.project_keys_values(_normed(x, norm, scratch)), *_angles(rope), slots.new)


def _gated(layer: GemmaLayer, x: Tensor, norm: Modulation, scratch: Tensor | None) -> Tensor:
    return geglu(layer.gate_up(_normed(x, norm, scratch)))


def _normed_heads(
    layer: GemmaLayer, x: Tensor, norm: Modulation, rope: Rope, slots: Any, scratch: Tensor | None
) -> tuple[Tensor, Tensor]:
    query = normed_rotate(x, norm.scale, norm.floor, norm.offset, layer.qkv.weight, *_angles(rope), slots.new)
    return query, slots.visible


def _normed_keys_values(
    layer: GemmaLayer, x: Tensor, norm: Modulation, rope: Rope, slots: Any, scratch: Tensor | None
) -> None:
    assert norm.offset is None  # pi0.5 has no state token
    weight = layer.qkv.weight[-2 * layer.kv_heads * layer.head_dim :]
    normed_rotate(x, norm.scale, norm.floor, None, weight, *_angles(rope), slots.new)


def _normed_gated(layer: GemmaLayer, x: Tensor, norm: Modulation, scratch: Tensor | None) -> Tensor:
    return normed_geglu(x, norm.scale, norm.floor, norm.offset, layer.gate_up.weight)


def _attend(query: Tensor, keys_values: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None  # of every pass over a prompt
    return attend(query, keys_values, mask)


def vision_offsets(tower: VisionTower) -> Tensor:
    """float32 [2 * depth + 1, width]: what the biases of the products before a norm add to its residual.

    Products in 8 bits (`dsrl_async.pi0.fp8`) add theirs themselves.
    """
    products = [product for layer in tower.blocks for product in (layer.out, layer.fc2)]
    none = torch.zeros_like(products[0].bias)
    biases = [product.bias if isinstance(product, nn.Linear) else none for product in products]
    return torch.stack([none, *biases]).float().cumsum(0)


def _vision(offsets: Tensor, tower: VisionTower, x: Tensor) -> Tensor:
    """`VisionLayers`; x is changed.

    A product is added to the residual without its bias: the norms add those of all products before them.
    """
    x = x.contiguous()  # channels came first out of the convolution
    rows = x.flatten(0, 1)

    def norm(number: int, layer_norm_: nn.LayerNorm) -> Tensor:
        return layer_norm(x, offsets[number], layer_norm_.weight, layer_norm_.bias, layer_norm_.eps)

    for number, layer in enumerate(tower.blocks):
        attention = layer.attend(norm(2 * number, layer.attention_norm)).flatten(0, 1)
        _add_product(rows, attention, layer.out)
        hidden = _linear_gelu(norm(2 * number + 1, layer.mlp_norm).flatten(0, 1), layer.fc1)
        _add_product(rows, hidden, layer.fc2)
    return norm(len(offsets) - 1, tower.norm)


def _add_product(rows: Tensor, update: Tensor, product: nn.Module) -> None:
    """Adds a product to `rows`, without its bias if `vision_offsets` has it."""
    if isinstance(product, nn.Linear):
        rows.addmm_(update, product.weight.t())
    else:
        rows.add_(product(update))


def _linear_gelu(x: Tensor, linear: nn.Module) -> Tensor:
    """gelu(linear(x)), approximated by tanh, for x [M, K].

    On a GPU the product ends in both. (torch says of this operation, where it takes it apart for its compiler in
    torch/_decomp/decompositions.py, that a GPU has this GELU and a CPU the other one.)
    """
    if x.device.type == "cpu" or not isinstance(linear, nn.Linear):
        return F.gelu(linear(x), approximate="tanh")
    return torch._addmm_activation(linear.bias, x, linear.weight.t(), use_gelu=True)


def _embed_actions(model: Pi0, x_t: Tensor, step: Step) -> Tensor:
    if model.config.pi05:
        return F.linear(x_t, step.input_weight, step.input_bias).to(model.dtype)
    x: Tensor = model.time_out(silu_linear(x_t, step.input_weight, step.input_bias))
    return x.to(model.dtype)


def _velocity(model: Pi0, x: Tensor, norm: Modulation) -> Tensor:
    assert norm.offset is not None
    return normed_linear(x, norm.scale, norm.floor, norm.offset, model.action_out.weight)
