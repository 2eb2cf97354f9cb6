"""Camera images as openpi's LIBERO evaluation prepares them, with PIL itself. No torch here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def resize_with_pad(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """uint8 [height, width, 3] -> [size, size, 3]: scaled to fit, centred on black.

    The filter is PIL's bilinear one, which averages over what a new pixel covers. An image that has the size already
    is returned as it is.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    ratio = max(width, height) / size
    new_width, new_height = int(width / ratio), int(height / ratio)
    resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
    canvas = np.zeros((size, size, 3), dtype=np.uint8)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    canvas[top : top + new_height, left : left + new_width] = np.asarray(resized)
    return canvas


def libero_image(frame: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """LIBERO's rendering uint8 [height, width, 3], which is upside down, turned by 180 degrees and resized."""
    return resize_with_pad(np.ascontiguousarray(frame[::-1, ::-1]), size)
