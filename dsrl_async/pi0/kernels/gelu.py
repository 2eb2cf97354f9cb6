"""GeGLU: gelu(gate) * up, behind the product that makes both, or within it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsrl_async.pi0.kernels.launch import contiguous, on_device_of
from dsrl_async.pi0.kernels.product import normed_products, product_cost, tile
from dsrl_async.pi0.launch_costs import LaunchCost, launch_cost

BLOCK = 1024
"""Columns per program of `geglu`."""


@triton.jit
def gelu(x):
    """GELU's approximation by tanh: x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), where
    (1 + tanh(u)) / 2 = sigmoid(2 u). (Hendrycks and Gimpel 2016, arXiv 1606.08415.)"""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def geglu_kernel(gate_up, y, width, BLOCK: tl.constexpr):
    """A program per row and BLOCK columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, (gelu(gate) * up).to(y.dtype.element_ty), mask=inside)


@torch.library.custom_op("dsrl_async::geglu", mutates_args=())
def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up of gate_up [..., 2 * width], contiguous, gates first -> [..., width], computed in float32.

    (Shazeer 2020, arXiv 2002.05202.)
    """
    contiguous(gate_up=gate_up)
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    with on_device_of(out):
        geglu_kernel[(out.numel() // width, triton.cdiv(width, BLOCK))](gate_up, out, width, BLOCK=BLOCK, num_warps=4)
    return out


@geglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@triton.jit
def normed_geglu_kernel(
    x, scale, floor, offset, weight, y, count, width, mlp,
    HAS_OFFSET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A program per ROWS rows and COLUMNS columns of y."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, inside = row < count, column < mlp
    rows = row.to(tl.int64)
    gate, up = normed_products(
        x, scale, floor, offset, weight, rows, row_inside, column, mlp + column, inside, width,
        HAS_OFFSET, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    value = (gelu(gate) * up).to(y.dtype.element_ty)
    tl.store(y + rows[:, None] * mlp + column[None, :], value, mask=row_inside[:, None] & inside[None, :])


@torch.library.custom_op("dsrl_async::normed_geglu", mutates_args=())
def normed_geglu(x: Tensor, scale: Tensor, floor: Tensor, offset: Tensor | None, weight: Tensor) -> Tensor:
    """GeGLU of the RMSNorm of x [..., width] times weight [2 * mlp, width] (gates first) -> [..., mlp], in x's type.

    `scale` and `floor` are those of `model.Modulation`; `offset` float32 [2 * mlp] is the product of its shift with
    the weight. x and weight are contiguous.
    """
    contiguous(x=x, weight=weight)
    width, mlp = x.shape[-1], weight.shape[0] // 2
    count = x.numel() // width
    out = x.new_empty(*x.shape[:-1], mlp)
    shape = tile(count, mlp)
    with on_device_of(x):
        normed_geglu_kernel[(triton.cdiv(count, shape.rows), triton.cdiv(mlp, shape.columns))](
            x, scale, floor, offset, weight, out, count, width, mlp,
            HAS_OFFSET=offset is not None, ROWS=shape.rows, COLUMNS=shape.columns, DEPTH=shape.depth,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return out


@normed_geglu.register_fake
def _(x: Tensor, scale: Tensor, floor: Tensor, offset: Tensor | None, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


@launch_cost("normed_geglu")
def _(x: Tensor, scale: Tensor, floor: Tensor, offset: Tensor | None, weight: Tensor) -> LaunchCost:
    return product_cost(x, scale, offset, weight, weight.shape[0] // 2)
