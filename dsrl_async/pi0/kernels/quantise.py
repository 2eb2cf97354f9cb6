"""Rounding of rows to 8 bits, each by its own scale (`dsrl_async.pi0.fp8`), in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsrl_async.pi0.fp8 import FLOAT8, LARGEST, SMALLEST
from dsrl_async.pi0.kernels.launch import contiguous, on_device_of, power_of_two
from dsrl_async.pi0.kernels.norm import warps


@triton.jit
def quantise_kernel(x, y, scale, width, smallest, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """A program per row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    unit = tl.maximum(tl.max(tl.abs(value), axis=0), smallest) / LARGEST
    tl.store(scale + row, unit)
    tl.store(y + row * width + column, (value / unit).to(y.dtype.element_ty), mask=inside)


@torch.library.custom_op("dsrl_async::quantise", mutates_args=())
def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """As `fp8.quantise`: rows [N, K], contiguous, as float8 [N, K] and scales float32 [N, 1]."""
    contiguous(rows=rows)
    count, width = rows.shape
    values, scale = torch.empty_like(rows, dtype=FLOAT8), rows.new_empty(count, 1, dtype=torch.float32)
    block = power_of_two(width)
    with on_device_of(rows):
        quantise_kernel[(count,)](
            rows, values, scale, width, SMALLEST, LARGEST=LARGEST, BLOCK=block, num_warps=warps(block)
        )
    return values, scale


@quantise.register_fake
def _(rows: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows, dtype=FLOAT8), rows.new_empty(len(rows), 1, dtype=torch.float32)
