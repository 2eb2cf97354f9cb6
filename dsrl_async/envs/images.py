"""Camera images, prepared as published LIBERO evaluations do it, and what the agent sees of them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsrl_async.config.shapes import SAC_IMAGE_SIZE


def write_agent_image(sac_image: NDArray[np.uint8], frames: Iterable[NDArray[np.uint8]]) -> None:
    """Writes what the SAC agent sees into uint8 [64, 64, 3 * n], for an environment's `observe`.

    `frames` are the pictures of the agent's n cameras, uint8 [height, width, 3] of any size, in the order of
    `sac.cameras`; where nothing larger than the policy's was rendered, that is `images[list(agent_cameras)]`. They are
    resized by `resize_with_pad` and stacked along the channels.
    """
    for place, frame in enumerate(frames):
        sac_image[:, :, 3 * place : 3 * place + 3] = resize_with_pad(frame, SAC_IMAGE_SIZE)


def resize_with_pad(image: NDArray[np.uint8], size: int, antialias: bool = True) -> NDArray[np.uint8]:
    """uint8 [height, width, 3] -> [size, size, 3], scaled to fit and centred on black.

    The filter is PIL's bilinear one, as in openpi's client, which averages over the area of a new pixel. Without
    `antialias` it is that of openpi's PyTorch model and of LeRobot (`resize_with_pad_torch`), which mixes four pixels;
    they leave the result as a float, here it is rounded. An image that already has the size is returned unchanged.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    ratio = max(width, height) / size
    new_width, new_height = int(width / ratio), int(height / ratio)
    if antialias:
        resized = np.asarray(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR))
    else:
        rows = _between(image.astype(np.float32), new_height)
        resized = np.rint(_between(rows.swapaxes(0, 1), new_width).swapaxes(0, 1)).astype(np.uint8)
    canvas = np.zeros((size, size, 3), dtype=np.uint8)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    canvas[top : top + new_height, left : left + new_width] = resized
    return canvas


def _between(rows: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """[n, ...] -> [count, ...], where each row mixes the two rows on either side of its centre."""
    centres = np.clip((np.arange(count) + 0.5) * len(rows) / count - 0.5, 0, len(rows) - 1)
    before = centres.astype(np.int64)
    share = (centres - before).astype(np.float32)[:, None, None]
    mixed: NDArray[np.float32] = rows[before] * (1 - share) + rows[np.minimum(before + 1, len(rows) - 1)] * share
    return mixed


def libero_image(frame: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """A frame uint8 [height, width, 3] as LIBERO renders it, turned by 180 degrees and resized."""
    return resize_with_pad(np.ascontiguousarray(frame[::-1, ::-1]), size)
