"""The matrix product that norms its rows on the way in: two tiles of columns that an epilogue then combines.

RMSNorm divides a row by one number, so that (x * scale / |x|) W = ((x * scale) W) / |x|: a program multiplies rows of
x * scale, adds up x^2 while they pass, and divides in the end. With a shift, (y + shift) W = y W + shift W, whose last
term is a row that is computed once per denoising time. So a normed row never is in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dsrl_async.pi0.launch_costs import LaunchCost, Matrices


@triton.jit
def normed_products(
    x, scale, floor, offset, weight, rows, row_inside, low, high, column_inside, width,
    HAS_OFFSET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, COLUMNS] twice: the normed `rows` of x [*, width] times the rows `low` of `weight` [*, width], and
    times its rows `high`; each with its part of `offset` [*], if there is one."""
    low_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    high_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, DEPTH):
        channel = start + tl.arange(0, DEPTH)
        inside = channel < width
        value = tl.load(
            x + rows[:, None] * width + channel[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        squares += tl.sum(value * value, axis=1)
        scaled = value * tl.load(scale + channel, mask=inside, other=0.0)[None, :]
        scaled = scaled.to(weight.dtype.element_ty)
        both = inside[:, None] & column_inside[None, :]
        factor = tl.load(weight + low[None, :] * width + channel[:, None], mask=both, other=0.0)
        low_sum = tl.dot(scaled, factor, low_sum, input_precision="ieee")
        factor = tl.load(weight + high[None, :] * width + channel[:, None], mask=both, other=0.0)
        high_sum = tl.dot(scaled, factor, high_sum, input_precision="ieee")
    least = tl.load(floor)
    norm = tl.sqrt(squares + least * least)[:, None]
    low_sum, high_sum = low_sum / norm, high_sum / norm
    if HAS_OFFSET:
        low_sum += tl.load(offset + low, mask=column_inside, other=0.0)[None, :]
        high_sum += tl.load(offset + high, mask=column_inside, other=0.0)[None, :]
    return low_sum, high_sum


class Tile(NamedTuple):
    """What one program computes, and with how many threads. None of it has been measured on a GPU."""

    rows: int
    columns: int
    """Of each of the two tiles."""
    depth: int
    """Channels that are in shared memory at a time, `stages` times over."""
    warps: int
    stages: int

    def time(self, rows: int, columns: int) -> float:
        """What a product of so many rows and pairs of columns takes with it, in units that are the same for all tiles.

        Every multiprocessor has a program at a time. Of a small tile it loads more for each product that it computes.
        """
        programs = triton.cdiv(rows, self.rows) * triton.cdiv(columns, self.columns)
        computed, loaded = self.rows * 2 * self.columns, self.rows + 2 * self.columns
        return triton.cdiv(programs, PROCESSORS) * max(computed, 64 * loaded)


PROCESSORS = 132
"""Multiprocessors of an H100."""
TILES = [
    *(Tile(16, columns, depth=128, warps=4, stages=3) for columns in (16, 32)),
    *(Tile(64, columns, depth=64, warps=4, stages=3) for columns in (16, 32, 64)),
    Tile(128, 64, depth=64, warps=8, stages=3),
]


def tile(rows: int, columns: int) -> Tile:
    """The tile for a product of so many rows and pairs of columns; it depends on nothing else."""
    return min(TILES, key=lambda one: one.time(rows, columns))


def product_cost(x: Tensor, scale: Tensor, offset: Tensor | None, weight: Tensor, outputs: int) -> LaunchCost:
    """Of a product of x [..., width] with a weight [N, width] that writes `outputs` columns of x's type."""
    rows, columns = x.numel() // x.shape[-1], weight.shape[0]
    shape = tile(rows, columns // 2)
    read = x.nbytes + weight.nbytes + scale.nbytes + (offset.nbytes if offset is not None else 0)
    matrices = Matrices(1, rows, columns, x.shape[-1])
    return LaunchCost(read, rows * outputs * x.element_size(), "product", matrices, (shape.rows, 2 * shape.columns))
