"""Videos of episodes: an environment that films what happens in it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from numpy.typing import NDArray

from dsrl_async.envs import ChunkOutcome

FRAME_PIXELS = 256
FRAMES_PER_SECOND = 10  # the tabletop's control rate: real time


class RecordingEnvironment:
    """Wraps an environment that has `render`; writes `episode-<number>-<success|failure>.mp4` to `video_dir`.

    Films every environment step of those of its `episodes` whose number is below `videos`.
    """

    def __init__(self, env: Any, episodes: Iterable[int], video_dir: str, videos: int) -> None:
        self.spec = env.spec
        self._env, self._directory, self._videos = env, Path(video_dir), videos
        self._episodes = iter(episodes)
        self._number = -1
        self._frames: list[NDArray[np.uint8]] = []

    def reset(self, seed: int, number: int = 0) -> int:
        task_index: int = self._env.reset(seed, number)
        self._number = next(self._episodes)
        self._frames = []
        self._film()
        return task_index

    def step_chunk(self, action_chunk: NDArray[np.float32]) -> ChunkOutcome:
        if self._number >= self._videos:
            outcome: ChunkOutcome = self._env.step_chunk(action_chunk)
            return outcome
        for step in range(len(action_chunk)):
            outcome = self._env.step_chunk(action_chunk[step : step + 1])
            self._film()
            if outcome.terminated or outcome.truncated:
                self._write(outcome.terminated)
                break
        return outcome._replace(steps=step + 1, success_step=step if outcome.terminated else -1)

    def observe(self, images: NDArray[np.uint8], sac_image: NDArray[np.uint8], state: NDArray[np.float32]) -> None:
        self._env.observe(images, sac_image, state)

    def close(self) -> None:
        self._env.close()

    def _film(self) -> None:
        if self._number < self._videos:
            self._frames.append(self._env.render(FRAME_PIXELS))

    def _write(self, success: bool) -> None:
        name = f"episode-{self._number:04d}-{'success' if success else 'failure'}.mp4"
        frames: list[Any] = [*self._frames, *[self._frames[-1]] * (FRAMES_PER_SECOND // 2)]  # let the end be seen
        imageio.mimwrite(self._directory / name, frames, fps=FRAMES_PER_SECOND, macro_block_size=16)
