"""`torch.cuda` without a GPU: streams, captures and an allocator, as far as captures depend on them.

What is modelled, from torch's own source (torch/cuda/graphs.py, CUDAGraph.cpp, CUDACachingAllocator.cpp):

* There is a current stream; work goes there. While a graph is captured, work is noted in it and not done.
* The allocator keeps freed memory for the stream that used it, apart for each memory pool. While a graph is captured,
  memory comes from its pool.
* `torch.cuda.graph` enters its stream, begins a capture, and at the end ends the capture before it leaves the stream.
  If the capture was spoilt, its end raises: the stream stays current, and the allocator goes on as if in a capture.
* What waits for the device, in the middle of a capture, raises and spoils the capture.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

NOT_WHILE_CAPTURING = "CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might be ..."
SPOILT = "CUDA error: operation failed due to a previous error during capture\nCUDA kernel errors might be ..."
DEFAULT_POOL = 0


class Stream:
    def __init__(self, device: int, priority: int = 0) -> None:
        self.device, self.priority = device, priority
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


class CUDAGraph:
    """A list of what is done when it is replayed."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.work: list[Callable[[], None]] = []
        self.complete = False
        cuda.graphs.add(self)

    def replay(self) -> None:
        assert self.complete, "a graph is replayed that was not captured to its end"
        for function in self.work:
            self._cuda.launch(function)


class FakeCuda:
    """Install it in the place of `torch.cuda`; the functions to be captured call `launch`, `memory` and `synchronize`.

    Attributes:
        streams: all that were made.
        current: the current stream.
        capturing: the graph that is being captured.
        allocator_captures: whether the allocator believes that a graph is being captured.
        graphs: those that anyone still holds.
        done: (stream, what) of all work that was launched and not captured.
        capacity: bytes that there are.
    """

    def __init__(self, capacity: int = 10**12) -> None:
        self.default = self.current = Stream(0)
        self.streams: list[Stream] = []
        self.capturing: CUDAGraph | None = None
        self.allocator_captures = False
        self.graphs: weakref.WeakSet[CUDAGraph] = weakref.WeakSet()
        self.done: list[tuple[Stream, Callable[[], None]]] = []
        self.capacity = capacity
        self._pool = DEFAULT_POOL
        self._pools = 0
        self._spoilt = False
        self._free: dict[tuple[int, Stream], list[int]] = defaultdict(list)  # sizes of blocks
        self._reserved: Counter[int] = Counter()  # bytes, by pool

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
        replacements = {
            "Stream": self._stream,
            "CUDAGraph": lambda: CUDAGraph(self),
            "current_device": lambda: 0,
            "current_stream": lambda device=None: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "stream": self._entered,
            "graph": _Capture.of(self),
            "graph_pool_handle": self._new_pool,
            "synchronize": lambda device=None: self.synchronize(),
        }
        for name, replacement in replacements.items():
            monkeypatch.setattr(torch.cuda, name, replacement)
        return self

    # ---- what captured functions do

    def launch(self, function: Callable[[], None]) -> None:
        """Do `function` in the current stream, or note it in the graph."""
        if self.capturing is not None:
            self.capturing.work.append(function)
        else:
            self.done.append((self.current, function))
            function()

    @contextlib.contextmanager
    def memory(self, size: int) -> Iterator[None]:
        """A block of `size` bytes, as for a tensor that lives as long as the `with`."""
        pool = self._pool if self.allocator_captures else DEFAULT_POOL
        free = self._free[pool, self.current]
        fitting = [block for block in free if block >= size]
        if fitting:
            block = min(fitting)
            free.remove(block)
        else:
            if sum(self._reserved.values()) + size > self.capacity and self.capturing is None:
                self._give_back_unused()
            if sum(self._reserved.values()) + size > self.capacity:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
            block = size
            self._reserved[pool] += size
        try:
            yield
        finally:
            free.append(block)

    def synchronize(self) -> None:
        """What the host does that waits for the device."""
        if self.capturing is not None:
            self._spoilt = True
            raise RuntimeError(NOT_WHILE_CAPTURING)

    # ---- what tests look at

    def reserved(self, pool: int) -> int:
        """Bytes of a pool, in use or kept for later."""
        return self._reserved[pool]

    # ---- torch.cuda

    def _stream(self, device: Any = None, priority: int = 0) -> Stream:
        self.streams.append(Stream(device, priority))
        return self.streams[-1]

    @contextlib.contextmanager
    def _entered(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def _new_pool(self) -> int:
        self._pools += 1
        return self._pools

    def _give_back_unused(self) -> None:
        for (pool, _), free in self._free.items():
            if pool == DEFAULT_POOL:
                self._reserved[pool] -= sum(free)
                free.clear()

    def begin_capture(self, graph: CUDAGraph, pool: int) -> None:
        if self.current is self.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self._pool, self.allocator_captures = pool, True
        self.capturing, self._spoilt = graph, False

    def end_capture(self) -> None:
        graph, self.capturing = self.capturing, None
        assert graph is not None
        if self._spoilt:
            raise RuntimeError(SPOILT)
        self.allocator_captures = False
        graph.complete = True


class _Capture:
    """`torch.cuda.graph`."""

    def __init__(
        self, cuda: FakeCuda, graph: CUDAGraph, pool: int, stream: Stream, capture_error_mode: str = "global"
    ) -> None:
        assert capture_error_mode == "thread_local", "another thread's call of CUDA would spoil the capture"
        self._cuda, self._graph, self._pool = cuda, graph, pool
        self._entered = cuda._entered(stream)

    @classmethod
    def of(cls, cuda: FakeCuda) -> Callable[..., _Capture]:
        return lambda graph, **settings: cls(cuda, graph, **settings)

    def __enter__(self) -> None:
        self._cuda.synchronize()
        self._cuda._give_back_unused()
        self._entered.__enter__()
        self._cuda.begin_capture(self._graph, self._pool)

    def __exit__(self, *exception: Any) -> None:
        self._cuda.end_capture()
        self._entered.__exit__(*exception)
