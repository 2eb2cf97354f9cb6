"""LeRobotDataset, version 3: a directory of Parquet tables with many episodes each, and of pictures in them or in MP4.

    meta/info.json                          the features, see `lerobot_info`
    meta/tasks.parquet                      task_index and instruction
    meta/episodes/chunk-*/file-*.parquet    for each episode, its instruction and where it lies
    data/chunk-*/file-*.parquet             all frames, those of an episode one after the other
    videos/KEY/chunk-*/file-*.mp4           all pictures of a camera, unless `data` has them

It is read with pyarrow and PyAV, and not with LeRobot's own class: LeRobot 0.4.4 wants torch below 2.11, and 0.6 wants
Python 3.12 with torch below 2.12, NumPy below 2.3 and Pillow below 13, so that it cannot be installed beside the torch
that this project is used with; its class would also ask the network for a dataset that lacks a file. The tables are
few and documented, and the two libraries are those that LeRobot reads them with.
"""

from __future__ import annotations

import functools
import io
import itertools
import logging
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from dsrl_async import untrusted
from dsrl_async.demonstrations import parquet, trial
from dsrl_async.demonstrations.episode import MOST_FRAMES, Demonstration, Wanted, check_numbers, find_task
from dsrl_async.demonstrations.lerobot_info import Camera, Info
from dsrl_async.untrusted import shown

logger = logging.getLogger(__name__)

SECONDS = 60.0
"""How long it may take until the next table, or the next picture, has been read."""
MEMORY = 8 << 30
"""Bytes that reading may take: a file can say that it is larger than it is."""
INSTRUCTION = ("task", "__index_level_0__")
"""The column of meta/tasks.parquet: it is the index of a table in pandas, which has no name in older versions."""


class Episode(NamedTuple):
    """Where an episode lies."""

    number: int
    length: int
    task_index: int
    """Among the environment's."""
    instruction: str | None
    data: tuple[int, int]
    """Chunk and file."""
    videos: dict[str, tuple[int, int, float]]
    """Camera -> chunk, file, and the time in seconds at which the episode begins there."""


def read(info: Info, wanted: Wanted) -> Iterator[Demonstration]:
    """See `demonstrations.read`; all of it, with the pictures, has been read once when the first is given."""
    if (said := trial.problem(_read_all, info, wanted, seconds=SECONDS)) is not None:
        raise ValueError(said if said.startswith(str(info.directory)) else f"{info.directory} cannot be used: {said}")
    counted: Counter[str] = Counter()
    yield from _demonstrations(info, wanted, counted)
    if left_out := {why: count for why, count in counted.items() if why and count}:
        what = " and ".join(f"{count} that {why}" for why, count in left_out.items())
        logger.info("%s: of %d episodes, %s are left out", info.directory, counted.total(), what)


def _read_all(info: Info, wanted: Wanted, sender: Connection) -> None:
    """Sends what is wrong with a dataset, or nothing."""
    with trial.telling(sender):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
        going_on = partial(sender.send_bytes, trial.GOING_ON)
        for demonstration in _demonstrations(info, wanted, Counter(), going_on):
            for _ in demonstration.pictures(len(demonstration.state)):
                going_on()


def _demonstrations(
    info: Info, wanted: Wanted, counted: Counter[str], going_on: Callable[[], object] = lambda: None
) -> Iterator[Demonstration]:
    """The episodes that can be learned from; `counted` gets how many there are, and how many are left out, and why.

    `going_on` is called for each table and each episode.
    """
    instructions = _instructions(info)
    going_on()
    episodes = _episodes(info, wanted, instructions, counted, going_on)
    episodes.sort(key=lambda episode: (episode.data, episode.number))
    for file, group in itertools.groupby(episodes, lambda episode: episode.data):
        with parquet.opened(info.data_file(*file)) as table:
            frames = _Frames(info, table, instructions, wanted)
            for episode in group:
                demonstration = frames.demonstration(episode)
                going_on()
                counted["never succeed" if demonstration is None else ""] += 1
                if demonstration is not None:
                    yield demonstration
    if not counted[""]:
        raise ValueError(
            f"{info.directory}: none of its {len(episodes)} episodes of the environment's tasks succeeds, as "
            f"{info.success} says, and only those that do are learned from"
        )


