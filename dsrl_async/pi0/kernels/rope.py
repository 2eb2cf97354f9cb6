"""Rotary embedding of queries and keys, which go with the values to where attention reads them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsrl_async.pi0.kernels.launch import contiguous, on_device_of, power_of_two
from dsrl_async.pi0.kernels.product import normed_products, product_cost, tile
from dsrl_async.pi0.launch_costs import LaunchCost, launch_cost


@triton.jit
def rotate_and_store(
    low, high, cos, sin, query, cache, row, batch, token, head, channel, inside,
    cos_batch, cos_token, cache_batch, cache_kind, cache_group, cache_token,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotate channel i (`low`) with channel i + HALF (`high`) of queries and keys; queries go to `query`
    [rows, HEADS, 2 HALF], the GROUPS keys and GROUPS values behind them to `cache`, which has strides.

    All arguments from `row` to `inside` have the shape of `low`, or broadcast to it.
    """
    angle = batch * cos_batch + token * cos_token + channel
    rotated = inside & (head < HEADS + GROUPS)
    c = tl.load(cos + angle, mask=rotated, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=rotated, other=0.0).to(tl.float32)
    first = (low * c - high * s).to(query.dtype.element_ty)
    second = (high * c + low * s).to(query.dtype.element_ty)
    asks = inside & (head < HEADS)
    place = query + (row * HEADS + head) * (2 * HALF) + channel
    tl.store(place, first, mask=asks)
    tl.store(place + HALF, second, mask=asks)
    answers = inside & (head >= HEADS)
    number = tl.where(head >= HEADS, head - HEADS, 0)
    where = batch * cache_batch + (number // GROUPS) * cache_kind + (number % GROUPS) * cache_group
    place = cache + where + token * cache_token + channel
    tl.store(place, first, mask=answers)
    tl.store(place + HALF, second, mask=answers)


@triton.jit
def rotate_kernel(
    qkv, cos, sin, query, cache, tokens,
    cos_batch, cos_token, cache_batch, cache_kind, cache_group, cache_token,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per token."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    inside = (head < HEADS + 2 * GROUPS) & (channel < HALF)
    place = qkv + (row * (HEADS + 2 * GROUPS) + head) * (2 * HALF) + channel
    low = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    rotate_and_store(
        low, high, cos, sin, query, cache, row, row // tokens, row % tokens, head, channel, inside,
        cos_batch, cos_token, cache_batch, cache_kind, cache_group, cache_token, HEADS, GROUPS, HALF,
    )  # fmt: skip


@torch.library.custom_op("dsrl_async::rotate", mutates_args=("cache",))
def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor) -> Tensor:
    """Rotate queries and keys and write keys and values to `cache`; returns the queries [B, T, heads, D].

    qkv [B, T, heads + 2 G, D], contiguous: queries, keys, values; there may be no queries. cos and sin [B, T, D/2]
    with dense rows; cache [B, 2, G, T, D], any strides but the last. Channel i is paired with i + D/2. In float32,
    rounded once. (Su et al. 2021, arXiv 2104.09864.)
    """
    contiguous(qkv=qkv)
    batch, tokens, both, width = qkv.shape
    groups = cache.shape[2]
    heads = both - 2 * groups
    query = qkv.new_empty(batch, tokens, heads, width)
    block_heads, block = power_of_two(both), power_of_two(width // 2)
    with on_device_of(qkv):
        rotate_kernel[(batch * tokens,)](
            qkv, cos, sin, query, cache, tokens, *_strides(cos, cache),
            HEADS=heads, GROUPS=groups, HALF=width // 2, BLOCK_HEADS=block_heads, BLOCK=block,
            num_warps=min(8, max(1, block_heads * block // 256)),
        )  # fmt: skip
    return query


@rotate.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor) -> Tensor:
    batch, tokens, both, width = qkv.shape
    return qkv.new_empty(batch, tokens, both - 2 * cache.shape[2], width)


@launch_cost("rotate")
def _(qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor) -> LaunchCost:
    return LaunchCost(qkv.nbytes + 2 * cos.numel() * cos.element_size(), qkv.nbytes)


@triton.jit
def normed_rotate_kernel(
    x, scale, floor, offset, weight, cos, sin, query, cache, count, tokens, width,
    cos_batch, cos_token, cache_batch, cache_kind, cache_group, cache_token,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr,
    HAS_OFFSET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A program per ROWS tokens and COLUMNS pairs of channels."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, inside = row < count, pair < (HEADS + 2 * GROUPS) * HALF
    head, channel = pair // HALF, pair % HALF
    first = head * (2 * HALF) + channel
    rows = row.to(tl.int64)
    low, high = normed_products(
        x, scale, floor, offset, weight, rows, row_inside, first, first + HALF, inside, width,
        HAS_OFFSET, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    rows = rows[:, None]
    rotate_and_store(
        low, high, cos, sin, query, cache, rows, rows // tokens, rows % tokens, head[None, :], channel[None, :],
        row_inside[:, None] & inside[None, :],
        cos_batch, cos_token, cache_batch, cache_kind, cache_group, cache_token, HEADS, GROUPS, HALF,
    )  # fmt: skip


@torch.library.custom_op("dsrl_async::normed_rotate", mutates_args=("cache",))
def normed_rotate(
    x: Tensor, scale: Tensor, floor: Tensor, offset: Tensor | None, weight: Tensor,
    cos: Tensor, sin: Tensor, cache: Tensor,
) -> Tensor:  # fmt: skip
    """`rotate` of the RMSNorm of x [B, T, width] times weight [(heads + 2 G) D, width].

    `scale` and `floor` are those of `model.Modulation`; `offset` float32 [(heads + 2 G) D] is the product of its shift
    with the weight. x and weight are contiguous.
    """
    contiguous(x=x, weight=weight)
    batch, tokens, width = x.shape
    groups, size = cache.shape[2], cache.shape[-1]
    heads = weight.shape[0] // size - 2 * groups
    query = x.new_empty(batch, tokens, heads, size)
    count, pairs = batch * tokens, weight.shape[0] // 2
    shape = tile(count, pairs)
    with on_device_of(x):
        normed_rotate_kernel[(triton.cdiv(count, shape.rows), triton.cdiv(pairs, shape.columns))](
            x, scale, floor, offset, weight, cos, sin, query, cache, count, tokens, width, *_strides(cos, cache),
            HEADS=heads, GROUPS=groups, HALF=size // 2,
            HAS_OFFSET=offset is not None, ROWS=shape.rows, COLUMNS=shape.columns, DEPTH=shape.depth,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    return query


@normed_rotate.register_fake
def _(
    x: Tensor, scale: Tensor, floor: Tensor, offset: Tensor | None, weight: Tensor,
    cos: Tensor, sin: Tensor, cache: Tensor,
) -> Tensor:  # fmt: skip
    heads = weight.shape[0] // cache.shape[-1] - 2 * cache.shape[2]
    return x.new_empty(*x.shape[:-1], heads, cache.shape[-1])


@launch_cost("normed_rotate")
def _(
    x: Tensor, scale: Tensor, floor: Tensor, offset: Tensor | None, weight: Tensor,
    cos: Tensor, sin: Tensor, cache: Tensor,
) -> LaunchCost:  # fmt: skip
    cost = product_cost(x, scale, offset, weight, weight.shape[0])
    return cost._replace(read=cost.read + 2 * cos.numel() * cos.element_size())


def _strides(cos: Tensor, cache: Tensor) -> tuple[int, ...]:
    assert cos.stride(-1) == 1
    assert cache.stride(-1) == 1
    return (*cos.stride()[:2], *cache.stride()[:4])
