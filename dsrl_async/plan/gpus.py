"""What NVIDIA's data sheets say about GPUs, and how long a batch of Pi0 should take on one."""

from __future__ import annotations

from collections.abc import Sequence

from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.roofline import stages

GPUS = {
    "a10": (125, 0.6),
    "a100": (312, 2.04),
    "b200": (2250, 8.0),
    "h100": (989, 3.35),
    "h200": (989, 4.8),
    "l4": (121, 0.3),
    "l40s": (362, 0.864),
    "rtx4090": (165, 1.01),
}
"""TFLOPS of dense bfloat16 products with float32 sums, and TB/s of memory (SXM where there is a choice; the A100 with
80 GB)."""

SUSTAINED = 800 / 989
"""Fraction of the TFLOPS that large products reach: 800 on an H100, as in pi0/roofline.py."""

ABOVE_BOUND = 1.3
"""A batch is assumed to take this many times its bound. No GPU has been timed yet."""


def roofline(gpu: str, policy: Pi0Config, denoise_steps: int, sizes: Sequence[int]) -> dict[int, float]:
    """Seconds that a batch takes, by size: `ABOVE_BOUND` times its bound, with all language slots in use."""
    tera_flops, tera_bytes = GPUS[gpu]
    work = stages(policy, policy.max_token_len, denoise_steps).values()
    return {
        size: ABOVE_BOUND * sum(stage.bound_s(size, SUSTAINED * tera_flops * 1e12, tera_bytes * 1e12) for stage in work)
        for size in sizes
    }
