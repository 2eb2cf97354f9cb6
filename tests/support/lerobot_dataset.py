"""A LeRobotDataset of version 3, made without LeRobot: two short episodes of the task and one of another."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsrl_async.demonstrations import Wanted

WANTED = Wanted(cameras=2, state_dim=4, action_dim=3, prompts=("put it there",), turned=True)
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
DATA, EPISODES, TASKS = (
    "data/chunk-000/file-000.parquet",
    "meta/episodes/chunk-000/file-000.parquet",
    "meta/tasks.parquet",
)
VIDEO = f"videos/{WRIST}/chunk-000/file-000.mp4"
LENGTHS, INSTRUCTIONS = (4, 3, 3), ("put it there", "Dance", "put it there")
HEIGHT, WIDTH, FPS = 12, 16, 10
SIDE = 64
"""Of the pictures in the video."""


def write_info(directory: Path, **changed: Any) -> Path:
    """The directory, with a `meta/info.json`; None takes a key away."""

    def feature(dtype: str, *shape: int) -> dict[str, Any]:
        return {"dtype": dtype, "shape": list(shape), "names": None}

    content = {
        "codebase_version": "v3.0",
        "fps": FPS,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {
            FRONT: feature("image", HEIGHT, WIDTH, 3),
            WRIST: feature("video", SIDE, SIDE, 3),
            "observation.state": feature("float32", 4),
            "action": feature("float32", 3),
        },
    } | changed
    (directory / "meta").mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: value for name, value in content.items() if value is not None})
    (directory / "meta" / "info.json").write_text(text)
    return directory


def features(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write the features again, changed."""
    content = json.loads((directory / "meta" / "info.json").read_text())
    change(content["features"])
    (directory / "meta" / "info.json").write_text(json.dumps(content))


def picture(height: int = HEIGHT, width: int = WIDTH, mode: str = "RGB", kind: str = "PNG", grey: int = 9) -> bytes:
    packed = io.BytesIO()
    Image.new(mode, (width, height), (grey,) * len(mode) if len(mode) > 1 else grey).save(packed, kind)
    return packed.getvalue()


def write_video(
    path: Path,
    frames: int,
    height: int = SIDE,
    width: int = SIDE,
    rate: int = FPS,
    kind: str = "mp4",
    step: int = 20,
    **options: str,
) -> None:
    """A video whose frame n is grey, `step` n + 10; `options` are the encoder's."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream("mpeg4", rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(frames):
            pixels: NDArray[np.uint8] = np.full((height, width, 3), step * number + 10, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def tables() -> dict[str, dict[str, Any]]:
    """File -> column -> values."""
    rng = np.random.default_rng(0)
    count = sum(LENGTHS)
    frame = np.concatenate([np.arange(length) for length in LENGTHS])
    starts = np.cumsum([0, *LENGTHS[:-1]])
    return {
        DATA: {
            "observation.state": rng.normal(size=(count, 4)).astype(np.float32).tolist(),
            "action": rng.normal(size=(count, 3)).astype(np.float32).tolist(),
            "timestamp": (frame / FPS).tolist(),
            "frame_index": frame.tolist(),
            "episode_index": np.repeat([0, 1, 2], LENGTHS).tolist(),
            "task_index": np.repeat([0, 1, 0], LENGTHS).tolist(),
            FRONT: [{"bytes": picture(grey=20 * number), "path": "x.png"} for number in range(count)],
        },
        EPISODES: {
            "episode_index": [0, 1, 2],
            "tasks": [[instruction] for instruction in INSTRUCTIONS],
            "length": list(LENGTHS),
            "data/chunk_index": [0, 0, 0],
            "data/file_index": [0, 0, 0],
            f"videos/{WRIST}/chunk_index": [0, 0, 0],
            f"videos/{WRIST}/file_index": [0, 0, 0],
            f"videos/{WRIST}/from_timestamp": (starts / FPS).tolist(),
        },
        TASKS: {"task_index": [0, 1], "task": ["put it there", "Dance"]},
    }


def write_table(path: Path, columns: dict[str, Any], rows_of_a_group: int = 4) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows_of_a_group)


def write(directory: Path) -> Path:
    """The directory, with all of the dataset."""
    write_info(directory)
    for name, columns in tables().items():
        write_table(directory / name, columns)
    write_video(directory / VIDEO, sum(LENGTHS))
    return directory
