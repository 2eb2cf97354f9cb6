"""Which device the networks run on, and how the shared memory is made known to it."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch


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


MAPPED = 2
"""cudaHostRegisterMapped: kernels may read the memory, too."""


def register_memory(address: int, size: int, device: torch.device) -> None:
    """Page-lock whole pages of this process's memory, so that copies to `device` run from there asynchronously.

    They stay so until the process ends. Raises RuntimeError with CUDA's reason. (Has not run on a GPU yet.)
    """
    with torch.cuda.device(device):
        cudart = torch.cuda.cudart()
        status = cudart.cudaHostRegister(address, size, MAPPED)
        if status != cudart.cudaError.success:
            # CUDA keeps the error, and torch would raise it after some later launch. It has no call that only forgets
            # it, but it does so after a launch, by raising it.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=device)
            raise RuntimeError(cudart.cudaGetErrorString(status))
