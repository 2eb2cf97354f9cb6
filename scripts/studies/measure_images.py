"""Rotating and resizing camera images: PIL in the environment worker against one batched torch kernel.

    python scripts/studies/measure_images.py

Prints JSON lines with milliseconds of one core per observation (two 256x256 cameras to 224x224; medians of interleaved
repeats) and with the difference of torch's result from PIL's.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dsrl_async.envs.images import libero_image

CAMERAS, FRAME, SIZE, REPEATS = 2, 256, 224, 15
BATCHES = (1, 8, 16)


def with_pil(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.stack([libero_image(frame, SIZE) for frame in frames])


def with_torch(frames: NDArray[np.uint8], dtype: torch.dtype) -> Tensor:
    images = torch.from_numpy(frames).flip(1, 2).permute(0, 3, 1, 2).to(dtype)
    resized = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def natural_frames(count: int) -> NDArray[np.uint8]:
    """Images with edges and gradients at all scales, like renderings."""
    generator = np.random.default_rng(0)
    frames = np.zeros((count, FRAME, FRAME, 3))
    for size in (4, 16, 64, 256):
        coarse = generator.uniform(0, 64, (count, size, size, 3))
        frames += coarse.repeat(FRAME // size, axis=1).repeat(FRAME // size, axis=2)
    return frames.astype(np.uint8)


def emit(case: str, system: str, metric: str, value: float, unit: str) -> None:
    line = {"benchmark": "images", "case": case, "system": system, "metric": metric, "value": value, "unit": unit}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    systems: dict[str, Callable[[NDArray[np.uint8]], object]] = {
        "pil": with_pil,
        "torch_uint8": lambda frames: with_torch(frames, torch.uint8),
        "torch_float32": lambda frames: with_torch(frames, torch.float32),
    }
    for batch in BATCHES:
        frames = natural_frames(batch * CAMERAS)
        times: dict[str, list[float]] = {name: [] for name in systems}
        for _ in range(REPEATS):
            for name, function in systems.items():
                begin = time.perf_counter()
                function(frames)
                times[name].append((time.perf_counter() - begin) * 1000 / batch)
        for name, values in times.items():
            emit(f"batch_{batch}", name, "time_per_observation", round(statistics.median(values), 4), "ms")
    frames = natural_frames(16)
    expected = with_pil(frames).astype(np.int16)
    for name, dtype in (("torch_uint8", torch.uint8), ("torch_float32", torch.float32)):
        difference = np.abs(with_torch(frames, dtype).numpy().astype(np.int16) - expected)
        emit("accuracy", name, "largest_difference", int(difference.max()), "levels")
        emit("accuracy", name, "pixels_that_differ", round(float((difference > 0).mean()), 5), "fraction")
