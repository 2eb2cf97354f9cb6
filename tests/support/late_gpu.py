"""A GPU that is late: what is enqueued there is computed when somebody waits for it, and not before.

Its memory is the host's, and `cuda` is taken for it while a `LateGpu` is entered. Copies from page-locked memory read
it when they are computed, as on a real GPU, so that a host that overwrites such memory too early spoils them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

ENQUEUED = (Tensor.copy_, Tensor.fill_, Tensor.index_copy_)
"""What is computed late; before anything else of the GPU's tensors it is caught up with, as a stream is in order."""


class LateGpu(TorchFunctionMode):
    """Enter it, and install `event` as `torch.cuda.Event`.

    Attributes:
        waits: how often the host has waited for work that was not done yet.
        pageable: copies to the GPU that were to be asynchronous, from memory that is not page-locked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits = self.pageable = 0
        self._storages: dict[int, Tensor] = {}  # of the GPU's memory and of page-locked memory; tensors keep them alive
        self._locked: set[int] = set()
        self._queue: deque[Callable[[], object]] = deque()
        self._enqueued = self._done = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> LateGpu:
        monkeypatch.setattr(torch.cuda, "Event", lambda **settings: _Event(self))
        return self

    def catch_up(self, until: int | None = None) -> None:
        """Compute what was enqueued, or the first `until` of all."""
        with torch._C.DisableTorchFunction():
            while self._done < (self._enqueued if until is None else until):
                self._queue.popleft()()
                self._done += 1

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
            self._queue.append(lambda: func(*args, **kwargs))
            self._enqueued += 1
            if not locked or (func is Tensor.copy_ and sources and not kwargs.get("non_blocking")):
                self.catch_up()
            return args[0]
        if any(isinstance(leaf, Tensor) and self._is_here(leaf) for leaf in leaves):
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


def _to_host(leaf: Any) -> Any:
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


class _Event:
    """`torch.cuda.Event`."""

    def __init__(self, gpu: LateGpu) -> None:
        self._gpu, self._position = gpu, 0

    def record(self) -> None:
        self._position = self._gpu._enqueued

    def synchronize(self) -> None:
        self._gpu.waits += self._gpu._done < self._position
        self._gpu.catch_up(self._position)
