"""The order in which other processes see what one of them writes: the one barrier of the shared memory.

Nothing in it is locked. What is written there is *published* by a number that is written after it: a request, an
answer, a lane's `head`, a count. A reader reads the number first. Both need the machine to keep that order, so
`barrier` stands before every store of such a number and after every load of one, and where what was published is about
to be overwritten (docs/design.md has the list).

x86-64 keeps the order by itself (total store order), and Python does not rearrange a program, so there `barrier` does
nothing. Other machines, ARM above all, need an instruction for it: C's `atomic_thread_fence(memory_order_seq_cst)`, out
of GCC's libatomic.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable

IN_ORDER = ("x86_64", "amd64")
"""Machines, as `platform.machine` names them, in lower case, that keep the order of stores and that of loads."""
LIBRARY = "libatomic.so.1"
SEQ_CST = 5
"""C's `memory_order_seq_cst`."""


def _nothing() -> None:
    """The barrier of a machine that keeps the order."""


def _missing() -> None:
    raise ValueError(
        f"this machine ({platform.machine()}) may reorder what is written to shared memory, and the barrier against it "
        f"is in {LIBRARY}, which cannot be loaded; install it (Debian and Ubuntu: libatomic1; Fedora: libatomic)"
    )


def barrier_of(machine: str) -> Callable[[], object]:
    """Return the barrier for a kind of machine: nothing that was read or written before it is seen after it."""
    if machine.lower() in IN_ORDER:
        return _nothing
    try:
        # Not CDLL, which would let other threads in at every call.
        fence = ctypes.PyDLL(LIBRARY).atomic_thread_fence
    except (OSError, AttributeError):
        return _missing
    fence.argtypes, fence.restype = (ctypes.c_int,), None
    return functools.partial(fence, SEQ_CST)


barrier = barrier_of(platform.machine())
"""All loads and stores before a call come before all those after it, as any other process sees them. Raises ValueError
with one sentence where the machine needs a barrier and has none; `Arena.create` calls it first."""


def warning(machine: str) -> str | None:
    """What to say of a kind of machine at the start of a run, if anything."""
    if machine.lower() in IN_ORDER:
        return None
    return f"dsrl_async has not been tried on {machine} yet; the shared memory's barriers are those of {LIBRARY}"
