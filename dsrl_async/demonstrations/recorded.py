"""What `dsrl_async.pretraining.make_tabletop_demonstrations --task` writes: safetensors, episode after episode.

Fields, for all F frames: `images` uint8 [F, cameras, size, size, 3], `state` [F, state_dim], `action` [F, action_dim],
`episode` int [F], equal in the frames of an episode and rising, and `success` bool [F], where an action led to success.
The metadata may have the `instruction` of all episodes, and must where the environment has several.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from dsrl_async import untrusted
from dsrl_async.demonstrations.episode import (
    MOST_FRAMES,
    Demonstration,
    Wanted,
    check_numbers,
    first_success,
    task_index,
)

FIELDS = ("images", "state", "action", "episode", "success")


def read(path: Path, wanted: Wanted) -> Iterator[Demonstration]:
    """See `demonstrations.read`."""
    untrusted.check_regular(path)
    try:
        with safe_open(path, "numpy") as file:
            yield from _episodes(path, file, wanted)
    except ValueError:
        raise
    except Exception as error:  # whatever safetensors may say
        raise ValueError(f"{path} cannot be read: {untrusted.in_one_line(error)}") from error


def _episodes(path: Path, file: safe_open, wanted: Wanted) -> Iterator[Demonstration]:
    if missing := sorted(set(FIELDS) - set(file.keys())):
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; record demonstrations of a task: "
            "python -m dsrl_async.pretraining.make_tabletop_demonstrations --task LAYOUT"
        )
    images = file.get_slice("images")
    shape = images.get_shape()
    frames = shape[0] if shape else 0
    if len(shape) != 5 or images.get_dtype() != "U8" or shape[4] != 3 or 0 in shape:
        raise ValueError(f"{path}: images must be uint8 of shape [frames, cameras, height, width, 3], not {shape}")
    if shape[1] != wanted.cameras:
        raise ValueError(f"{path} has pictures of {shape[1]} cameras, the environment has {wanted.cameras}")
    state = check_numbers(file.get_tensor("state"), (frames, wanted.state_dim), f"{path}: state")
    action = check_numbers(file.get_tensor("action"), (frames, wanted.action_dim), f"{path}: action")
    episode, success = file.get_tensor("episode"), file.get_tensor("success")
    if episode.shape != (frames,) or episode.dtype.kind not in "iu" or (np.diff(episode) < 0).any():
        raise ValueError(f"{path}: episode must be {frames} whole numbers that never fall")
    if success.shape != (frames,) or success.dtype != np.bool_:
        raise ValueError(f"{path}: success must be {frames} times true or false")
    starts = np.flatnonzero(np.diff(episode, prepend=episode[0] - 1))
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), frames], strict=True):
        place = f"{path}: episode {int(episode[start])}"
        if end - start > MOST_FRAMES:
            raise ValueError(f"{place} has {end - start} frames; {MOST_FRAMES} can be read")
        yield Demonstration(
            place,
            state[start:end],
            action[start:end],
            first_success(success[start:end], place),
            task_index(wanted, (file.metadata() or {}).get("instruction"), str(path)),
            functools.partial(_pictures, images, start),
        )


def _pictures(images: Any, start: int, count: int) -> NDArray[np.uint8]:
    part: NDArray[np.uint8] = images[start : start + count]
    return part
