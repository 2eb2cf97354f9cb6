"""Reads pictures from videos that somebody else may have made: of MP4 files, and nothing that they might refer to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from dsrl_async import untrusted

NEAR = 0.25
"""How far from its time a picture may be, in fractions of the time between two."""
REORDERED = 16
"""So many pictures, at most, stand in a file before one that is shown earlier: the limit of H.264 and H.265."""


def pictures_at(
    path: Path, times: NDArray[np.float64], fps: float, height: int, width: int
) -> Iterator[NDArray[np.uint8]]:
    """The pictures uint8 [height, width, 3] at these rising times in seconds.

    Raises ValueError, naming the file, if one is missing or of another size, or for whatever else is wrong.
    """
    # The format is said here, since FFmpeg would also guess at playlists, which lead to other files.
    with untrusted.opened_for_library(path) as raw, av.open(raw, format="mp4") as container:
        yield from _pictures(container, path, times, fps, (height, width))


def _pictures(
    container: Any, path: Path, times: NDArray[np.float64], fps: float, size: tuple[int, int]
) -> Iterator[NDArray[np.uint8]]:
    if not container.streams.video:
        raise ValueError(f"{path} has no video in it")
    stream = container.streams.video[0]
    context = stream.codec_context
    _check_size(path, (context.height, context.width), size)
    context.thread_count = 1
    # The library goes on from the last picture that needs no other and stands in the file before this time. Where
    # pictures are reordered, that one may be shown later; hence the margin.
    container.seek(max(0, int((times[0] - (REORDERED + 1) / fps) / stream.time_base)), stream=stream)
    found, near = 0, NEAR / fps
    for frame in container.decode(stream):
        if frame.time is None or frame.time < times[found] - near:
            continue
        if frame.time > times[found] + near:
            raise ValueError(f"{path} has no picture at {times[found]:.3f} s")
        _check_size(path, (frame.height, frame.width), size)
        yield frame.to_ndarray(format="rgb24")
        found += 1
        if found == len(times):
            return
    raise ValueError(f"{path} ends before {times[found]:.3f} s, where a picture should be")


def _check_size(path: Path, found: tuple[int, int], declared: tuple[int, int]) -> None:
    if found != declared:
        raise ValueError(
            f"{path} has pictures of {found[1]} x {found[0]} pixels, meta/info.json says {declared[1]} x {declared[0]}"
        )
