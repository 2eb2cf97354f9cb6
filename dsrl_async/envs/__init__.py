"""The environments that a worker steps, behind one chunk-at-a-time protocol.

Nothing here imports torch, and asking for a specification does not import a simulator, so that
processes which only need shapes stay small.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dsrl_async.envs import libero_files


class EnvironmentSpec(NamedTuple):
    """Shapes of what an environment shows and takes."""

    cameras: int
    """Number of images in an observation."""
    image_size: int
    """Height and width in pixels of the images for the policy."""
    state_dim: int
    """Width of the robot state."""
    action_dim: int
    """Width of one action."""
    prompts: tuple[str, ...]
    """All instructions that the environment may show; a task_index is an index into it."""


class ChunkOutcome(NamedTuple):
    """What came of executing one action chunk."""

    steps: int
    """Executed environment steps; fewer than the chunk's length if the episode ended inside it."""
    success_step: int
    """Index within the chunk of the first successful step, -1 if there was none."""
    terminated: bool
    """The episode ended in success."""
    truncated: bool
    """The episode ended because its step limit was reached without success."""


class Environment(Protocol):
    """An environment that executes action chunks and renders only when observed."""

    spec: EnvironmentSpec

    def reset(self, seed: int, number: int = 0) -> int:
        """Starts the episode that `seed` and `number` fully determine; returns its task_index.

        `number` counts the episodes of all actors, for environments that go through their scenes in order.
        """
        ...

    def step_chunk(self, action_chunk: NDArray[np.float32]) -> ChunkOutcome:
        """Executes float32[k, action_dim], stopping early where the episode ends."""
        ...

    def observe(self, images: NDArray[np.uint8], sac_image: NDArray[np.uint8], state: NDArray[np.float32]) -> None:
        """Renders the present moment into the given C-contiguous arrays.

        images uint8[cameras, image_size, image_size, 3], sac_image uint8[64, 64, 3],
        state float32[state_dim].
        """
        ...

    def close(self) -> None:
        """Frees what the simulator holds; the environment cannot be used afterwards."""
        ...


TABLETOP = EnvironmentSpec(
    cameras=2, image_size=64, state_dim=8, action_dim=7, prompts=("put the block on the red plate",)
)
TABLETOP_EPISODE_STEPS = 50
"""Environment steps of an episode where the configuration leaves it open."""


def check_chunk(action_chunk: NDArray[np.float32], action_dim: int) -> None:
    """Raises ValueError unless the chunk is [k, action_dim], with k >= 1, of finite numbers."""
    if action_chunk.ndim != 2 or action_chunk.shape[1] != action_dim or not len(action_chunk):
        raise ValueError(f"an action chunk must have shape [k, {action_dim}] with k >= 1, not {action_chunk.shape}")
    if not np.isfinite(action_chunk).all():
        raise ValueError("the action chunk holds values that are not finite; look at the policy's outputs")


def environment_spec(config: Mapping[str, Any]) -> EnvironmentSpec:
    """The shapes of the environment that `config` (as from `EnvConfig.model_dump()`) names.

    Raises ValueError if there is no environment of that name, or if it is one of LIBERO and that is not installed.
    """
    name = config["name"]
    if name == "tabletop":
        return TABLETOP
    if name not in libero_files.SUITES:
        raise ValueError(f"unknown environment {name!r}; choose one of tabletop, {', '.join(libero_files.SUITES)}")
    names = libero_files.task_names(name)
    prompts = (libero_files.instruction(names[task]) for task in libero_files.selected_tasks(name, config["task_ids"]))
    return EnvironmentSpec(2, config["image_size"], state_dim=8, action_dim=7, prompts=tuple(prompts))


def make_environment(config: Mapping[str, Any]) -> Environment:
    """Builds the environment that `config` (as from `EnvConfig.model_dump()`) describes.

    Raises ValueError if there is no environment of that name, or a setting of it is unknown or does not work here.
    """
    if environment_spec(config) is TABLETOP:
        from dsrl_async.envs.tabletop import TabletopEnvironment

        steps = config["max_episode_steps"]
        return TabletopEnvironment(config["layout"], TABLETOP_EPISODE_STEPS if steps is None else steps)
    from dsrl_async.envs.libero import LiberoEnvironment

    return LiberoEnvironment(config)