def _episodes(
    info: Info, wanted: Wanted, instructions: dict[int, str], counted: Counter[str], going_on: Callable[[], object]
) -> list[Episode]:
    """Those of the environment's tasks; raises ValueError if there are none."""
    paths = sorted(info.directory.glob("meta/episodes/chunk-*/file-*.parquet"))
    if not paths:
        raise ValueError(f"{info.directory}: meta/episodes/chunk-000/file-000.parquet is missing")
    of_cameras = [camera.key for camera in info.cameras if camera.is_video]
    names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    names += [f"videos/{key}/{what}" for key in of_cameras for what in ("chunk_index", "file_index")]
    times = [f"videos/{key}/from_timestamp" for key in of_cameras]
    found: dict[int, Episode] = {}
    others: dict[int, str | None] = {}
    tasks_of = functools.cache(partial(_tasks_of_frames, info, instructions))
    for path in paths:
        with parquet.opened(path) as table:
            tasks = ["tasks"] if parquet.has(table, "tasks") else []
            columns = parquet.columns(table, [*names, *times, *tasks])
        going_on()
        whole = {name: parquet.whole_numbers(columns[name], f"{path}: {name}").tolist() for name in names}
        begins = {name: _times(columns[name], f"{path}: {name}").tolist() for name in times}
        for row, number in enumerate(whole["episode_index"]):
            if number in found or number in others:
                raise ValueError(f"{path} has the episode {number} twice")
            place = whole["data/chunk_index"][row], whole["data/file_index"][row]
            said = columns["tasks"][row].as_py() if tasks else tasks_of(*place).get(number)
            going_on()
            instruction = _instruction(said, f"{path}: tasks of episode {number}")
            if (task := find_task(wanted, instruction)) is None:
                others[number] = instruction
                continue
            if not 0 < whole["length"][row] <= MOST_FRAMES:
                raise ValueError(
                    f"{path}: episode {number} has {whole['length'][row]} frames; 1 to {MOST_FRAMES} can be read"
                )
            videos = {
                key: (
                    whole[f"videos/{key}/chunk_index"][row],
                    whole[f"videos/{key}/file_index"][row],
                    begins[f"videos/{key}/from_timestamp"][row],
                )
                for key in of_cameras
            }
            found[number] = Episode(number, whole["length"][row], task, instruction, place, videos)
    counted["have another task than the environment"] = len(others)
    if not found:
        what = "has no episodes"
        if others:
            first, here = shown(next(iter(others.values()))), shown(wanted.prompts[0])
            what = (
                f"has {len(others)} episodes, none with an instruction of the environment's {len(wanted.prompts)}; "
                f"the first one's is {first}, the environment's {here}"
            )
        raise ValueError(f"{info.directory} {what}")
    return list(found.values())


def _tasks_of_frames(info: Info, instructions: dict[int, str], chunk: int, file: int) -> dict[int, list[str]]:
    """Episode -> the instructions that its frames have.

    It is for datasets whose meta/episodes lacks `tasks`: that of lerobot/libero does.
    """
    path = info.data_file(chunk, file)
    with parquet.opened(path) as table:
        columns = parquet.columns(table, ["episode_index", "task_index"])
        pairs = np.stack([parquet.whole_numbers(column, f"{path}: {name}") for name, column in columns.items()], 1)
    found: dict[int, list[str]] = {}
    for number, task in np.unique(pairs, axis=0).tolist():
        found.setdefault(number, []).append(_instruction_of(instructions, task, f"{path}: episode {number}"))
    return found


def _instruction_of(instructions: dict[int, str], task: int, place: str) -> str:
    if task not in instructions:
        raise ValueError(f"{place} has the task_index {task}, which meta/tasks.parquet does not have")
    return instructions[task]


def _instruction(said: Any, what: str) -> str | None:
    """An episode's."""
    if not isinstance(said, list) or len(said) > 1 or not all(isinstance(one, str) for one in said):
        raise ValueError(f"{what} must be one instruction, not {shown(said)}")
    return said[0] if said else None


def _instructions(info: Info) -> dict[int, str]:
    """What meta/tasks.parquet says: task_index -> instruction."""
    path = info.directory / "meta" / "tasks.parquet"
    with parquet.opened(path) as table:
        name = next((name for name in INSTRUCTION if parquet.has(table, name)), INSTRUCTION[0])
        columns = parquet.columns(table, ["task_index", name])
        numbers = parquet.whole_numbers(columns["task_index"], f"{path}: task_index").tolist()
        texts = columns[name].to_pylist()
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}: {name} must be texts in every row")
        return dict(zip(numbers, texts, strict=True))


