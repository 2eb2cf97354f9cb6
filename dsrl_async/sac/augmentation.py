"""Image augmentation of training batches: random shift and colour jitter.

Random numbers are arguments, so both functions are deterministic and can be captured.
"""

from __future__ import annotations

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.2, 0.1, 0.1, 0.03
"""Largest changes: of brightness (added), contrast and saturation (factor - 1) and hue (added, in turns), as in
official DSRL (dsrl_pi0, `jaxrl2/data/augmentations.py`)."""
PROBABILITY = 0.8
"""Probability that an image's colours are changed at all, as there."""


def random_shift(image: Tensor, uniform: Tensor, pad: int) -> Tensor:
    """Shift each image by a random whole number of pixels in [-pad, pad] in each direction.

    This equals padding by `pad` with the edge pixels and cropping the original size at a random place (DrQ, Kostrikov
    et al. 2020). All cameras of an image are shifted alike.

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
    """Change the brightness, contrast, saturation and hue of each image by random amounts, in this order.

    All cameras of an image are changed alike. Official DSRL does the same in a random order, and rounds the result to
    whole pixel values.

    Args:
        pixels: fp32 [B, 3 * cameras, H, W] in [0, 1], in channels-last memory format.
        uniform: fp32 [B, 5] in [0, 1]: one for each kind of change, 0.5 meaning none; and the last one, above
            `PROBABILITY`, leaves the image as it is.

    Returns:
        fp32 [B, 3 * cameras, H, W] in [0, 1], in channels-last memory format.
    """
    before = pixels.permute(0, 2, 3, 1).unflatten(3, (-1, 3))  # [B, H, W, cameras, 3]
    *changes, applied = uniform[:, :, None, None, None, None].unbind(1)
    brightness, contrast, saturation, hue = (2 * change - 1 for change in changes)
    after = (before + brightness * BRIGHTNESS).clamp_(0, 1)
    after = torch.lerp(after.mean(dim=(1, 2), keepdim=True), after, 1 + contrast * CONTRAST).clamp_(0, 1)
    after = _recolour(after, 1 + saturation[..., 0] * SATURATION, hue[..., 0] * HUE)
    return torch.where(applied <= PROBABILITY, after, before).flatten(3).permute(0, 3, 1, 2)


def _recolour(rgb: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Multiply the saturation by a factor and turn the hue, in the HSV model: fp32 [..., 3] in [0, 1], both ways.

    `saturation` and `hue` (in turns) are broadcast over all but the last dimension. Saturation is chroma / value, and
    cannot exceed 1. An angle is counted in sixths of a turn from red; a channel is the value where it is within one
    sixth of its own angle, and lacks the chroma where it is further than two away.
    """
    value, chroma = rgb.amax(-1), rgb.amax(-1) - rgb.amin(-1)
    divisor = torch.where(chroma > 0, chroma, 1.0)
    red, green, blue = rgb.unbind(-1)
    of_red, of_green, of_blue = (green - blue) / divisor, (blue - red) / divisor + 2, (red - green) / divisor + 4
    angle = torch.where(value == red, of_red, torch.where(value == green, of_green, of_blue)) + 6 * hue
    chroma = torch.minimum(chroma * saturation, value)
    channels = []
    for own in (0, 2, 4):
        distance = ((angle - own + 3).remainder(6) - 3).abs_()
        channels.append(value - chroma * (distance - 1).clamp_(0, 1))
    return torch.stack(channels, dim=-1)
