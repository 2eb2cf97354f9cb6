"""CUDA graphs: the whole of this project's dealings with them. Nothing here has run on a GPU yet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

logger = logging.getLogger(__name__)

MemoryPool = Any
"""What `torch.cuda.graph_pool_handle` returns; torch does not export its type."""

WARMUP_RUNS = 3
"""Runs before a capture, as torch's notes on CUDA graphs ask for: libraries choose algorithms and allocate."""

NORMAL_PRIORITY, HIGH_PRIORITY = 0, -1
"""Of a stream; CUDA's lower numbers go first. The policy's kernels are high, since robots wait for them."""


class Captured(NamedTuple):
    """CUDA graphs of some functions."""

    replays: list[Callable[[], None]]
    """In the order of the functions."""
    pool: MemoryPool


def capture(
    functions: Sequence[Callable[[], None]],
    device: torch.device,
    pool: MemoryPool | None,
    name: str,
    priority: int = NORMAL_PRIORITY,
) -> Captured | None:
    """Captures `functions`, which run in this order, each as a CUDA graph in the memory of `pool` (None: a new one).

    Functions that share a pool must never run at the same time as each other. `priority` is that of the captured
    kernels among all that wait for the device. Where there is no CUDA device, or when the capture fails, the reason is
    logged with `name`, and None is returned.
    """
    if device.type != "cuda":
        logger.info("no CUDA graphs for %s: it runs on %s", name, device)
        return None
    side = torch.cuda.Stream(device, priority=priority)
    try:
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARMUP_RUNS):
                for function in functions:
                    function()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        pool = torch.cuda.graph_pool_handle() if pool is None else pool
        replays: list[Callable[[], None]] = []
        for function in functions:
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads, such as ZeroMQ's, may go on calling CUDA
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                function()
            replays.append(graph.replay)
    except RuntimeError as error:
        logger.warning("no CUDA graphs for %s, it runs eagerly: %s", name, error)
        return None
    return Captured(replays, pool)
