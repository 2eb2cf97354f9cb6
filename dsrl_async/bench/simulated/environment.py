"""An environment worker of a run whose environment sleeps instead of simulating.

Everything else is the run's own: `worker.Lane`, its slot, its part of the replay ring, its loop.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsrl_async.envs import ChunkOutcome, EnvironmentSpec
from dsrl_async.plan.simulation import EnvironmentTimes
from dsrl_async.run.worker.worker import Lane, play, take_part_in_evaluation
from dsrl_async.shm.arena import Arena

SPEC = EnvironmentSpec(cameras=2, image_size=224, state_dim=8, action_dim=7, prompts=("put the block on the plate",))
"""The spec of LIBERO for Pi0."""
CHUNK = 10
"""Number of actions per decision."""
HORIZON = 10
"""Number of action slots of the simulated policy."""
PR_SET_TIMERSLACK = 29


def sharpen_timers() -> None:
    """Make this process's sleeps end in time, and not up to 50 microseconds late."""
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)


class SleepingEnvironment:
    """Takes as long as `EnvironmentTimes` says. Observations are copies of fixed arrays."""

    def __init__(self, times: EnvironmentTimes, seed: int, lane: int, image_size: int = SPEC.image_size) -> None:
        self.spec = SPEC._replace(image_size=image_size)
        self._times = times.draw(seed, lane)
        self._reset_s = 0.0
        rng = np.random.default_rng([seed, lane])
        self._images = rng.integers(0, 256, (SPEC.cameras, image_size, image_size, 3), np.uint8)
        self._sac_image = rng.integers(0, 256, (64, 64, 3), np.uint8)
        self._state = rng.standard_normal(SPEC.state_dim, np.float32)

    def reset(self, seed: int, number: int = 0) -> int:
        _sleep(self._reset_s)
        return 0

    def step_chunk(self, action_chunk: NDArray[np.float32]) -> ChunkOutcome:
        chunk_s, self._reset_s = next(self._times)
        _sleep(chunk_s)
        return ChunkOutcome(len(action_chunk), -1, False, truncated=self._reset_s > 0)

    def observe(self, images: NDArray[np.uint8], sac_image: NDArray[np.uint8], state: NDArray[np.float32]) -> None:
        np.copyto(images, self._images)
        np.copyto(sac_image, self._sac_image)
        np.copyto(state, self._state)

    def close(self) -> None:
        pass


def _sleep(seconds: float) -> None:
    if seconds > 0:
        time.sleep(seconds)


def prepare(job: Mapping[str, Any]) -> None:
    """The workers share nothing."""


def main(job: Mapping[str, Any], prepared: None) -> None:
    """`job` comes from `template.Template`, with the fields of `EnvironmentTimes` as `times`, and the
    `image_size`."""
    sharpen_timers()
    arena, times = Arena.attach(job["arena"]), EnvironmentTimes(**job["times"])
    number, seed = job["number"], job["seed"]
    environment = SleepingEnvironment(times, seed, number, job["image_size"])
    lane = Lane(number, job["incarnation"], seed, job["env"], arena, environment)
    take_part_in_evaluation(lane, job)
    play(lane, job["wake_fd"], job["notify_fds"])
