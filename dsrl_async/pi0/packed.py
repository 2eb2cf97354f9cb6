"""Sampling in bfloat16 on a CPU: weights in the layout that oneDNN multiplies in, and fewer passes over what it writes.

torch hands oneDNN a plain matrix, which oneDNN copies into its own layout in every call: a quarter of the time of a
product with the expert's 50 rows, a twentieth with the language model's 536. Here that is done once, and the plain
matrix is given up. Products are the same bit for bit, and so are their sums with a residual. GELU and the product with
it happen before the product is rounded, which is more exact and spares three passes over gate and up.

Attention is two products and a softmax between them: torch's own kernel for CPUs reaches half of their rate at heads
of 256 channels. Its scores are rounded to bfloat16, as those of openpi's are.

Only for sampling: there are no gradients, and a checkpoint cannot be written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsrl_async.pi0.model import (
    GemmaLayer,
    Kernels,
    LayerKernels,
    Modulation,
    Pi0,
    ReplacedLinear,
    VisionTower,
    embed_actions,
    project_heads,
    project_keys_values,
    rms_norm,
    velocity,
)


class PackedLinear(ReplacedLinear):
    """A linear layer whose bfloat16 weight only oneDNN can read."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach()), bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return self._product(x, "none")

    def gelu(self, x: Tensor) -> Tensor:
        """gelu(self(x)), with tanh, rounded once."""
        return self._product(x, "gelu", "tanh")

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """factor * self(x), rounded once."""
        return self._combined(x, factor, "mul")

    def add_to(self, x: Tensor, update: Tensor) -> Tensor:
        return self._combined(update, x, "add")

    def _product(self, x: Tensor, attribute: str, algorithm: str = "") -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, attribute, [], algorithm)
        return product

    def _combined(self, x: Tensor, other: Tensor, attribute: str) -> Tensor:
        combined: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, attribute)
        return combined


class PackedGateUp(nn.Module):
    """The two halves of a layer's `gate_up` apart, so that each can be multiplied with what it is for."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        gate, up = weight.chunk(2)
        self.gate, self.up = PackedLinear(gate, None), PackedLinear(up, None)

    def forward(self, x: Tensor) -> Tensor:
        """gelu(gate) * up [..., mlp]."""
        return self.up.times(x, self.gate.gelu(x))


def can_pack(model: Pi0) -> bool:
    """Whether a model computes where packing helps: in bfloat16, on a CPU that multiplies it, with torch's operations
    for that, and with plain weights."""
    weight = model.vlm.blocks[0].qkv.weight
    where = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    plain = all(isinstance(getattr(model.vlm.blocks[0], name, None), nn.Linear | None) for name in ("out", "gate_up"))
    return where and plain and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_weights(model: Pi0) -> None:
    """Replaces the linear layers of the three stacks, one after the other, so that memory for one is needed besides."""
    for layer in (*model.vision.blocks, *model.vlm.blocks, *model.expert.blocks):
        for name, linear in list(layer.named_children()):
            if not isinstance(linear, nn.Linear) or linear.weight.dtype != torch.bfloat16:
                continue
            packed = PackedGateUp(linear.weight) if name == "gate_up" else PackedLinear(linear.weight, linear.bias)
            setattr(layer, name, packed)


def is_packed(model: Pi0) -> bool:
    return isinstance(model.vlm.blocks[0].qkv, PackedLinear)


def attend_by_products(query: Tensor, keys_values: Tensor, mask: Tensor | None) -> Tensor:
    """As `model.attend`."""
    batch, tokens, heads, width = query.shape
    groups = keys_values.shape[2]
    folded = query.unflatten(2, (groups, heads // groups)).transpose(1, 2).reshape(batch * groups, -1, width)
    key, value = (part.flatten(0, 1) for part in keys_values.unbind(1))
    added = None if mask is None else mask[:, 0].repeat_interleave(groups, dim=0)
    out = attention_products(folded, key, value, added).unflatten(0, (batch, groups))
    return out.unflatten(2, (tokens, heads // groups)).transpose(1, 2).reshape(batch, tokens, heads * width)


def attention_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(query key^T / sqrt(D) + mask) value, for [N, T, D], [N, S, D] twice, and [N, 1, S]."""
    none = 0.0 if mask is None else 1.0
    start = query.new_zeros(()) if mask is None else mask
    scores = torch.baddbmm(start, query, key.transpose(1, 2), beta=none, alpha=query.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), value)


def _gated(layer: GemmaLayer, x: Tensor, norm: Modulation, scratch: Tensor | None) -> Tensor:
    gated: Tensor = layer.gate_up(rms_norm(x, norm, scratch))
    return gated


def _vision(tower: VisionTower, x: Tensor) -> Tensor:
    """`VisionLayers`."""
    x = x.contiguous()  # channels came first out of the convolution
    layer: Any
    for layer in tower.blocks:
        if not isinstance(layer.qkv, PackedLinear):  # a tower that stays float32
            x = layer(x)
            continue
        qkv = layer.qkv(layer.attention_norm(x)).unflatten(-1, (3, layer.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)
        attention = attention_products(query, key, value, None).unflatten(0, (len(x), layer.heads))
        x = layer.out.add_to(x, attention.transpose(1, 2).flatten(2))
        x = layer.fc2.add_to(x, layer.fc1.gelu(layer.mlp_norm(x)))
    normed: Tensor = tower.norm(x)
    return normed


_LAYER = LayerKernels(project_heads, project_keys_values, _gated, attend_by_products)
PACKED = Kernels(_vision, _LAYER, _LAYER, embed_actions, velocity)
"""The table for a model of `pack_weights`."""
