"""What an environment does, chunk by chunk, and what is known of it without making it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Settings = Mapping[str, Any]
"""The section `env` of a configuration, as from `EnvConfig.model_dump()`."""


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

    @classmethod
    def of_plain(cls, values: Sequence[Any]) -> EnvironmentSpec:
        """The spec of which these are the values, as they come out of JSON."""
        cameras, image_size, state_dim, action_dim, prompts = values
        return cls(cameras, image_size, state_dim, action_dim, tuple(prompts))


class ChunkOutcome(NamedTuple):
    """What came of executing one action chunk."""

    steps: int
    """Executed environment steps; fewer than the chunk's length if the episode ended inside it."""
    success_step: int
    """Index within the chunk of the first successful step, -1 if there was none."""
    terminated: bool
    """Nothing follows: the episode ended in success, or failed for good (then `success_step` is -1)."""
    truncated: bool
    """The episode ended without success where it could have gone on, such as at its step limit."""
    rewards: Sequence[float] = ()
    """The environment's own reward of each executed step. Empty if it knows no other than success: 1 for the successful
    step and 0 for the others."""

    @property
    def success(self) -> bool:
        """Whether the episode ended in success."""
        return self.terminated and self.success_step >= 0


class Environment(Protocol):
    """An environment that executes action chunks and renders only when observed."""

    spec: EnvironmentSpec

    def reset(self, seed: int, number: int = 0) -> int:
        """Starts the episode that `seed` and `number` fully determine; returns its task_index.

        `number` counts the episodes of all lanes, for environments that go through their scenes in order.
        """
        ...

    def step_chunk(self, action_chunk: NDArray[np.float32]) -> ChunkOutcome:
        """Executes float32[k, action_dim], stopping early where the episode ends."""
        ...

    def observe(self, images: NDArray[np.uint8], sac_image: NDArray[np.uint8], state: NDArray[np.float32]) -> None:
        """Renders the present moment into the given C-contiguous arrays.

        images uint8[cameras, image_size, image_size, 3], sac_image uint8[64, 64, 3 * n], state float32[state_dim].
        `images.write_agent_image` makes sac_image from the pictures of the n cameras that the agent sees, whose numbers
        the environment was made with.
        """
        ...

    def close(self) -> None:
        """Frees what the simulator holds; the environment cannot be used afterwards."""
        ...


@runtime_checkable
class NumberedScenes(Protocol):
    """An environment whose suite numbers its scenes."""

    def number_scenes(self) -> None:
        """From now on the number of an episode is the number of its scene, as evaluations count them: through all
        initial states of all tasks of the suite."""
        ...


class UserSimulation(Protocol):
    """What a user's environment does: as `Environment`, but that nobody has to count its steps or think of the agent.

    The worker ends an episode after its steps, and makes what the agent sees from the images. Films show what a method
    `render(size, camera)` returns, uint8 [size, size, 3], or else the images.
    """

    def reset(self, seed: int, number: int = 0) -> int: ...
    def step_chunk(self, action_chunk: NDArray[np.float32]) -> ChunkOutcome: ...
    def observe(self, images: NDArray[np.uint8], state: NDArray[np.float32]) -> None:
        """Writes uint8 [cameras, image_size, image_size, 3] and float32 [state_dim].

        The agent sees the images that `sac.cameras` numbers, resized to 64x64.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class UserEnvironment:
    """An environment that does not come with this package, as the function that `env.name` names returns it.

    The function is called as `function(**env.options)`, in a process of its own to find out what is known of the
    environment, and in every environment worker, which then calls `make`. So it should be quick and leave everything
    that takes long, or opens windows or OpenGL contexts, to `make`.
    """

    spec: EnvironmentSpec
    """The shapes."""
    make: Callable[[], UserSimulation]
    """Makes the environment, with its simulator. It is called once in each worker."""
    episode_steps: int
    """Environment steps after which an episode is truncated, unless `env.max_episode_steps` says otherwise. The worker
    counts them, the environment need not."""
    rate_hz: int = 10
    """Environment steps per second of the robot's time, which is the frame rate of films."""
    needs_opengl: bool = False
    """Whether its cameras are rendered with OpenGL."""
    worker_bytes: int = 300 << 20
    """Upper estimate of the private memory of a worker; `python -m dsrl_async.doctor --measure` says how much it is."""
    packages: tuple[str, ...] = ()
    """The distributions that success rates depend on, besides the one with the function if that is an entry point."""
    evaluation_episodes: int = 100
    """How many episodes an evaluation plays unless told."""


