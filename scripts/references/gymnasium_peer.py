"""Gymnasium's AsyncVectorEnv as a measured process of `bench transport`. Runs in .reference/gymnasium."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil
from gymnasium.spaces import Box, Dict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from dsrl_async.host.cpu_time import usage


class NothingEnvironment(gymnasium.Env[Any, Any]):
    """Always returns the same observation, without delay."""

    observation_space = Dict(
        images=Box(0, 255, (2, 224, 224, 3), np.uint8),
        sac_image=Box(0, 255, (64, 64, 3), np.uint8),
        state=Box(-np.inf, np.inf, (8,), np.float32),
    )
    action_space = Box(-1, 1, (10, 7), np.float32)

    def __init__(self) -> None:
        self.observation = self.observation_space.sample()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self.observation, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation, -1.0, False, False, {}


def main(environments: int, gather: bool, pickled: bool, warm_s: float, seconds: float) -> dict[str, float]:
    """`gather` is AsyncVectorEnv's `copy`, which has no effect without shared memory."""
    vector = gymnasium.vector.AsyncVectorEnv(
        [NothingEnvironment] * environments, shared_memory=not pickled, copy=gather, context="fork"
    )
    vector.reset()
    actions = np.zeros((environments, 10, 7), np.float32)
    processes = [os.getpid(), *(child.pid for child in psutil.Process().children())]
    until = time.monotonic() + warm_s
    while time.monotonic() < until:
        vector.step(actions)
    decisions, begin, before = 0, time.monotonic(), usage(processes)
    while time.monotonic() < begin + seconds:
        vector.step(actions)
        decisions += environments
    sample = {
        "decisions": decisions,
        "seconds": time.monotonic() - begin,
        "cpu_s": usage(processes).since(before).running,
    }
    vector.close(terminate=True)
    return sample


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
