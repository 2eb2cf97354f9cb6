"""Image augmentation of training batches: random shift and colour jitter.

Random numbers are arguments, so both functions are deterministic and can be captured.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Largest changes of brightness (added), contrast and saturation (factor - 1), as in the official DSRL code.
BRIGHTNESS, CONTRAST, SATURATION = 0.2, 0.1, 0.1


def random_shift(image: Tensor, uniform: Tensor, pad: int) -> Tensor:
    """Shift each image by a random whole number of pixels in [-pad, pad] in each direction.

    This equals padding by `pad` with the edge pixels and cropping the original size at a random place (DrQ, Kostrikov
    et al. 2020).

    Args:
        image: uint8 [B, H, W, C].
        uniform: fp32 [B, 2] in [0, 1], for rows and columns.
        pad: largest shift in pixels.

    Returns:
        uint8 [B, H, W, C] where output[y, x] = image[clamp(y + dy), clamp(x + dx)].
    """
    batch, height, width, _ = image.shape
    count = 2 * pad + 1
    # A uniform number that was rounded up to 1 would give `count`, one above the largest index.
    offset = (uniform * count).long().clamp_(max=count - 1) - pad
    row_index = torch.arange(height, device=image.device)
    column_index = torch.arange(width, device=image.device)
    rows = (row_index + offset[:, :1]).clamp_(0, height - 1)
    columns = (column_index + offset[:, 1:]).clamp_(0, width - 1)
    sample = torch.arange(batch, device=image.device)
    return image[sample[:, None, None], rows[:, :, None], columns[:, None, :]]


def colour_jitter(pixels: Tensor, uniform: Tensor) -> Tensor:
    """Change the brightness, contrast and saturation of each image by random amounts, in this order.

    Args:
        pixels: fp32 [B, 3, H, W] in [0, 1].
        uniform: fp32 [B, 3] in [0, 1], one per kind of change; 0.5 means none.

    Returns:
        fp32 [B, 3, H, W] in [0, 1].
    """
    centred = (2 * uniform - 1)[:, :, None, None, None].unbind(1)
    brightness, contrast, saturation = (
        centred[0] * BRIGHTNESS,
        1 + centred[1] * CONTRAST,
        1 + centred[2] * SATURATION,
    )
    pixels = (pixels + brightness).clamp_(0, 1)
    pixels = torch.lerp(pixels.mean(dim=(2, 3), keepdim=True), pixels, contrast).clamp_(0, 1)
    return torch.lerp(pixels.mean(dim=1, keepdim=True), pixels, saturation).clamp_(0, 1)
