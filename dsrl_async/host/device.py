"""Which device the networks run on, and how the shared memory is made known to it."""

from __future__ import annotations

import logging

import torch

from dsrl_async.shm.arena import Arena

logger = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; `cuda:1` and the like become the current device.

    On CUDA, float32 means float32 from then on: what is not in bfloat16 (the SAC agent, and of the policy norms and the
    projections at its ends) is there for its precision, and too small for TF32 to save much time. Raises ValueError
    where there is no CUDA device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        if not torch.cuda.is_available():
            raise ValueError(f"device {name} was asked for, but torch finds no CUDA device; use cpu")
    device = torch.device(name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


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
