"""An environment as an installed package brings it: a point has to reach one of two others. It can be made to fail."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsrl_async.envs import ChunkOutcome, EnvironmentSpec, UserEnvironment

NEITHER: Any = (None, None)
WORDS = ("reach the green one", "reach the blue one")


class Reaching:
    def __init__(self, fault: str | None, reach: float) -> None:
        self.fault, self.reach = fault, reach
        if fault == "make":
            raise OSError("there is no such robot")

    def reset(self, seed: int, number: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        self.place, *self.goals = rng.uniform(-1, 1, (3, 3))
        self.task = int(rng.integers(2))
        return {"task": 2, "no task": None}.get(self.fault or "", self.task)

    def step_chunk(self, action_chunk: NDArray[np.float32]) -> Any:
        wrong = {
            "no outcome": (1, -1, False, False),
            "too many steps": ChunkOutcome(len(action_chunk) + 1, -1, terminated=False, truncated=False),
            "too few steps": ChunkOutcome(len(action_chunk) - 1, -1, terminated=False, truncated=False),
            "success later": ChunkOutcome(len(action_chunk), len(action_chunk), terminated=True, truncated=False),
            "no bool": ChunkOutcome(len(action_chunk), -1, *NEITHER),
            "rewards": ChunkOutcome(len(action_chunk), -1, terminated=False, truncated=False, rewards=[1.0]),
        }
        if self.fault == "step":
            np.zeros(2).reshape(3)  # the error is numpy's, and the line is this one
        if self.fault in wrong:
            return wrong[self.fault]
        for step, action in enumerate(action_chunk):
            self.place = self.place + 0.1 * np.tanh(action)
            if np.abs(self.place - self.goals[self.task]).max() < self.reach:
                return ChunkOutcome(step + 1, step, terminated=True, truncated=False)
        return ChunkOutcome(len(action_chunk), -1, terminated=False, truncated=False)

    def observe(self, images: NDArray[np.uint8], state: NDArray[np.float32]) -> None:
        for camera, image in enumerate(images):
            if not (camera == 1 and self.fault == "one camera"):
                image[:] = 100 + camera
        state[:3] = self.place
        if self.fault != "half a state":
            state[3:] = self.task, 1.0

    def close(self) -> None:
        if self.fault == "close":
            raise RuntimeError("it will not close")


def make_environment(fault: str | None = None, reach: float = 0.3) -> UserEnvironment:
    spec = EnvironmentSpec(cameras=2, image_size=32, state_dim=5, action_dim=3, prompts=WORDS)
    return UserEnvironment(spec=spec, make=lambda: Reaching(fault, reach), episode_steps=12, evaluation_episodes=3)
