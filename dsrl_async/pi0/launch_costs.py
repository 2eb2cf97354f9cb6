"""What a kernel of our own moves and computes, where its operands do not tell.

`dsrl_async.bench.launches` counts every operation of the library `dsrl_async` as one kernel that reads all tensors that
it is given and writes those that it returns; a tensor that it changes is read and written. A kernel for which this is
not so, such as one that writes some rows of a large buffer, says here what is so, beside its definition:

    @launch_cost("write_rows")
    def _(buffer, rows): return LaunchCost(read=rows.nbytes, written=rows.nbytes)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple


class Matrices(NamedTuple):
    """The matrix products of a kernel: `products` of them, [rows, inner] by [inner, columns]."""

    products: int
    rows: int
    columns: int
    inner: int


class LaunchCost(NamedTuple):
    """The work of one call."""

    read: int
    """Bytes."""
    written: int
    """Bytes."""
    kind: Literal["product", "attention", "other"] = "other"
    """What its matrices are part of, which decides about their rate."""
    matrices: Matrices | None = None
    """Those that it multiplies. Of attention: the queries by the keys, with `inner` channels."""
    tile: tuple[int, int] = (128, 128)
    """Rows and columns of the products that one program computes; of attention, queries and keys."""
    kernels: int = 1


LAUNCH_COSTS: dict[str, Callable[..., LaunchCost]] = {}
"""Name of an operation, without its library -> its cost, given the arguments of the call."""


def launch_cost(name: str) -> Callable[[Callable[..., LaunchCost]], Callable[..., LaunchCost]]:
    """Declares what calls of `torch.ops.dsrl_async.<name>` cost."""

    def declare(cost: Callable[..., LaunchCost]) -> Callable[..., LaunchCost]:
        LAUNCH_COSTS[name] = cost
        return cost

    return declare
