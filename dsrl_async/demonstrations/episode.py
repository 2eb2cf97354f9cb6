"""A demonstration as a run takes it, whichever file it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsrl_async.untrusted import shown

MOST_FRAMES = 100_000
"""Upper limit on the frames of an episode."""


class Wanted(NamedTuple):
    """What the run's environment shows and takes."""

    cameras: int
    state_dim: int
    action_dim: int
    prompts: tuple[str, ...]
    turned: bool = False
    """Whether the environment turns LIBERO's pictures by 180 degrees."""
    camera_keys: tuple[str, ...] | None = None
    """What the cameras are called in a LeRobotDataset, in the environment's order; None if nobody has said."""


class Demonstration(NamedTuple):
    """An episode of T frames that succeeds; frame t is what is seen before action t."""

    place: str
    """The file, and the episode in it, for messages."""
    state: NDArray[np.float32]
    """[T, state_dim]"""
    action: NDArray[np.float32]
    """[T, action_dim], what was executed."""
    success: int
    """The frame of the first action that led to success."""
    task_index: int
    """Number of the instruction among the environment's."""
    pictures: Callable[[int], Iterable[Iterable[NDArray[np.uint8]]]]
    """For the first n frames, one after the other, each camera's picture, uint8 [height, width, 3] of any size."""


def task_index(wanted: Wanted, instruction: str | None, place: str) -> int:
    """The number of an instruction, which a file with one task need not say; raises ValueError if there is none."""
    if (found := find_task(wanted, instruction)) is not None:
        return found
    if instruction is None:
        raise ValueError(
            f"{place} does not say which of the environment's {len(wanted.prompts)} instructions it is of; add it to "
            "the file (docs/demonstrations.md)"
        )
    raise ValueError(
        f"{place} has the instruction {shown(instruction)}, which is none of the environment's {len(wanted.prompts)}; "
        "choose others, or its task"
    )


def find_task(wanted: Wanted, instruction: str | None) -> int | None:
    """As `task_index`, but None if the environment has no such task."""
    prompts = [_plain(prompt) for prompt in wanted.prompts]
    if instruction is None:
        return 0 if len(prompts) == 1 else None
    plain = _plain(instruction)
    return prompts.index(plain) if plain in prompts else None


def _plain(instruction: str) -> str:
    return " ".join(instruction.strip(' "[].').lower().replace("_", " ").split())


def first_success(success: NDArray[np.bool_], place: str) -> int:
    """The first frame that is marked; raises ValueError if none is."""
    marked = np.flatnonzero(success)
    if not len(marked):
        raise ValueError(f"{place} never succeeds, and only demonstrations that do are learned from; leave it out")
    return int(marked[0])


def check_numbers(values: NDArray[np.generic], shape: tuple[int, ...], what: str) -> NDArray[np.float32]:
    """The same as float32; raises ValueError unless they are finite numbers of this shape."""
    if values.dtype.kind not in "fiu" or values.shape != shape:
        raise ValueError(f"{what} must be numbers of shape {list(shape)}, not {values.dtype} of {list(values.shape)}")
    numbers = values.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{what} has numbers that are not finite")
    return numbers
