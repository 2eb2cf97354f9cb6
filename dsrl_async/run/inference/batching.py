"""How many of the waiting observations go into the next batch, how large it is, and how long to wait for more of them.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

FEWEST_USED_ROWS = 0.9
"""A batch is padded only when so large a share of its rows is used (docs/measurements/throughput.md)."""

CPU_BATCH_WAIT_S = 0.001


def batch_wait_s(milliseconds: float | None, on_cpu: bool) -> float:
    """Seconds to wait for a fuller batch, where `inference.batch_wait_ms` is `milliseconds` (null: by the device).

    The workers need a CPU's cores to get ready; a GPU's next batch takes whoever comes meanwhile.
    """
    if milliseconds is not None:
        return milliseconds / 1e3
    return CPU_BATCH_WAIT_S if on_cpu else 0.0


def choose_batch(ready: int, sizes: Sequence[int]) -> tuple[int, int]:
    """(observations to take, batch size) for `ready` >= 1 waiting observations and the increasing batch `sizes`.

    Where the device's time grows with the batch, padding costs as much as work. So a batch that would be padded by much
    is made smaller instead, to a size that is filled, and the rest comes next.
    """
    ready = min(ready, sizes[-1])
    larger = next(size for size in sizes if size >= ready)
    smaller = max((size for size in sizes if size <= ready), default=larger)
    if smaller > ready or ready >= FEWEST_USED_ROWS * larger:
        return ready, larger
    return smaller, smaller