@dataclass(frozen=True)
class EnvironmentRecord:
    """Everything that the rest of the package asks of an environment with given settings, short of stepping it.

    `dsrl_async.host.environments.environment_record` returns it for the settings of a run, and nobody else looks at
    `env.name`. Neither torch nor a simulator is imported for it: `spec`, `make` and `check` are functions, and all else
    is plain data. A user's environment has the same record. Its module is imported in a child process, which answers
    with these values, and only environment workers call `make`.
    """

    name: str
    """`env.name`."""
    settings: Settings
    """The settings, with the values that a preset chooses where they are null. JSON-ready."""
    own_settings: frozenset[str]
    """The keys of `env` that only environments of this kind read; what is not among them has no effect."""
    spec: Callable[[], EnvironmentSpec]
    """The shapes. Raises ValueError if the environment is not installed, or lacks what the settings select."""
    make: Callable[[Sequence[int]], Environment]
    """Makes the environment, with its simulator, from the numbers of the cameras that the agent sees (`sac.cameras`).
    Raises ValueError if it cannot be had, or a setting does not fit."""
    check: Callable[[], Sequence[str]]
    """Reads the environment's own files; returns warnings for the user. Raises ValueError, naming the file that is
    missing or damaged."""
    needs_opengl: bool
    """Whether its cameras are rendered with OpenGL."""
    rate_hz: int
    """Environment steps per second of the robot's time."""
    episode_steps: int
    """Environment steps after which an episode is truncated."""
    worker_bytes: int
    """Private memory of an environment worker, beside what it shares with the template."""
    template_bytes: int
    """Memory of the template, which all workers share."""
    packages: tuple[str, ...]
    """The distributions that success rates depend on, as far as they are installed."""
    suite: str | None = None
    """The suite of LIBERO whose tasks and initial states number the episodes (see `libero_files`); None: the number of
    an episode only seeds it."""
    evaluation_episodes: int | None = None
    """How many episodes an evaluation plays unless told; None: each scene of the suite once."""
    embedded_policy: bool = False
    """Whether the policy that comes with the package, for a null `policy.checkpoint`, was trained on it."""
    example: str | None = None
    """A configuration of this project that has a policy for it."""
    file: str | None = None
    """Where the function of a user's environment stands; None for those that come with this package."""
    survives_fork: bool = True
    """Whether the template may make it for the workers that are forked from it; else each of them does."""

    def task_numbers(self) -> Sequence[int]:
        """What evaluations call the tasks, by task_index: their numbers in the suite, or the prompts' own."""
        chosen = self.settings["task_ids"] if self.suite is not None else None
        return chosen if chosen is not None else range(len(self.spec().prompts))

    def versions(self) -> dict[str, str]:
        return installed_versions(self.packages)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of the distributions that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def check_chunk(action_chunk: NDArray[np.float32], action_dim: int) -> None:
    """Raises ValueError unless the chunk is [k, action_dim], with k >= 1, of finite numbers."""
    if action_chunk.ndim != 2 or action_chunk.shape[1] != action_dim or not len(action_chunk):
        raise ValueError(f"an action chunk must have shape [k, {action_dim}] with k >= 1, not {action_chunk.shape}")
    if not np.isfinite(action_chunk).all():
        raise ValueError("the action chunk holds values that are not finite; look at the policy's outputs")
