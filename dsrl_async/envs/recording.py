"""Videos of episodes: an environment that films what happens in it, and the choice of the films to keep."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from numpy.typing import NDArray

from dsrl_async.envs import ChunkOutcome

FRAME_PIXELS = 256
FILMED_PER_VIDEO = 4
"""How many episodes are filmed at most for each film that is kept, in search of successes and failures."""


class RecordingEnvironment:
    """Wraps an environment that has `render`; films every step of the episodes that are `wanted`, all cameras.

    A finished film is where `unsorted_film` says. `rate_hz` is the environment's steps per second, so that films show
    real time.
    """

    def __init__(self, env: Any, wanted: Callable[[], bool], video_dir: Path, rate_hz: int) -> None:
        self.spec = env.spec
        self._env, self._wanted, self._directory, self._rate_hz = env, wanted, video_dir, rate_hz
        self._number = 0
        self._film: Any = None

    def reset(self, seed: int, number: int = 0) -> int:
        task_index: int = self._env.reset(seed, number)
        if self._wanted():
            self._number = number
            path = unfinished_film(self._directory, number)
            path.parent.mkdir(exist_ok=True)
            self._film = imageio.get_writer(path, fps=self._rate_hz, macro_block_size=16)
            self._film.append_data(self._frame())
        return task_index

    def step_chunk(self, action_chunk: NDArray[np.float32]) -> ChunkOutcome:
        if self._film is None:
            outcome: ChunkOutcome = self._env.step_chunk(action_chunk)
            return outcome
        for step in range(len(action_chunk)):
            outcome = self._env.step_chunk(action_chunk[step : step + 1])
            frame = self._frame()
            self._film.append_data(frame)
            if outcome.terminated or outcome.truncated:
                self._finish(frame)
                break
        return outcome._replace(steps=step + 1, success_step=step if outcome.terminated else -1)

    def observe(self, images: NDArray[np.uint8], sac_image: NDArray[np.uint8], state: NDArray[np.float32]) -> None:
        self._env.observe(images, sac_image, state)

    def close(self) -> None:
        if self._film is not None:
            self._film.close()
        self._env.close()

    def _frame(self) -> NDArray[np.uint8]:
        """All cameras side by side, uint8[256, 256 * cameras, 3]."""
        return np.hstack([self._env.render(FRAME_PIXELS, camera) for camera in range(self.spec.cameras)])

    def _finish(self, last: NDArray[np.uint8]) -> None:
        for _ in range(self._rate_hz // 2):  # let the end be seen
            self._film.append_data(last)
        self._film.close()
        self._film = None
        unfinished_film(self._directory, self._number).replace(unsorted_film(self._directory, self._number))


def unsorted_film(video_dir: Path, number: int) -> Path:
    """Where the film of an episode is until it is known which are kept."""
    return video_dir / ".unsorted" / f"{number}.mp4"


def unfinished_film(video_dir: Path, number: int) -> Path:
    return video_dir / ".unsorted" / f"unfinished-{number}.mp4"


class Films:
    """Which episodes of an evaluation are filmed, and which films are kept: some successes and some failures.

    `numbers` are the episodes in the order in which films of them are preferred. Only the first of them are filmed, and
    only until there are enough of both kinds, since filming renders every step.
    """

    def __init__(self, directory: Path, videos: int, numbers: Sequence[int]) -> None:
        self.directory, self._videos = directory, videos
        self._candidates = numbers[: FILMED_PER_VIDEO * videos]
        self._filmed: dict[int, bool] = {}

    def resume(self, successes: Mapping[int, bool]) -> None:
        """Find the films of episodes that were played before, given their success; forget any others."""
        if not successes:
            self._forget()
        for number, success in successes.items():
            if unsorted_film(self.directory, number).is_file():
                self.add(number, success)

    def wanted(self, number: int) -> bool:
        """Whether to film an episode."""
        successes = sum(self._filmed.values())
        failures = len(self._filmed) - successes
        wanted_failures = self._videos // 2
        enough = successes >= self._videos - wanted_failures and failures >= wanted_failures
        return number in self._candidates and not enough

    def add(self, number: int, success: bool) -> None:
        """An episode was filmed."""
        self._filmed[number] = success

    def keep(self, names: Mapping[int, str]) -> None:
        """Give the best choice of films their `names`, and remove the others."""
        filmed = {number: self._filmed[number] for number in self._candidates if number in self._filmed}
        for number in choose_films(filmed, self._videos):
            unsorted_film(self.directory, number).replace(self.directory / names[number])
        self._forget()

    def _forget(self) -> None:
        shutil.rmtree(self.directory / ".unsorted", ignore_errors=True)


def choose_films(filmed: Mapping[int, bool], videos: int) -> list[int]:
    """Which of the filmed episodes to keep, at most `videos`, given their success: half of them failures, or fewer of
    one kind and more of the other where there are not enough; the first ones of each."""
    successes = [number for number, success in filmed.items() if success]
    failures = [number for number, success in filmed.items() if not success]
    kept_failures = failures[: max(videos // 2, videos - len(successes))]
    return successes[: videos - len(kept_failures)] + kept_failures
