"""The two ends of an Euler step: from actions to the expert's input, and from its output to the velocity."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsrl_async.pi0.kernels.launch import SHORTEST_BLOCK, contiguous, on_device_of, power_of_two
from dsrl_async.pi0.launch_costs import LaunchCost, Matrices, launch_cost

ROWS, COLUMNS, DEPTH = 16, 64, 64


@triton.jit
def silu_linear_kernel(
    x, weight, bias, y, count, inner, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A program per ROWS rows and COLUMNS columns; INNER is at least `inner`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    channel = tl.arange(0, INNER)
    row_inside, inside, channel_inside = row < count, column < width, channel < inner
    value = tl.load(
        x + row[:, None] * inner + channel[None, :], mask=row_inside[:, None] & channel_inside[None, :], other=0.0
    )
    factor = tl.load(
        weight + column[None, :] * inner + channel[:, None],
        mask=inside[None, :] & channel_inside[:, None],
        other=0.0,
    )
    value = tl.dot(value, factor, input_precision="ieee") + tl.load(bias + column, mask=inside, other=0.0)[None, :]
    value = value * tl.sigmoid(value)
    tl.store(y + row[:, None] * width + column[None, :], value, mask=row_inside[:, None] & inside[None, :])


@torch.library.custom_op("dsrl_async::silu_linear", mutates_args=())
def silu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(x weight^T + bias) for x [..., inner], weight [width, inner] and bias [width], all float32, contiguous.

    `inner` is as small as an action is wide: a program takes all of it at once.
    """
    contiguous(x=x, weight=weight, bias=bias)
    width, inner = weight.shape
    count = x.numel() // inner
    out = x.new_empty(*x.shape[:-1], width)
    with on_device_of(x):
        silu_linear_kernel[(triton.cdiv(count, ROWS), triton.cdiv(width, COLUMNS))](
            x, weight, bias, out, count, inner, width,
            ROWS=ROWS, COLUMNS=COLUMNS, INNER=max(SHORTEST_BLOCK, power_of_two(inner)), num_warps=4,
        )  # fmt: skip
    return out


@silu_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@launch_cost("silu_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor) -> LaunchCost:
    (width, inner), rows = weight.shape, x.numel() // x.shape[-1]
    read = x.nbytes + weight.nbytes + bias.nbytes
    return LaunchCost(read, 4 * rows * width, "product", Matrices(1, rows, width, inner), (ROWS, COLUMNS))


@triton.jit
def normed_linear_kernel(
    x, scale, floor, offset, weight, y, count, width, outputs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A program per ROWS rows and COLUMNS columns, as `product.normed_products` with one tile, in float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, inside = row < count, column < outputs
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, DEPTH):
        channel = start + tl.arange(0, DEPTH)
        channel_inside = channel < width
        value = tl.load(
            x + row[:, None] * width + channel[None, :], mask=row_inside[:, None] & channel_inside[None, :], other=0.0
        ).to(tl.float32)
        squares += tl.sum(value * value, axis=1)
        value *= tl.load(scale + channel, mask=channel_inside, other=0.0)[None, :]
        factor = tl.load(
            weight + column[None, :] * width + channel[:, None],
            mask=inside[None, :] & channel_inside[:, None],
            other=0.0,
        )
        total = tl.dot(value, factor, total, input_precision="ieee")
    least = tl.load(floor)
    total = total / tl.sqrt(squares + least * least)[:, None]
    total += tl.load(offset + column, mask=inside, other=0.0)[None, :]
    tl.store(y + row[:, None] * outputs + column[None, :], total, mask=row_inside[:, None] & inside[None, :])


@torch.library.custom_op("dsrl_async::normed_linear", mutates_args=())
def normed_linear(x: Tensor, scale: Tensor, floor: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """float32 [..., outputs]: the RMSNorm of x [..., width] times weight float32 [outputs, width], plus `offset`.

    `scale` and `floor` are those of `model.Modulation`; `offset` float32 [outputs] is the bias, and the product of the
    norm's shift with the weight. x is of any floating type; x and weight are contiguous.
    """
    contiguous(x=x, weight=weight, offset=offset)
    outputs, width = weight.shape
    count = x.numel() // width
    out = x.new_empty(*x.shape[:-1], outputs, dtype=torch.float32)
    with on_device_of(x):
        normed_linear_kernel[(triton.cdiv(count, ROWS), triton.cdiv(outputs, SHORTEST_BLOCK))](
            x, scale, floor, offset, weight, out, count, width, outputs,
            ROWS=ROWS, COLUMNS=SHORTEST_BLOCK, DEPTH=DEPTH, num_warps=2,
        )  # fmt: skip
    return out


@normed_linear.register_fake
def _(x: Tensor, scale: Tensor, floor: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32)


@launch_cost("normed_linear")
def _(x: Tensor, scale: Tensor, floor: Tensor, offset: Tensor, weight: Tensor) -> LaunchCost:
    (outputs, width), rows = weight.shape, x.numel() // x.shape[-1]
    read = x.nbytes + scale.nbytes + offset.nbytes + weight.nbytes
    return LaunchCost(read, 4 * rows * outputs, "product", Matrices(1, rows, outputs, width), (ROWS, SHORTEST_BLOCK))
