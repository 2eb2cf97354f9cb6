"""Lists what a computation enqueues: its operations one by one, and how many of them are kernels.

A CUDA graph replays the same kernels on the same memory, whatever the input. `OperationTrace` shows, on any device,
whether a function can be captured: it raises at an operation that waits for the device or that makes a tensor from
Python data, and it records the operations and the storages they touch, which must be the same in every run.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CREATION = frozenset(
    {
        *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "zeros", "zeros_like", "new_zeros"),
        *("ones", "ones_like", "new_ones", "full", "full_like", "new_full", "arange", "linspace", "scalar_tensor"),
        *("lift_fresh", "lift_fresh_copy", "cat", "stack"),
    }
)
"""Operations that only make a new tensor, or copy into one. Inside a loop, that is work that could be done once."""

UPLOADS = frozenset(
    {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer, Tensor.new_tensor}
)
"""Functions that make a tensor from host data, which a graph would keep as a constant."""
DOWNLOADS = frozenset(
    {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.item, Tensor.__array__, Tensor.__bool__, Tensor.__float__}
)
"""Functions that give the host what a tensor holds; not all of them call an operation on the CPU."""

Operation = tuple[str, tuple[object, ...]]
"""An operation's name and its described arguments."""


class OperationTrace(TorchDispatchMode):
    """Records every ATen operation in its block.

    Args:
        guarded: raise AssertionError at what cannot be captured: an operation that makes the host wait, whose result's
            shape depends on data, or that copies between devices; `UPLOADS` and `DOWNLOADS`.
        forbidden: names of further operations (without overload) to treat so, such as `CREATION`.
        static: storage address -> name of the tensors that outlive a run; others are described as temporary.

    `operations` holds, in order, the name of each operation and for each of its arguments the value, or for a tensor
    its storage, offset, shape, strides and dtype. `kernels` counts those that are not views, which is what a GPU
    would launch or more (a few, such as an `empty`, launch nothing and are left out); `hidden_copies` counts what it
    would launch besides, see `copies_first`; `host_syncs` counts what `guarded` would refuse.
    """

    def __init__(
        self, guarded: bool = False, forbidden: Iterable[str] = (), static: Mapping[int, str] | None = None
    ) -> None:
        super().__init__()
        self.guarded, self.forbidden, self.static = guarded, frozenset(forbidden), dict(static or {})
        self.operations: list[Operation] = []
        self.kernels = 0
        self.hidden_copies = 0
        self.host_syncs = 0
        self._functions = _ForbidTransfers() if guarded else contextlib.nullcontext()

    def __enter__(self) -> OperationTrace:
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._functions.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        waits = needs_host(func, leaves)
        self.host_syncs += waits
        if name in self.forbidden or (self.guarded and waits):
            raise AssertionError(f"forbidden operation {name}: it cannot be captured in a CUDA graph")
        described = tuple(self._describe(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        self.operations.append((name, described))
        self.kernels += is_kernel(func)
        self.hidden_copies += copies_first(func, args)
        return func(*args, **(kwargs or {}))

    def _describe(self, tensor: Tensor) -> tuple[object, ...]:
        if tensor.layout != torch.strided:  # a weight that only oneDNN can read
            return ("packed", tuple(tensor.shape), tensor.dtype)
        where = "temporary"
        if tensor.device.type != "meta":
            where = self.static.get(tensor.untyped_storage().data_ptr(), where)
        offset = tensor.storage_offset() if where != "temporary" else 0
        return (where, offset, tuple(tensor.shape), tensor.stride(), tensor.dtype)


class _ForbidTransfers(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in UPLOADS | DOWNLOADS:
            raise AssertionError(f"forbidden operation {func.__name__}: a CUDA graph would keep its data as a constant")
        return func(*args, **(kwargs or {}))


def needs_host(operation: Any, leaves: Sequence[Any]) -> bool:
    """Whether an ATen overload, called with `leaves`, waits for the device or gives a shape that depends on data."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    devices = {tensor.device.type for tensor in tensors if tensor.ndim > 0}
    devices |= {leaf.type for leaf in leaves if isinstance(leaf, torch.device)}
    if len(devices) > 1 or operation.overloadpacket.__name__.startswith("lift_fresh"):  # made from Python's numbers
        return True
    if operation.overloadpacket.__name__ in ("index", "index_put", "index_put_"):  # a mask is turned into numbers first
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operation.tags))


def is_kernel(operation: Any) -> bool:
    """Whether an ATen overload launches work: it is not a view, and not an allocation without contents."""
    name = operation.overloadpacket.__name__
    return not (operation.is_view or re.match(r"(new_)?empty|detach|_reshape_alias|_unsafe_view", name))


def copies_first(operation: Any, arguments: Sequence[Any]) -> bool:
    """Whether a product that is added to a tensor of its own shape copies that tensor first, as CUDA does unless the
    sum is made in place. (A vector, such as a bias, is added by the product itself.)"""
    name = operation.overloadpacket.__name__
    return name in ("addmm", "baddbmm") and arguments[0].ndim == arguments[1].ndim
