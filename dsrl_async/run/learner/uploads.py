"""Page-locked memory through which arrays go to a GPU while it computes.

Nothing here has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SETS = 2
"""How many uploads can be on their way."""


class _Set(NamedTuple):
    """Buffers of an upload on both sides."""

    host: list[Tensor]
    device: list[Tensor]
    arrived: torch.cuda.Event
    """The device has what is in `host`. A wait for it sleeps: the workers need the core."""
    used: torch.cuda.Event
    """The device has done with what is in `device`."""


class Uploads:
    """Takes turns between `SETS` of buffers, and copies on a stream of its own.

    So neither the host nor a copy waits for what the device was given to compute: only the host, before it overwrites a
    buffer, for the copy from it; that copy for what used the set before; and what uses it now for that copy.

    Args:
        like: a tensor for each buffer, of its shape and dtype.
        device: where there is no CUDA, nothing is copied.
    """

    def __init__(self, like: Sequence[Tensor], device: torch.device) -> None:
        self._turn = 0
        self._buffers = [tensor.new_zeros(tensor.shape, device="cpu") for tensor in like]
        self._sets: list[_Set] = []
        if device.type != "cuda":
            return
        self._stream = torch.cuda.Stream(device)
        for _ in range(SETS):
            host = [buffer.pin_memory() for buffer in self._buffers]
            there = [buffer.new_zeros(buffer.shape, device=device) for buffer in self._buffers]
            self._sets.append(_Set(host, there, torch.cuda.Event(blocking=True), torch.cuda.Event()))
        self._stream.wait_stream(torch.cuda.current_stream(device))  # which fills the new buffers with zeros

    def buffers(self) -> list[Tensor]:
        """On the host, to be filled: waits until the device has what was in them."""
        if not self._sets:
            return self._buffers
        self._turn = (self._turn + 1) % SETS
        self._sets[self._turn].arrived.synchronize()
        return self._sets[self._turn].host

    def send(self, counts: Sequence[int]) -> list[Tensor]:
        """The first `counts` of each buffer, on the device, for what the current stream is given up to `end`."""
        if not self._sets:
            return [buffer[:count] for buffer, count in zip(self._buffers, counts, strict=True)]
        host, device, arrived, used = self._sets[self._turn]
        there = [buffer[:count] for buffer, count in zip(device, counts, strict=True)]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(used)
            for target, source in zip(there, host, strict=True):
                target.copy_(source[: len(target)], non_blocking=True)
            arrived.record()
        torch.cuda.current_stream().wait_event(arrived)
        return there

    def end(self) -> None:
        """What was sent is not used by anything that the current stream is given from now on."""
        if self._sets:
            self._sets[self._turn].used.record()
