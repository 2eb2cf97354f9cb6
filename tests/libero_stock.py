"""LIBERO as it is published, played the way openpi plays it: what the tests hold our environment against."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsrl_async.envs import libero_files
from dsrl_async.envs.images import libero_image
from dsrl_async.envs.libero import IDLE_ACTION, LiberoEnvironment, Scene, axis_angle

RENDER_SIZE = 256


class Episode(NamedTuple):
    """What can be seen of an episode, per environment step except where said."""

    simulation: list[NDArray[np.float64]]
    """Time, positions and velocities of the simulation."""
    success: list[bool]
    state: list[NDArray[np.float32]]
    """Of the decisions: float32[8], first observation included."""
    images: list[NDArray[np.uint8]]
    """Of the decisions: uint8[2, size, size, 3]."""


class StockEnvironment:
    """A suite's task in LIBERO's own wrapper; resets compile the scene anew and every step renders."""

    def __init__(self, suite: str, task: int, render_size: int = RENDER_SIZE) -> None:
        libero_files.prepare_import()
        from libero.libero.envs import OffScreenRenderEnv

        self.init_states = libero_files.init_states(suite, task)
        self.env = OffScreenRenderEnv(
            bddl_file_name=str(libero_files.bddl_file(suite, task)),
            camera_heights=render_size,
            camera_widths=render_size,
        )

    def reset(self, scene: Scene, settling_steps: int) -> dict[str, Any]:
        self.env.seed(scene.seed)
        for _ in range(scene.resets):
            self.env.reset()
        observation: dict[str, Any] = self.env.set_init_state(self.init_states[scene.init_state])
        for _ in range(settling_steps):
            observation, *_ = self.env.step(IDLE_ACTION)
        return observation

    def play(self, scene: Scene, settling_steps: int, chunks: NDArray[np.float32], size: int) -> Episode:
        """Executes float32[decisions, steps, 7] until it succeeds."""
        episode = Episode([], [], [], [])
        observation = self.reset(scene, settling_steps)
        for chunk in chunks:
            self._decide(observation, episode, size)
            for action in chunk:
                observation, reward, done, _ = self.env.step(action)
                assert done == (reward > 0)
                episode.simulation.append(self.env.get_sim_state())
                episode.success.append(done)
                if done:
                    self._decide(observation, episode, size)
                    return episode
        self._decide(observation, episode, size)
        return episode

    @staticmethod
    def _decide(observation: dict[str, Any], episode: Episode, size: int) -> None:
        parts = ("eef_pos", "eef_quat", "gripper_qpos")
        position, orientation, fingers = (observation[f"robot0_{part}"] for part in parts)
        episode.state.append(np.concatenate((position, axis_angle(orientation), fingers)).astype(np.float32))
        cameras = ("agentview_image", "robot0_eye_in_hand_image")
        episode.images.append(np.stack([libero_image(observation[name], size) for name in cameras]))


def play(environment: LiberoEnvironment, seed: int, number: int, chunks: NDArray[np.float32]) -> Episode:
    """The same with our environment, whose chunks are executed in parts where the simulation is to be seen."""
    episode = Episode([], [], [], [])
    size = environment.spec.image_size

    def decide() -> None:
        images, state = np.empty((2, size, size, 3), np.uint8), np.empty(8, np.float32)
        environment.observe(images, np.empty((64, 64, 3), np.uint8), state)
        episode.images.append(images)
        episode.state.append(state)

    environment.reset(seed, number)
    for chunk in chunks:
        decide()
        for step in range(len(chunk)):
            outcome = environment.step_chunk(chunk[step : step + 1])
            episode.simulation.append(environment._domain.sim.get_state().flatten())
            episode.success.append(outcome.terminated)
            if outcome.terminated:
                decide()
                return episode
    decide()
    return episode


def differences(one: Episode, other: Episode) -> list[str]:
    """The names of what is not the same to the last bit."""

    def same(first: list[Any], second: list[Any]) -> bool:
        return len(first) == len(second) and all(map(np.array_equal, first, second))

    return [name for name in Episode._fields if not same(getattr(one, name), getattr(other, name))]
