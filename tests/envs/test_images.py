"""Camera images as openpi prepares them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dsrl_async.envs.images import libero_image, resize_with_pad, write_agent_image


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_square_images_are_resized_by_pil() -> None:
    image = random_image(256, 256)
    expected = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BILINEAR))
    assert np.array_equal(resize_with_pad(image, 224), expected)


def test_shrinking_averages_over_what_a_pixel_covers() -> None:
    image = random_image(256, 256)
    channels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = F.interpolate(channels, (224, 224), mode="bilinear", antialias=True).round()[0].permute(1, 2, 0).numpy()
    assert np.abs(resize_with_pad(image, 224) - expected).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(360, 360), (256, 256), (100, 200), (37, 30)])
def test_without_antialias_it_is_torchs_bilinear_filter(height: int, width: int) -> None:
    image = random_image(height, width)
    channels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    scale = 64 / max(height, width)
    size = int(height * scale), int(width * scale)
    expected = F.interpolate(channels, size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()
    top, left = ((64 - side) // 2 for side in size)
    out = resize_with_pad(image, 64, antialias=False)[top : top + size[0], left : left + size[1]]
    assert np.abs(out - expected).max() <= 0.501
    assert np.abs(resize_with_pad(image, 64)[top : top + size[0], left : left + size[1]] - expected).max() > 5 or (
        height < 64
    )


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(120, 240, (16, 48, 0, 64)), (240, 120, (0, 64, 16, 48)), (30, 31, (1, 62, 0, 64)), (64, 64, (0, 64, 0, 64))],
)
def test_aspect_is_kept_and_the_rest_is_black(height: int, width: int, box: tuple[int, int, int, int]) -> None:
    white = np.full((height, width, 3), 255, dtype=np.uint8)
    out = resize_with_pad(white, 64)
    assert out.shape == (64, 64, 3)
    top, bottom, left, right = box
    assert (out[top:bottom, left:right] == 255).all()
    assert out.astype(int).sum() == 255 * 3 * (bottom - top) * (right - left)


def test_the_agents_cameras_are_stacked_along_the_channels() -> None:
    frames = [random_image(256, 256), random_image(64, 64), random_image(48, 80)]
    seen = np.full((64, 64, 9), 77, np.uint8)
    write_agent_image(seen, frames)
    for place, frame in enumerate(frames):
        assert np.array_equal(seen[:, :, 3 * place : 3 * place + 3], resize_with_pad(frame, 64))


def test_libero_images_are_turned_by_180_degrees() -> None:
    frame = random_image(8, 8)
    assert np.array_equal(libero_image(frame, 8), np.rot90(frame, 2))
    assert np.array_equal(libero_image(frame, 4), resize_with_pad(np.rot90(frame, 2).copy(), 4))
