"""Shapes that the environments, the shared memory and the agent must agree on."""

from __future__ import annotations

SAC_IMAGE_SIZE = 64
"""Height and width in pixels of the image that the SAC agent sees."""


def sac_image_shape(cameras: int = 1) -> tuple[int, int, int]:
    """Shape of that image if the agent sees so many cameras: their pictures are stacked along the channels."""
    return SAC_IMAGE_SIZE, SAC_IMAGE_SIZE, 3 * cameras


AUGMENTATION_NUMBERS = {"none": 0, "crop": 5, "crop_colour": 7}
"""Random numbers that an update draws for each image, by `sac.augmentation`: two for the shift, five for the colours.
`crop` draws three that nobody uses, as it always did, so that a seed goes on meaning the same."""
