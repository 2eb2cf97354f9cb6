"""GPUs that are not there, as torch would find them. Imports no torch."""

from __future__ import annotations

from typing import Any


def found_gpus(*free_bytes: int, total_bytes: int = 80 << 30) -> dict[str, Any]:
    """What `probe.cuda_devices` answers where torch finds GPUs with so much free memory."""
    count = len(free_bytes)
    return {
        "devices": count,
        "free_bytes": free_bytes,
        "total_bytes": count * (total_bytes,),
        "faults": count * ("",),
        "reason": "",
    }
