"""CUDA graphs: the whole of this project's dealings with them. Nothing here has run on a GPU yet."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from dsrl_async.shm.counters import Graphs

logger = logging.getLogger(__name__)

MemoryPool = Any
"""What `torch.cuda.graph_pool_handle` returns; torch does not export its type."""

WARMUP_RUNS = 3
"""Runs before a capture, as torch's notes on CUDA graphs ask for: libraries choose algorithms and allocate."""

NORMAL_PRIORITY, HIGH_PRIORITY = 0, -1
"""Priorities of streams; CUDA's lower numbers go first. The policy's kernels are high, since robots wait for them."""


class CaptureError(RuntimeError):
    """A capture failed, and the process must end: torch does not promise what its allocator does from then on."""


class Captured(NamedTuple):
    """CUDA graphs of some functions."""

    replays: list[Callable[[], None]]
    """One for each function, in the order of the functions."""
    pool: MemoryPool


def capture(
    functions: Sequence[Callable[[], None]],
    device: torch.device,
    pool: MemoryPool | None,
    name: str,
    setting: str,
    priority: int = NORMAL_PRIORITY,
) -> Captured | None:
    """Capture `functions`, which run in this order, each as a CUDA graph in the memory of `pool` (None: a new one).

    Functions that share a pool must never run at the same time as each other. `priority` is that of the captured
    kernels among all that wait for the device. Where there is no CUDA device, this is logged with `name`, and None is
    returned.

    Raises:
        CaptureError: a function could not be run or captured; the message has `name`, the first cause, and `setting`,
            which can be set to `off`. The current stream is what it was, but `torch.cuda.graph` may have left the
            allocator in the middle of a capture (up to torch 2.11 it does so whenever CUDA has invalidated one), and
            there is no public way out of that.
    """
    if device.type != "cuda":
        logger.info("no CUDA graphs for %s: it runs on %s", name, device)
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    before, side = torch.cuda.current_stream(index), capture_stream(index, priority)
    try:
        side.wait_stream(before)
        with torch.cuda.stream(side):
            for _ in range(WARMUP_RUNS):
                for function in functions:
                    function()
        before.wait_stream(side)
        torch.cuda.synchronize(index)
        pool = torch.cuda.graph_pool_handle() if pool is None else pool
        replays: list[Callable[[], None]] = []
        for function in functions:
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads, such as ZeroMQ's, may go on calling CUDA
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                function()
            replays.append(graph.replay)
    except RuntimeError as error:
        cause = first_cause(error)
        what = str(cause).partition("\n")[0] or type(cause).__name__
        advice = f"{setting}: off does without them"
        raise CaptureError(f"no CUDA graphs of {name} could be captured: {what}; {advice}") from error
    finally:
        torch.cuda.set_stream(before)  # an error at the end of a capture leaves the other one current
    return Captured(replays, pool)


@functools.cache
def capture_stream(device: int, priority: int) -> torch.cuda.Stream:
    """The stream for all warm-ups and captures on a device, by priority.

    torch hands freed memory out again to the stream that used it only, so that captures of one pool would share no
    memory if each had a stream of its own.
    """
    return torch.cuda.Stream(device, priority=priority)


def first_cause(error: BaseException) -> BaseException:
    """The error that came before all that were raised while it was handled.

    The one at the end of a spoilt capture only says that there was another, which names what cannot be captured.
    """
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error if earlier is None else first_cause(earlier)


@contextlib.contextmanager
def graphs_of(setting: Literal["auto", "off"], device: torch.device, state: np.ndarray) -> Iterator[bool]:
    """`with` this around the captures of a process; it yields whether there are to be any.

    There are none on the CPU, where `setting` is `off`, and in the successor of a process whose captures failed.
    `state`, int64 [1] in the shared memory, is a value of `Graphs`, and kept up to date.
    """
    if device.type != "cuda":
        yield False
    elif setting == "off" or state[0] == Graphs.FAILED:
        state[0] = state[0] or Graphs.OFF
        yield False
    else:
        try:
            yield True
        except CaptureError:
            state[0] = Graphs.FAILED
            raise
        state[0] = Graphs.CAPTURED
