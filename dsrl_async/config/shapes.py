"""Shapes that the environments, the shared memory and the agent must agree on."""

from __future__ import annotations

SAC_IMAGE_SIZE = 64
"""Height and width in pixels of the image that the SAC agent sees."""


def sac_image_shape(cameras: int = 1) -> tuple[int, int, int]:
    """Shape of that image if the agent sees so many cameras: their pictures are stacked along the channels."""
    return SAC_IMAGE_SIZE, SAC_IMAGE_SIZE, 3 * cameras
