"""What all launches share."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

SHORTEST_BLOCK = 16
"""The smallest side of a tile that Triton's matrix products take."""
ENOUGH_PROGRAMS = 128
"""A launch of at least so many programs keeps a large GPU busy: an A100 has 108 multiprocessors, an H100 132."""


def on_device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(tensor)


def power_of_two(count: int) -> int:
    """The next power of two, which is what a block's side must be."""
    return int(triton.next_power_of_2(count))


def contiguous(**tensors: Tensor) -> None:
    """The kernels take rows that lie one behind the other."""
    for name, tensor in tensors.items():
        assert tensor.is_contiguous(), f"{name} must be contiguous"
