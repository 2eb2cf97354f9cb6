"""RMSNorm of a row, and LayerNorm of a row to which a vector is added."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsrl_async.pi0.kernels.launch import contiguous, on_device_of, power_of_two
from dsrl_async.pi0.launch_costs import LaunchCost, launch_cost


@triton.jit
def rms_norm_kernel(x, scale, floor, shift, y, width, HAS_SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """A program per row: y = x * scale / sqrt(sum(x^2) + floor^2) + shift, in float32, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    least = tl.load(floor)
    norm = tl.sqrt(tl.sum(value * value, axis=0) + least * least)
    value = value * tl.load(scale + column, mask=inside, other=0.0) / norm
    if HAS_SHIFT:
        value += tl.load(shift + column, mask=inside, other=0.0)
    tl.store(y + row * width + column, value.to(y.dtype.element_ty), mask=inside)


@torch.library.custom_op("dsrl_async::rms_norm", mutates_args=("out",))
def rms_norm(x: Tensor, scale: Tensor, floor: Tensor, shift: Tensor | None, out: Tensor) -> None:
    """Write the RMSNorm of x to `out`; both [..., width], contiguous, of any floating type.

    `scale`, `shift` float32 [width] and `floor` float32 [] are those of `model.Modulation`. (Zhang and Sennrich 2019,
    arXiv 1910.07467; with a shift, the adaptive norm of pi0.5.)
    """
    contiguous(x=x, out=out, scale=scale)
    width = x.shape[-1]
    block = power_of_two(width)
    with on_device_of(x):
        rms_norm_kernel[(x.numel() // width,)](
            x, scale, floor, shift, out, width,
            HAS_SHIFT=shift is not None, BLOCK=block, num_warps=warps(block),
        )  # fmt: skip


@rms_norm.register_fake
def _(x: Tensor, scale: Tensor, floor: Tensor, shift: Tensor | None, out: Tensor) -> None:
    return None


@launch_cost("rms_norm")
def _(x: Tensor, scale: Tensor, floor: Tensor, shift: Tensor | None, out: Tensor) -> LaunchCost:
    return LaunchCost(x.nbytes + scale.nbytes + (shift.nbytes if shift is not None else 0), out.nbytes)


@triton.jit
def layer_norm_kernel(x, offset, weight, bias, y, width, epsilon, BLOCK: tl.constexpr):
    """A program per row: z = x + offset; y = (z - mean) / sqrt(variance + epsilon) * weight + bias, in float32."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(offset + column, mask=inside, other=0.0)
    centred = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, axis=0) / width + epsilon)
    value = centred / deviation * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, value.to(y.dtype.element_ty), mask=inside)


@torch.library.custom_op("dsrl_async::layer_norm", mutates_args=())
def layer_norm(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """LayerNorm of x + offset, for x [..., width], contiguous, and offset float32 [width]; of x's type.

    `weight` and `bias` [width]. (Ba, Kiros and Hinton 2016, arXiv 1607.06450.)
    """
    contiguous(x=x, offset=offset, weight=weight, bias=bias)
    width = x.shape[-1]
    block = power_of_two(width)
    out = torch.empty_like(x)
    with on_device_of(x):
        layer_norm_kernel[(x.numel() // width,)](
            x, offset, weight, bias, out, width, epsilon, BLOCK=block, num_warps=warps(block)
        )
    return out


@layer_norm.register_fake
def _(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x)


def warps(block: int) -> int:
    """Warps of a program that holds a row of `block` values: 16 values per thread, from 1 to 16 warps."""
    return min(16, max(1, block // 512))
