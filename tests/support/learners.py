"""A learner in the test's own process, and something for it to learn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dsrl_async.config.settings import Config
from dsrl_async.run.learner.learner import Learner
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters
from dsrl_async.shm.replay import ReplayRing

HORIZON = 10


def fill(memory: Arena, decisions: int, seed: int = 0) -> None:
    """Random transitions in both lanes, counted as a worker counts them."""
    rng, ring, counters = np.random.default_rng(seed), ReplayRing(memory), Counters(memory)
    for lane in (0, 1):
        for _ in range(decisions // 2):
            if rng.random() < 0.2 or ring.head[lane] == 0:
                ring.begin_episode(lane, rng.integers(0, 256, (64, 64, 3)).astype(np.uint8), rng.normal(size=8))
            image = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
            ring.append(lane, rng.normal(size=32), -1.0, 5, rng.random() < 0.1, 0, image, rng.normal(size=8))
            counters.actor_decisions[lane] += 1
            counters.actor_env_steps[lane] += 5


def make_learner(config: Config, memory: Arena, run_dir: Path, frames: list[bytes] | None = None) -> Learner:
    published = [] if frames is None else frames
    return Learner(config, memory, HORIZON, torch.device("cpu"), run_dir, published.append)
