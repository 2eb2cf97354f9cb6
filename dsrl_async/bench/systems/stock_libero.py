"""LIBERO's own environment wrapper behind this project's protocol, with which `bench env` compares."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class StockEnvironment:
    """A task in LIBERO's published wrapper: it compiles the scene at every reset and renders at every step."""

    def __init__(self, suite: str, task: int, render_size: int = 256) -> None:
        from dsrl_async.envs import libero_files
        from dsrl_async.envs.simulator import import_libero

        stock = import_libero()
        self.init_states = libero_files.init_states(suite, task)
        self.env = stock.OffScreenRenderEnv(
            bddl_file_name=str(libero_files.bddl_file(suite, task)),
            camera_heights=render_size,
            camera_widths=render_size,
        )
        self.observation: dict[str, Any] = {}

    def reset(self, seed: int, init_state: int, resets: int = 1) -> None:
        """Starts from a numbered initial state after seeding and `resets` resets, without settling."""
        self.env.seed(seed)
        for _ in range(resets):
            self.env.reset()
        self.observation = self.env.set_init_state(self.init_states[init_state])

    def step(self, action: NDArray[np.float32]) -> tuple[float, bool]:
        """Returns the reward and whether the goal holds."""
        self.observation, reward, done, _ = self.env.step(action)
        return reward, done

    def observe(self, size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """The policy's observation of the last step: images uint8[2, size, size, 3] and state float32[8]."""
        from dsrl_async.envs.images import libero_image
        from dsrl_async.envs.libero import axis_angle

        parts = ("eef_pos", "eef_quat", "gripper_qpos")
        position, orientation, fingers = (self.observation[f"robot0_{part}"] for part in parts)
        state = np.concatenate((position, axis_angle(orientation), fingers)).astype(np.float32)
        cameras = ("agentview_image", "robot0_eye_in_hand_image")
        return np.stack([libero_image(self.observation[name], size) for name in cameras]), state

    def close(self) -> None:
        self.env.close()
