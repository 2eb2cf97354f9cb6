"""A step of ALOHA's simulation as gym-aloha makes it, and as the adapter for gymnasium does, without rendering.

    .venv-aloha/bin/python scripts/studies/measure_aloha_rendering.py

`bash scripts/run_aloha_sim.sh` makes that environment. Prints JSON lines with milliseconds of a step (medians), and
says whether states, rewards and the picture after the last step are equal bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from typing import Any

import numpy as np

from dsrl_async.envs import graphics
from dsrl_async.envs.gymnasium_adapter import no_rendering_of_dm_control

STEPS = 20


def play(rendering: bool) -> tuple[float, np.ndarray, list[float], np.ndarray]:
    """Milliseconds of a step, the states, the rewards and the last picture of STEPS steps with seeded actions."""
    import gymnasium

    env: Any = gymnasium.make(
        "gym_aloha:gym_aloha/AlohaTransferCube-v0", obs_type="pixels_agent_pos", disable_env_checker=True
    )
    state = env.reset(seed=3)[0]["agent_pos"]
    generator = np.random.default_rng(0)
    states, rewards, times = [], [], []
    for _ in range(STEPS):
        action = (state + generator.normal(0, 0.05, 14)).astype(np.float32)
        begun = time.perf_counter()
        with contextlib.nullcontext() if rendering else no_rendering_of_dm_control():
            observation, reward, *_ = env.step(action)
        times.append(1000 * (time.perf_counter() - begun))
        state = observation["agent_pos"]
        states.append(state)
        rewards.append(float(reward))
    begun = time.perf_counter()
    picture = env.render()
    emit("render()", 1000 * (time.perf_counter() - begun))
    return statistics.median(times), np.array(states), rewards, picture


def emit(what: str, milliseconds: float) -> None:
    print(json.dumps({"benchmark": "aloha", "what": what, "value": round(milliseconds, 2), "unit": "ms"}), flush=True)


if __name__ == "__main__":
    os.environ.update(graphics.variables())
    stock, ours = play(rendering=True), play(rendering=False)
    emit("a step as it is", stock[0])
    emit("a step without rendering", ours[0])
    equal = (stock[1] == ours[1]).all() and stock[2] == ours[2] and (stock[3] == ours[3]).all()
    print(json.dumps({"benchmark": "aloha", "what": "equal bit for bit", "value": bool(equal)}))
