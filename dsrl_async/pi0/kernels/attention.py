"""Attention of all query heads to one key head each, with an additive mask over the keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsrl_async.pi0.kernels.launch import (
    ENOUGH_PROGRAMS,
    SHORTEST_BLOCK,
    contiguous,
    on_device_of,
    power_of_two,
)
from dsrl_async.pi0.launch_costs import LaunchCost, Matrices, launch_cost

KEYS = 32
"""Keys that a program looks at together. With 256 channels, they and their values take 32 kB of shared memory, and
twice that as the next ones are fetched meanwhile; consumer GPUs have 99 kB."""


@triton.jit
def attend_kernel(
    query, cache, mask, y, tokens, keys, scale,
    cache_batch, cache_kind, cache_group, cache_token, mask_batch,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per ROWS queries of a key head. The softmax is summed up block by block, as its largest logit becomes
    known."""
    batch = (tl.program_id(1) // GROUPS).to(tl.int64)
    group = tl.program_id(1) % GROUPS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    of_group: tl.constexpr = HEADS // GROUPS
    token, head = row // of_group, group * of_group + row % of_group
    place = ((batch * tokens + token) * HEADS + head)[:, None] * WIDTH + channel[None, :]
    inside = (token < tokens)[:, None] & (channel < WIDTH)[None, :]
    q = tl.load(query + place, mask=inside, other=0.0)

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    key_rows = cache + batch * cache_batch + group * cache_group
    for start in range(0, keys, KEYS):
        number = start + tl.arange(0, KEYS)
        there = number < keys
        rows = key_rows + number[:, None] * cache_token + channel[None, :]
        both = there[:, None] & (channel < WIDTH)[None, :]
        key = tl.load(rows, mask=both, other=0.0)
        logit = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
        logit += tl.load(mask + batch * mask_batch + number, mask=there, other=0.0).to(tl.float32)[None, :]
        logit = tl.where(there[None, :], logit, float("-inf"))
        higher = tl.maximum(highest, tl.max(logit, axis=1))  # the mask is finite, and so is this
        weight = tl.exp(logit - higher[:, None])
        shrink = tl.exp(highest - higher)
        weights = weights * shrink + tl.sum(weight, axis=1)
        value = tl.load(rows + cache_kind, mask=both, other=0.0)
        total = tl.dot(weight.to(value.dtype), value, total * shrink[:, None], input_precision="ieee")
        highest = higher
    tl.store(y + place, (total / weights[:, None]).to(y.dtype.element_ty), mask=inside)


@torch.library.custom_op("dsrl_async::attend", mutates_args=())
def attend(query: Tensor, keys_values: Tensor, mask: Tensor) -> Tensor:
    """As `model.attend`: query [B, T, heads, D], keys and values [B, 2, G, S, D] of any strides but the last, and a
    finite mask [B, 1, 1, S] with dense rows -> [B, T, heads * D].

    (Dao et al. 2022, arXiv 2205.14135; online softmax by Milakov and Gimelshein 2018, arXiv 1805.02867.)
    """
    contiguous(query=query)
    assert keys_values.stride(-1) == 1
    assert mask.stride(-1) == 1
    batch, tokens, heads, width = query.shape
    groups, keys = keys_values.shape[2:4]
    rows = query_rows(batch * groups, tokens * heads // groups)
    out = torch.empty_like(query)
    with on_device_of(query):
        attend_kernel[(triton.cdiv(tokens * heads // groups, rows), batch * groups)](
            query, keys_values, mask, out, tokens, keys, width**-0.5, *keys_values.stride()[:4], mask.stride(0),
            HEADS=heads, GROUPS=groups, WIDTH=width,
            ROWS=rows, KEYS=KEYS, BLOCK=max(SHORTEST_BLOCK, power_of_two(width)),
            num_warps=4 if rows < 64 else 8, num_stages=2,
        )  # fmt: skip
    return out.view(batch, tokens, heads * width)


@attend.register_fake
def _(query: Tensor, keys_values: Tensor, mask: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:2], query.shape[2] * query.shape[3])


@launch_cost("attend")
def _(query: Tensor, keys_values: Tensor, mask: Tensor) -> LaunchCost:
    batch, tokens, heads, width = query.shape
    groups, keys = keys_values.shape[2:4]
    queries = tokens * heads // groups
    return LaunchCost(
        query.nbytes + keys_values.numel() * keys_values.element_size() + batch * keys * mask.element_size(),
        query.nbytes,
        "attention",
        Matrices(batch * groups, queries, keys, width),
        tile=(query_rows(batch * groups, queries), KEYS),
    )


def query_rows(sequences: int, queries: int) -> int:
    """How many queries a program has: 64, or fewer where that leaves multiprocessors without work."""
    rows = 64
    while rows > SHORTEST_BLOCK and sequences * triton.cdiv(queries, rows) < ENOUGH_PROGRAMS:
        rows //= 2
    return rows