class _Frames:
    """The frames of a table of `data`: all but the pictures at once."""

    def __init__(self, info: Info, table: parquet.Table, instructions: dict[int, str], wanted: Wanted) -> None:
        self._info, self._table, self._instructions, self._wanted = info, table, instructions, wanted
        whole = ("episode_index", "frame_index", "task_index")
        marks = [] if info.success is None else [info.success]
        columns = parquet.columns(table, [*whole, "timestamp", info.state, info.action, *marks])
        self._whole = {name: parquet.whole_numbers(columns[name], f"{table.path}: {name}") for name in whole}
        self._times = _times(columns["timestamp"], f"{table.path}: timestamp")
        self._state = parquet.numbers(columns[info.state], wanted.state_dim, f"{table.path}: {info.state}")
        self._action = parquet.numbers(columns[info.action], wanted.action_dim, f"{table.path}: {info.action}")
        self._marks = [parquet.numbers(columns[name], None, f"{table.path}: {name}") for name in marks]

    def demonstration(self, episode: Episode) -> Demonstration | None:
        """That of an episode, None if it never succeeds; raises ValueError for whatever is wrong with it."""
        info, wanted, count = self._info, self._wanted, episode.length
        place = f"{self._table.path}: episode {episode.number}"
        rows = np.flatnonzero(self._whole["episode_index"] == episode.number)
        if len(rows) != count or not np.array_equal(self._whole["frame_index"][rows], np.arange(count)):
            raise ValueError(
                f"{place} has {len(rows)} frames here; as meta/episodes says, it must be {count}, which frame_index "
                "counts from 0"
            )
        start = int(rows[0])
        if rows[-1] != start + count - 1:
            raise ValueError(f"{place} has frames of others in between")
        part = slice(start, start + count)
        for task in np.unique(self._whole["task_index"][part]).tolist():
            instruction = _instruction_of(self._instructions, task, place)
            if instruction != episode.instruction:
                raise ValueError(
                    f"{place} has the instruction {shown(instruction)}, meta/episodes says {shown(episode.instruction)}"
                )
        state = check_numbers(self._state[part], (count, wanted.state_dim), f"{place}: {info.state}")
        action = check_numbers(self._action[part], (count, wanted.action_dim), f"{place}: {info.action}")
        success = self._success(part, place)
        if success is None:
            return None
        pictures = partial(self._pictures, episode, start)
        return Demonstration(place, state, action, success, episode.task_index, pictures)

    def _success(self, part: slice, place: str) -> int | None:
        """The frame of the first action that led to success, None if there is none.

        Where nothing says when the task succeeded, it did at the end, as LeRobot's recordings do.
        """
        count = part.stop - part.start
        if not self._marks:
            return count - 1
        marks = check_numbers(self._marks[0][part].astype(np.float32), (count,), f"{place}: {self._info.success}")
        if not np.isin(marks, (0, 1)).all():
            raise ValueError(
                f"{place}: {self._info.success} has other values than 0 and 1, which do not say when the task "
                "succeeded; add next.success, which does, or remove it"
            )
        marked = np.flatnonzero(marks)
        return int(marked[0]) if len(marked) else None

    def _pictures(self, episode: Episode, start: int, count: int) -> Iterator[tuple[NDArray[np.uint8], ...]]:
        cameras = [self._of_camera(camera, episode, start, count) for camera in self._info.cameras]
        for row in zip(*cameras, strict=True):
            # Datasets of LIBERO in this format are turned already, as the environment's pictures are by default.
            yield row if self._wanted.turned else tuple(np.ascontiguousarray(one[::-1, ::-1]) for one in row)

    def _of_camera(self, camera: Camera, episode: Episode, start: int, count: int) -> Iterator[NDArray[np.uint8]]:
        if not camera.is_video:
            return self._stored(camera, start, count)
        from dsrl_async.demonstrations import videos

        chunk, file, begin = episode.videos[camera.key]
        path = self._info.video_file(camera, chunk, file)
        times = begin + self._times[start : start + count]
        if (np.diff(times) <= 0).any():
            raise ValueError(f"{self._table.path}: episode {episode.number}: timestamp must rise")
        return videos.pictures_at(path, times, self._info.fps, camera.height, camera.width)

    def _stored(self, camera: Camera, start: int, count: int) -> Iterator[NDArray[np.uint8]]:
        row, path = start, self._table.path
        for batch in parquet.batches(self._table, camera.key, start, count):
            if not pa.types.is_struct(batch.type) or batch.type.get_field_index("bytes") < 0:
                raise ValueError(f"{path}: {camera.key} must hold files of pictures (bytes), not {batch.type}")
            for content in batch.field("bytes"):
                yield _picture(content.as_py(), camera, f"{path}: {camera.key} of row {row}")
                row += 1


def _picture(content: Any, camera: Camera, what: str) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]; raises ValueError if it is anything else than such a PNG or JPEG."""
    if not isinstance(content, bytes):
        raise ValueError(f"{what} is not in the table")
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            size, mode = image.size, image.mode
            values = np.asarray(image) if (size, mode) == ((camera.width, camera.height), "RGB") else None
    except Exception as error:  # the library's own are of many kinds
        raise ValueError(f"{what} is not a PNG or JPEG that can be read: {untrusted.in_one_line(error)}") from error
    if values is None:
        raise ValueError(
            f"{what} is {mode} of {size[0]} x {size[1]} pixels; meta/info.json says RGB of {camera.width} x "
            f"{camera.height}"
        )
    return values


def _times(column: pa.ChunkedArray, what: str) -> NDArray[np.float64]:
    times = parquet.numbers(column, None, what).astype(np.float64)
    if not np.isfinite(times).all() or (times < 0).any():
        raise ValueError(f"{what} must be seconds from 0 on")
    return times
