"""A GPU that is late: what is enqueued there is computed when somebody waits for it, and not before.

Its memory is the host's, and `cuda` is taken for it while a `LateGpu` is entered. Copies from page-locked memory read
it when they are computed, as on a real GPU, so that a host that overwrites such memory too early spoils them. What is
enqueued on one stream is computed in order; what a stream other than the default one was given is computed either as
late as anybody can wait for it or, with `eager`, as soon as nothing that it was told to wait for is outstanding.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

ENQUEUED = (Tensor.copy_, Tensor.fill_, Tensor.index_copy_)
"""What is computed late; before anything else of the GPU's tensors it is caught up with, as a stream is in order."""


class LateGpu(TorchFunctionMode):
    """Enter it, and install it as `torch.cuda`.

    Attributes:
        waits: how often the host has waited for work that was not done yet.
        waits_for_updates: how often for work of the default stream, which is what updates are enqueued on.
        pageable: copies to the GPU that were to be asynchronous, from memory that is not page-locked.
    """

    def __init__(self, eager: bool = False) -> None:
        super().__init__()
        self.waits = self.waits_for_updates = self.pageable = 0
        self._eager = eager
        self._storages: dict[int, Tensor] = {}  # of the GPU's memory and of page-locked memory; tensors keep them alive
        self._locked: set[int] = set()
        self._current = self._default = _Stream(self)
        self._others: list[_Stream] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> LateGpu:
        monkeypatch.setattr(torch.cuda, "Event", lambda **settings: _Event(self))
        monkeypatch.setattr(torch.cuda, "Stream", self._stream)
        monkeypatch.setattr(torch.cuda, "stream", self._entered)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self._current)
        return self

    def catch_up(self) -> None:
        """Compute what was enqueued."""
        for stream in (self._default, *self._others):
            stream.run(stream.enqueued)

    def _stream(self, device: Any = None) -> _Stream:
        self._others.append(_Stream(self))
        return self._others[-1]

    @contextlib.contextmanager
    def _entered(self, stream: _Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def enqueue(self, stream: _Stream, work: Callable[[], object] | _Event) -> None:
        stream.queue.append(work)
        stream.enqueued += 1
        while self._eager and any(other.step() for other in self._others):
            pass

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        goes_up = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if func is Tensor.pin_memory or kwargs.pop("pin_memory", False):
            return self._keep(args[0].clone() if func is Tensor.pin_memory else func(*args, **kwargs), locked=True)
        if func is Tensor.to and goes_up:
            if kwargs.get("non_blocking") and self._is_locked(args[0]):
                return args[0].view_as(args[0])  # it is read when it is used
            self.pageable += bool(kwargs.get("non_blocking"))
            self.catch_up()
            return self._keep(args[0].clone())
        if func in ENQUEUED and self._is_here(args[0]):
            sources = [leaf for leaf in leaves[1:] if isinstance(leaf, Tensor) and not self._is_here(leaf)]
            locked = all(map(self._is_locked, sources))
            self.pageable += not locked
            self.enqueue(self._current, lambda: func(*args, **kwargs))
            if not locked or (func is Tensor.copy_ and sources and not kwargs.get("non_blocking")):
                self.catch_up()
            return args[0]
        if func not in VIEWS and any(isinstance(leaf, Tensor) and self._is_here(leaf) for leaf in leaves):
            self.catch_up()
        result = func(*tree_map(_to_host, tuple(args)), **tree_map(_to_host, kwargs))
        return self._keep(result) if goes_up else result

    def _keep(self, tensor: Tensor, locked: bool = False) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        self._storages[address] = tensor
        if locked:
            self._locked.add(address)
        return tensor

    def _is_locked(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._locked

    def _is_here(self, tensor: Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr()
        return address in self._storages and address not in self._locked


VIEWS = (Tensor.__getitem__, Tensor.__len__)
"""What the host does without the GPU."""


def _to_host(leaf: Any) -> Any:
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


class _Stream:
    """`torch.cuda.Stream`. In the queue, an event stands for a wait until what came before it is done."""

    def __init__(self, gpu: LateGpu) -> None:
        self._gpu = gpu
        self.queue: deque[Callable[[], object] | _Event] = deque()
        self.enqueued = self.done = 0

    def wait_event(self, event: _Event) -> None:
        self._gpu.enqueue(self, event.as_it_is())

    def wait_stream(self, other: _Stream) -> None:
        self._gpu.enqueue(self, _Event(self._gpu, other, other.enqueued))

    def step(self) -> bool:
        """Compute what comes next, if there is anything that waits for nothing else; whether there was."""
        if not self.queue or (isinstance(self.queue[0], _Event) and self.queue[0].outstanding()):
            return False
        work = self.queue.popleft()
        if not isinstance(work, _Event):
            with torch._C.DisableTorchFunction():
                work()
        self.done += 1
        return True

    def run(self, until: int) -> None:
        """Compute the first `until` of all that was enqueued, and what that waits for."""
        while self.done < until:
            if isinstance(wait := self.queue[0], _Event):
                wait.run()
            self.step()


class _Event:
    """`torch.cuda.Event`."""

    def __init__(self, gpu: LateGpu, stream: _Stream | None = None, position: int = 0) -> None:
        self._gpu, self._stream, self._position = gpu, stream, position

    def as_it_is(self) -> _Event:
        """It may be recorded anew later, which a wait does not see."""
        return _Event(self._gpu, self._stream, self._position)

    def outstanding(self) -> bool:
        return self._stream is not None and self._stream.done < self._position

    def run(self) -> None:
        if self._stream is not None:
            self._stream.run(self._position)

    def record(self) -> None:
        self._stream = self._gpu._current
        self._position = self._stream.enqueued

    def synchronize(self) -> None:
        if self.outstanding():
            self._gpu.waits += 1
            done = self._gpu._default.done
            self.run()
            self._gpu.waits_for_updates += self._gpu._default.done > done
