"""Demonstrations of the scripted tabletop expert, for pretraining the embedded policy.

The goal plate is uniformly random and the colours are shuffled, so a policy that imitates these episodes goes to any
plate, whatever its colour. In two thirds of the episodes the executed translation carries Gaussian noise while the
recorded action is the expert's clean one (DART: Laskey et al., "DART: Noise Injection for Robust Imitation Learning",
2017), and some first grasps miss, so that the policy also learns to recover.
"""

from __future__ import annotations

import argparse
import multiprocessing
from functools import cache
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from dsrl_async import __version__
from dsrl_async.config.shapes import SAC_IMAGE_SIZE
from dsrl_async.envs.simulator import mujoco
from dsrl_async.envs.tabletop import TabletopEnvironment
from dsrl_async.pretraining.tabletop_expert import TabletopExpert

_NOISE_SCALES = (0.0, 0.2, 0.4)
_SLOPPY_FRACTION = 0.15
_MAX_STEPS = 60
_HOVER_FRAMES = 8
"""Number of frames recorded after the block has landed, while the gripper rises and hovers."""


@cache
def _environment(layout: str) -> TabletopEnvironment:
    return TabletopEnvironment(layout)


def record_task(layout: str, seed: int, index: int) -> dict[str, NDArray] | None:
    """Records episode `index` of the demonstrations of the task with this layout: the expert goes to the red plate, and
    its actions are executed as they are.

    Returns, for its F frames up to the success, `images`, `state`, `action` and `episode` as `record_episode`, and
    `success` bool[F]; None if it takes the expert longer than an episode has steps.
    """
    random = np.random.default_rng([seed, index])
    environment = _environment(layout)
    environment.reset(int(random.integers(2**31)))
    expert = TabletopExpert(environment.red_plate)
    frames: list[dict[str, NDArray]] = []
    sac_image = np.empty((SAC_IMAGE_SIZE, SAC_IMAGE_SIZE, 3), np.uint8)
    while len(frames) < environment.max_episode_steps and not environment.success():
        images, state = np.empty((2, 64, 64, 3), np.uint8), np.empty(8, np.float32)
        environment.observe(images, sac_image, state)
        action = expert.action(environment)
        environment.step(action)
        success = np.array(environment.success())
        frames.append({"images": images, "state": state, "action": action, "success": success})
    if not environment.success():
        return None
    fields: dict[str, NDArray] = {name: np.stack([frame[name] for frame in frames]) for name in frames[0]}
    return {**fields, "episode": np.full(len(frames), index, np.int32)}


def record_episode(seed: int, index: int) -> dict[str, NDArray] | None:
    """Records episode `index` of the demonstrations of `seed`.

    Returns, for its F frames, images uint8[F, 2, 64, 64, 3], state float32[F, 8], action float32[F, 7] (the expert's
    own, without noise), block_position float32[F, 3] (m), episode int32[F] (`index`) and goal int32[F] (the location of
    the expert's goal plate), or None if the block missed its goal plate.
    """
    random = np.random.default_rng([seed, index])
    environment = _environment("shuffle")
    environment.reset(int(random.integers(2**31)))
    goal = int(random.integers(len(environment.plate_positions)))
    noise_scale = random.choice(_NOISE_SCALES)
    offset = None
    if random.random() < _SLOPPY_FRACTION:
        offset = np.array([random.choice([-1, 1]) * random.uniform(0.028, 0.036), random.uniform(-0.006, 0.006)])
    expert = TabletopExpert(goal, offset)

    images = np.empty((_MAX_STEPS, 2, 64, 64, 3), np.uint8)
    state = np.empty((_MAX_STEPS, 8), np.float32)
    action = np.empty((_MAX_STEPS, 7), np.float32)
    block_position = np.empty((_MAX_STEPS, 3), np.float32)
    sac_image = np.empty((SAC_IMAGE_SIZE, SAC_IMAGE_SIZE, 3), np.uint8)
    frames, hovered = 0, 0
    while frames < _MAX_STEPS and hovered < _HOVER_FRAMES:
        environment.observe(images[frames], sac_image, state[frames])
        block_position[frames] = environment.block_position
        action[frames] = expert.action(environment)
        executed = action[frames].copy()
        executed[:3] += noise_scale * random.standard_normal(3)
        environment.step(executed)
        frames += 1
        hovered += environment.landed_on(goal)
    if hovered < _HOVER_FRAMES:
        return None
    return {
        "images": images[:frames],
        "state": state[:frames],
        "action": action[:frames],
        "block_position": block_position[:frames],
        "episode": np.full(frames, index, np.int32),
        "goal": np.full(frames, goal, np.int32),
    }


def _record(task: tuple[int, int, str | None]) -> dict[str, NDArray] | None:
    seed, index, layout = task
    return record_episode(seed, index) if layout is None else record_task(layout, seed, index)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--data` and `--episodes`, as `provide` takes them."""
    path = Path("data/tabletop_demonstrations.safetensors")
    parser.add_argument("--data", type=Path, default=path, help="demonstrations, recorded if the file does not exist")
    parser.add_argument("--episodes", type=int, default=1200, help="demonstrations to record")


def provide(args: argparse.Namespace, console: Console) -> None:
    """Record the demonstrations of the options `data`, `episodes`, `seed` and `threads`, unless they are there."""
    if not args.data.is_file():
        console.print(f"recording {args.episodes} demonstrations: {args.data}")
        make_demonstrations(args.data, args.episodes, args.seed, args.threads)


def make_demonstrations(
    path: str | Path, episodes: int, seed: int, processes: int, task: str | None = None
) -> tuple[int, int]:
    """Writes demonstrations to the safetensors file `path`. Returns how many episodes and frames it holds.

    `episodes` are attempted, and those that missed their goal plate (a few percent) are left out. The fields are those
    of `record_episode`, or with a layout as `task` those of `record_task`, episode after episode; they depend on
    `seed`, not on `processes`. A frame takes 25 kB.

    Raises ValueError if `episodes` or `processes` is not positive.
    """
    if episodes < 1 or processes < 1:
        raise ValueError(f"episodes and processes must be at least 1, not {episodes} and {processes}")
    tasks = [(seed, index, task) for index in range(episodes)]
    description = "Recording demonstrations"
    if processes == 1:
        attempts = list(track(map(_record, tasks), description, total=episodes))
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            attempts = list(track(pool.imap(_record, tasks, chunksize=4), description, total=episodes))
    kept = [attempt for attempt in attempts if attempt is not None]
    if not kept:
        raise ValueError(f"none of {episodes} episodes reached its goal plate; ask for more episodes")
    fields = {name: np.concatenate([episode[name] for episode in kept]) for name in kept[0]}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "seed": str(seed),
        "attempted_episodes": str(episodes),
        "episodes": str(len(kept)),
        "dsrl_async_version": __version__,
        "mujoco_version": mujoco.__version__,
        "numpy_version": np.__version__,
    }
    safetensors.numpy.save_file(fields, path, metadata)
    return len(kept), len(fields["episode"])
