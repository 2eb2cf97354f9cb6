"""Which device the networks run on, and how the shared memory is made known to it."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch

from dsrl_async.shm.arena import Arena

logger = logging.getLogger(__name__)


def resolve_device(name: str, tf32: bool = False) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; `cuda:1` and the like become the current device.

    On CUDA, float32 means float32 from then on, for all of the process, or with `tf32` what tensor cores make of it:
    of the policy only norms and the projections at its ends are float32, for their precision. Raises ValueError where
    there is no CUDA device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError(f"device {name} was asked for, but torch finds no CUDA device; use cpu")
        set_float32_precision(tf32)
    device = torch.device(name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def set_float32_precision(tf32: bool) -> None:
    """Say whether matrix products and convolutions of float32 on CUDA may round their inputs to the 10 bits of TF32.

    torch has an older setting beside each `fp32_precision`, which it still reads itself, in `cudnn.flags` and where
    torch.compile makes kernels of its own; it raises an error there unless the two agree.
    """
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn  # torch's stubs do not know all of these
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32")
        cuda.matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    for operations in (cuda.matmul, cudnn.conv, cudnn.rnn):
        operations.fp32_precision = "tf32" if tf32 else "ieee"


def register_memory(arena: Arena, device: torch.device) -> bool:
    """Page-lock the shared memory for CUDA, so that copies to the device run from it at full speed, asynchronously.

    Returns False, and logs why, where that is not to be had; copies then wait for their end. Registration is per
    process and ends with it. (Has not run on a GPU yet.)
    """
    if device.type != "cuda":
        return False
    try:
        import cupy

        cupy.cuda.runtime.hostRegister(arena.address, arena.size, 0)
    except Exception as error:  # no cupy, or cupy's own exception types
        logger.warning("the shared memory is not page-locked, transfers will be slower: %s", error)
        return False
    return True
