"""Environments of gymnasium for the tests of its adapter. Importing this module registers `Corridor-v0`."""

from __future__ import annotations

import os
import signal
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

GOAL, CLIFF = 6.0, -3.0
HEIGHT, WIDTH = 48, 64


class Corridor(gymnasium.Env[dict[str, Any], np.ndarray]):
    """A point moves by the sum of the action, from a place that the seed chooses. Its reward is where it is then.

    It succeeds at GOAL, without terminating, and terminates at CLIFF. A picture's pixels are the number of steps, the
    wrist's picture is turned to [3, height, width].
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12.4}  # noqa: RUF012  as gymnasium has it
    made = 0
    """How many there have been in this process."""

    def __init__(self, render_mode: str | None = None, tasks: int = 1) -> None:
        type(self).made += 1
        self.render_mode, self.tasks = render_mode, tasks
        picture = spaces.Box(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "agent": spaces.Dict({"place": spaces.Box(-9, 9, (1,), np.float64), "steps": spaces.Discrete(99)}),
                "pixels": spaces.Dict({"top": picture, "wrist.camera": spaces.Box(0, 255, (3, 20, 20), np.uint8)}),
                "history": spaces.Box(-9, 9, (2, 2), np.float32),
            }
        )
        self.action_space = spaces.Box(np.array([-0.5, -2.0], np.float32), np.array([0.5, 4.0], np.float32))
        self.actions: list[np.ndarray] = []
        self.renders = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], Any]:
        super().reset(seed=seed)
        self.place, self.steps = float(self.np_random.uniform(-1, 1)), 0
        self.task = int(self.np_random.integers(self.tasks))
        return self._observation(), {"task": self.task}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.actions.append(action)
        self.place += float(action.sum())
        self.steps += 1
        failed = self.place <= CLIFF
        info = {"is_success": self.place >= GOAL, "progress": {"done": np.array([self.place >= GOAL])}}
        return self._observation(), self.place, failed, self.steps >= 50, info

    def _observation(self) -> dict[str, Any]:
        top, wrist = (np.full(shape, self.steps, np.uint8) for shape in ((HEIGHT, WIDTH, 3), (3, 20, 20)))
        return {
            "agent": {"place": np.array([self.place]), "steps": self.steps},
            "pixels": {"top": top, "wrist.camera": wrist},
            "history": np.arange(4, dtype=np.float32).reshape(2, 2) + self.steps,
        }

    def render(self) -> Any:
        self.renders += 1
        return np.full((HEIGHT, WIDTH, 3), 100 + self.steps, np.uint8)


gymnasium.register("Corridor-v0", f"{__name__}:Corridor", max_episode_steps=30)
gymnasium.register("EndlessCorridor-v0", f"{__name__}:Corridor")


class Silent(Corridor):
    """Its infos say nothing of success."""

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        *others, _ = super().step(action)
        return (*others, {"speed": 1.0})  # type: ignore[return-value]  # five values


class Floating(Corridor):
    """Its pictures are no bytes."""

    def render(self) -> Any:
        return super().render() / 255


class Discrete(Corridor):
    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Discrete(4)  # type: ignore[assignment]


class Four(Corridor):
    """Answers a step as the old package gym does."""

    def step(self, action: np.ndarray) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated or truncated, info


class OldEnv:
    """Stands for `gym.Env`."""


OldEnv.__module__ = "gym.core"


class Old(OldEnv):
    pass


def nothing() -> None:
    pass


def crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def broken() -> None:
    raise RuntimeError("no licence\nfor this")


def far(env: Corridor, info: dict[str, Any], **rest: Any) -> bool:
    assert set(rest) == {"observation", "reward", "terminated"}
    return env.unwrapped.place >= 2 and "is_success" in info  # type: ignore[attr-defined]


def doubled(state: np.ndarray) -> np.ndarray:
    return np.concatenate((state, state))


def swapped(action: np.ndarray) -> np.ndarray:
    return action[::-1]
