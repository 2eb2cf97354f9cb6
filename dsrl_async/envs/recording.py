"""Films of episodes: a wrapper around an environment that films what happens in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsrl_async.config.files import how_to_install
from dsrl_async.envs.protocol import ChunkOutcome

FRAME_PIXELS = 256
PREVIEW_FRAMES = 60
"""Upper limit on the frames of a preview; its pixels are half as many each way."""
ENCODER: Final = "libx264"


def why_no_films() -> str | None:
    """Why no films can be made here and what to do about it, in one sentence; None if they can.

    It loads PyAV, which only the extra `video` brings: most runs need none of FFmpeg's hundred megabytes.
    """
    try:
        import av

        av.Codec(ENCODER, "w")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "av"
        found = "which is not installed" if missing else f"which cannot be loaded ({error})"
        return f"films need PyAV, {found}; {how_to_install('video')}"
    except ValueError:  # av.codec.codec.UnknownCodecError
        return f"films need PyAV with the encoder {ENCODER}, which this one lacks; take PyPI's: pip install av"
    return None


class RecordingEnvironment:
    """Wraps an environment that has `render` and films every step of the episodes for which `wanted` returns True.

    A finished film is at `unsorted_film`. `rate_hz` is the environment's steps per second, so films run in real time.
    With `preview`, a small animated GIF for TensorBoard, which shows no films, is there before it, at `preview_of` it.
    """

    def __init__(
        self, env: Any, wanted: Callable[[], bool], video_dir: Path, rate_hz: int, preview: bool = False
    ) -> None:
        self.spec = env.spec
        self._env, self._wanted, self._directory, self._rate_hz = env, wanted, video_dir, rate_hz
        self._number = 0
        self._film: _Film | None = None
        self._preview: list[Any] | None = [] if preview else None

    def reset(self, seed: int, number: int = 0) -> int:
        task_index: int = self._env.reset(seed, number)
        if self._wanted():
            self._number = number
            path = unfinished_film(self._directory, number)
            path.parent.mkdir(exist_ok=True)
            self._film = _Film(path, self._rate_hz, FRAME_PIXELS * self.spec.cameras)
            if self._preview is not None:
                self._preview.clear()
            self._film_frame()
        return task_index

    def step_chunk(self, action_chunk: NDArray[np.float32]) -> ChunkOutcome:
        if self._film is None:
            outcome: ChunkOutcome = self._env.step_chunk(action_chunk)
            return outcome
        rewards: list[float] = []
        for step in range(len(action_chunk)):
            outcome = self._env.step_chunk(action_chunk[step : step + 1])
            rewards += outcome.rewards
            frame = self._film_frame()
            if outcome.terminated or outcome.truncated:
                self._finish(frame)
                break
        return outcome._replace(steps=step + 1, success_step=step if outcome.success else -1, rewards=tuple(rewards))

    def observe(self, images: NDArray[np.uint8], sac_image: NDArray[np.uint8], state: NDArray[np.float32]) -> None:
        self._env.observe(images, sac_image, state)

    def close(self) -> None:
        if self._film is not None:
            self._film.close()
        self._env.close()

    def _film_frame(self) -> NDArray[np.uint8]:
        assert self._film is not None
        frame = self._frame()
        self._film.append(frame)
        if self._preview is not None:
            self._preview.append(frame[::2, ::2])
        return frame

    def _frame(self) -> NDArray[np.uint8]:
        """All cameras side by side, uint8[256, 256 * cameras, 3]."""
        return np.hstack([self._env.render(FRAME_PIXELS, camera) for camera in range(self.spec.cameras)])

    def _finish(self, last: NDArray[np.uint8]) -> None:
        assert self._film is not None
        for _ in range(self._rate_hz // 2):  # show the end for half a second
            self._film.append(last)
        self._film.close()
        self._film = None
        finished = unsorted_film(self._directory, self._number)
        if self._preview is not None:
            stride = -(-len(self._preview) // PREVIEW_FRAMES)
            first, *rest = map(Image.fromarray, [*self._preview[::stride], self._preview[-1]])
            duration = 1000 * stride / self._rate_hz
            first.save(preview_of(finished), save_all=True, append_images=rest, duration=duration, loop=0)
        unfinished_film(self._directory, self._number).replace(finished)


class _Film:
    """An MP4 file that every browser plays: H.264 in yuv420p, with its index before its pictures.

    Its frames are uint8[256, width, 3] with an even width, as such pictures need it.
    """

    def __init__(self, path: Path, rate_hz: int, width: int) -> None:
        import av

        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        self._stream = self._container.add_stream(ENCODER, rate=rate_hz)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, FRAME_PIXELS, "yuv420p"
        self._stream.thread_count = 1  # of a worker that has one core, as its numeric libraries have

    def append(self, image: NDArray[np.uint8]) -> None:
        import av

        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))

    def close(self) -> None:
        self._container.mux(self._stream.encode())  # what the encoder holds back
        self._container.close()


def unsorted_film(video_dir: Path, number: int) -> Path:
    """Where an episode's film stays until it is known which films to keep."""
    return video_dir / ".unsorted" / f"{number}.mp4"


def preview_of(film: Path) -> Path:
    """The animated GIF beside a film."""
    return film.with_suffix(".gif")


def unfinished_film(video_dir: Path, number: int) -> Path:
    return video_dir / ".unsorted" / f"unfinished-{number}.mp4"
