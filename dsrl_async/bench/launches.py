"""What a computation asks a GPU to launch: the bytes and the matrix products of each kernel, from shapes alone.

On the meta device nothing is computed, so that a sample of full size is counted within seconds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dsrl_async.pi0
from dsrl_async.host.tracing import copies_first, is_kernel
from dsrl_async.pi0.launch_costs import LAUNCH_COSTS, LaunchCost, Matrices

Kind = Literal["product", "attention", "other"]
POLICY = str(Path(dsrl_async.pi0.__file__).parent)
OVERWRITTEN = frozenset({"copy_", "fill_", "zero_"})
"""Operations in place that do not read what they change."""
ROWS_READ = frozenset({"embedding", "index_select", "index", "gather"})
"""Operations that read as much of their first tensor as they return."""


@dataclass(frozen=True)
class Launch:
    """One kernel."""

    stage: str
    where: str
    """The function of `dsrl_async/pi0` that launches it."""
    operation: str
    kind: Kind
    read: int
    """Bytes; a tensor counts once, whatever number of times the kernel reads it."""
    written: int
    """Bytes."""
    matrices: Matrices | None = None
    """Of a product: its matrices. Of attention: the queries by the keys, with `inner` channels."""
    masked: bool = False
    """Whether it is attention with a mask."""
    single: bool = False
    """Whether it multiplies matrices in float32."""
    tile: tuple[int, int] | None = None
    """`LaunchCost.tile` of a kernel of our own that multiplies matrices."""

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def flops(self) -> float:
        """Of matrix products; a multiply-add counts as two. Attention has two products."""
        if self.matrices is None:
            return 0.0
        return (4.0 if self.kind == "attention" else 2.0) * math.prod(self.matrices)


class LaunchCount(TorchDispatchMode):
    """Records in `launches` every kernel that its block launches, each in the `stage` that is set when it comes.

    An ATen operation is a kernel if `dsrl_async.host.tracing.is_kernel` says so. Where CUDA would first copy a sum's
    tensor (`copies_first`), that copy is a kernel, too. `scaled_dot_product_attention` is one kernel on every device,
    as a GPU's fused attention is; on the meta device, it would be many.
    """

    def __init__(self, stage: str = "") -> None:
        super().__init__()
        self.stage = stage
        self.launches: list[Launch] = []
        self._attention = _OneAttention(self)

    def __enter__(self) -> LaunchCount:
        self._attention.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._attention.__exit__(*exception)

    def add(self, operation: str, kind: Kind, read: int, written: int, **details: Any) -> None:
        self.launches.append(Launch(self.stage, _where(), operation, kind, read, written, **details))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "dsrl_async":
            self._add_own(func, args, kwargs, out)
        elif is_kernel(func):
            name = func.overloadpacket.__name__
            if copies_first(func, args):
                self.add("hidden copy", "other", touched(args[0]), touched(args[0]))
            read, written = traffic(func, args, kwargs, out)
            matrices = matrices_of(name, args)
            kind: Kind = "product" if matrices else "other"
            single = matrices is not None and tree_leaves(out)[0].dtype == torch.float32
            self.add(name, kind, read, written, matrices=matrices, single=single)
        return out

    def _add_own(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func.overloadpacket.__name__
        declared = LAUNCH_COSTS.get(name)
        cost = declared(*args, **kwargs) if declared else LaunchCost(*traffic(func, args, kwargs, out))
        for number in range(cost.kernels):  # the first one has the work
            if number == 0:
                tile = cost.tile if cost.matrices else None
                tensors = (leaf for leaf in tree_leaves((out, args)) if isinstance(leaf, Tensor))
                single = tile is not None and next(tensors).dtype == torch.float32
                self.add(name, cost.kind, cost.read, cost.written, matrices=cost.matrices, tile=tile, single=single)
            else:
                self.add(name, cost.kind, 0, 0)


class _OneAttention(TorchFunctionMode):
    """Counts attention where it is called, and computes nothing for it."""

    def __init__(self, count: LaunchCount) -> None:
        super().__init__()
        self._count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._attend(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        batch, heads, queries, width = query.shape
        operands = [query, key, value] + ([attn_mask] if attn_mask is not None else [])
        matrices = Matrices(batch * heads, queries, key.shape[2], width)
        masked, single = attn_mask is not None, query.dtype == torch.float32
        read = sum(map(touched, operands))
        self._count.add("attention", "attention", read, touched(query), matrices=matrices, masked=masked, single=single)
        return query.new_empty(batch, queries, heads, width).transpose(1, 2)


def touched(tensor: Tensor) -> int:
    """Bytes of the elements of a tensor; those that a stride of 0 repeats count once."""
    sizes = [size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return math.prod(sizes) * tensor.element_size()


def traffic(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[int, int]:
    """Bytes that an operation reads, and that it writes.

    It writes its results and what it changes, and reads its arguments, except for what it overwrites as a whole.
    """
    name = func.overloadpacket.__name__
    read = written = 0
    changed: set[int] = set()
    for position, argument in enumerate(func._schema.arguments):
        value = kwargs.get(argument.name) if argument.kwarg_only or position >= len(args) else args[position]
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        changes = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tensors:
            if changes:
                changed.add(id(tensor))
                written += touched(tensor)
            if not (changes and (argument.is_out or (name in OVERWRITTEN and position == 0))):
                read += touched(tensor)
    results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    written += sum(touched(result) for result in results if id(result) not in changed)
    if name in ROWS_READ:
        read += touched(results[0]) - touched(args[0])
    return read, written


def matrices_of(name: str, args: Any) -> Matrices | None:
    """The matrices of an ATen operation that multiplies some."""
    if name == "convolution":
        assert list(args[1].shape[2:]) == list(args[3]), "only patches that do not overlap are counted"
    return matrices_of_sizes(name, [leaf.shape if isinstance(leaf, Tensor) else () for leaf in args])


def matrices_of_sizes(name: str, sizes: Sequence[Sequence[int]]) -> Matrices | None:
    """`matrices_of` for arguments of these sizes."""
    if name in ("addmm", "addmm_", "_addmm_activation", "mm", "_scaled_mm", "bmm", "baddbmm", "baddbmm_"):
        left, right = sizes[1:3] if "add" in name else sizes[:2]
        return Matrices(left[0] if len(left) == 3 else 1, left[-2], right[-1], left[-1])
    if name == "convolution":  # whose stride is its kernel's size
        images, weight = sizes[:2]
        patches = math.prod(images[2:]) // math.prod(weight[2:])
        return Matrices(1, images[0] * patches, weight[0], math.prod(weight[1:]))
    return None


def _where() -> str:
    """The innermost function of the policy network on the stack."""
    frame: Any = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(POLICY):
        frame = frame.f_back
    return frame.f_code.co_qualname.replace(".<locals>", "") if frame is not None else ""
