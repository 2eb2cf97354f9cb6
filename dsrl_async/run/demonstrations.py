"""The rows that a run makes of demonstrations: how they are cut into decisions, and the file that keeps them.

    <run>/demonstrations.safetensors    the rows as they lie in shared memory, written once, before anything learns

They are not in the checkpoints, since they never change; a resume takes them from here and asks for no other file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsrl_async import demonstrations, untrusted
from dsrl_async.config.settings import Config
from dsrl_async.demonstrations import Demonstration, Wanted
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.run import checkpoints
from dsrl_async.shm.replay import ReplayRing

FILE = "demonstrations.safetensors"


class Count(NamedTuple):
    """How much there is in the files."""

    episodes: int
    decisions: int
    rows: int
    """Those of decisions, and a closing one of each sequence."""


class Decision(NamedTuple):
    """A demonstrated decision, by frames of its episode."""

    frame: int
    steps: int
    """Environment steps that were executed until the next one, or the success."""
    success_step: int
    """Which of them succeeded, -1 if none."""
    following: int
    """The frame that was seen next; after the last one recorded, that one again, which nobody asks what it is worth."""


def rows_path(run_dir: Path) -> Path:
    return run_dir / FILE


def wanted_of(config: Config, spec: EnvironmentSpec) -> Wanted:
    keys = config.replay.demonstration_cameras
    return Wanted(
        spec.cameras,
        spec.state_dim,
        spec.action_dim,
        spec.prompts,
        config.env.rotate_images,
        None if keys is None else tuple(keys),
    )


def read_all(config: Config, spec: EnvironmentSpec) -> Iterator[Demonstration]:
    """The demonstrations of all files; raises ValueError with one sentence for whatever is wrong with one."""
    for path in config.replay.demonstrations or ():
        yield from demonstrations.read(Path(path), wanted_of(config, spec))


def count(config: Config, spec: EnvironmentSpec) -> Count:
    """Reads all but the pictures; raises ValueError as `read_all`."""
    episodes = decisions = rows = 0
    for demonstration in read_all(config, spec):
        cut = sequences(len(demonstration.state), demonstration.success, config.env.chunk)
        episodes += 1
        decisions += sum(map(len, cut))
        rows += sum(len(sequence) + 1 for sequence in cut)
    return Count(episodes, decisions, rows)


def sequences(frames: int, success: int, chunk: int) -> list[list[Decision]]:
    """All ways of cutting an episode into decisions of `chunk` steps, up to its success: one for each frame that the
    first decision can be at, so that every frame has a decision."""
    cut = []
    for first in range(min(chunk, success + 1)):
        cut.append(
            [
                Decision(
                    frame,
                    steps := min(chunk, success + 1 - frame),
                    success - frame if frame + chunk > success else -1,
                    min(frame + steps, frames - 1),
                )
                for frame in range(first, success + 1, chunk)
            ]
        )
    return cut


def chunk_of(action: NDArray[np.float32], frames: Sequence[int], horizon: int) -> NDArray[np.float32]:
    """[n, horizon, action_dim]: the actions from each frame on; behind the last one that again.

    What a decision does not execute is what the demonstrator did next: a policy that imitates such episodes was trained
    to give that, and a chunk that it can give is one whose noise there is.
    """
    index = np.asarray(frames)[:, None] + np.arange(horizon)
    return action[np.minimum(index, len(action) - 1)]


def load_rows(run_dir: Path, ring: ReplayRing, tasks: int) -> tuple[int, int]:
    """Fill the ring with the rows of the run, whose environment has so many instructions.

    Returns the number of decisions whose noise was found, and of all. Raises ValueError with one sentence if the rows
    do not fit the ring.
    """
    path = rows_path(run_dir)
    untrusted.check_regular(path)
    rows = checkpoints.read_lane(path, ring, tasks)
    ring.import_rows(0, rows)
    return int(rows["near"].sum()), int((rows["steps"] > 0).sum())


def count_rows(run_dir: Path) -> int | None:
    """How many rows the run has made already; None if it has made none. Raises ValueError if the file is damaged."""
    path = rows_path(run_dir)
    if not path.is_file():
        return None
    untrusted.check_regular(path)
    from safetensors import safe_open

    try:
        with safe_open(path, "numpy") as file:
            shape = file.get_slice("complete").get_shape()
            return int(shape[0])
    except Exception as error:  # whatever safetensors may say
        raise ValueError(f"{path} cannot be read: {untrusted.in_one_line(error)}; start a new run") from error
