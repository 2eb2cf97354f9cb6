"""Reading LeRobotDatasets, and that whatever is wrong with one is a sentence that names the file. It needs pyarrow."""

from __future__ import annotations

import os
import signal
import tarfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.lerobot_dataset import (
    DATA,
    EPISODES,
    FPS,
    FRONT,
    LENGTHS,
    SIDE,
    TASKS,
    VIDEO,
    WANTED,
    WRIST,
    features,
    picture,
    tables,
    write,
    write_table,
    write_video,
)
from support.paths import ROOT

from dsrl_async.demonstrations import Demonstration, Wanted, lerobot_info, read

for library in ("pyarrow", "av"):
    pytest.importorskip(library, reason="the extra `demonstrations` is not installed")

from dsrl_async.demonstrations import lerobot, parquet, trial, videos  # noqa: E402  # they import pyarrow


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write(tmp_path / "dataset")


def pictures_of(demonstration: Demonstration, count: int) -> list[list[np.ndarray]]:
    return [list(row) for row in demonstration.pictures(count)]


def test_what_lerobot_wrote(tmp_path: Path) -> None:
    with tarfile.open(ROOT / "tests" / "fixtures" / "lerobot_v3.tar.gz") as packed:
        packed.extractall(tmp_path, filter="data")
    wanted = Wanted(cameras=2, state_dim=2, action_dim=3, prompts=("close it", "open it"), turned=True)
    seen = []
    for demonstration in read(tmp_path, wanted):
        episode, length = int(demonstration.state[0, 0]), len(demonstration.state)
        np.testing.assert_array_equal(demonstration.state[:, 1], np.arange(length))
        np.testing.assert_array_equal(demonstration.action, np.c_[demonstration.state, np.full(length, 0.5)])
        assert demonstration.success == length - 1
        for frame, (front, wrist) in enumerate(pictures_of(demonstration, length)):
            grey = 20 * (4 * episode + frame) + 10
            assert front.shape == (12, 16, 3)
            assert (front == grey).all()
            assert wrist.shape == (64, 64, 3)
            assert np.abs(wrist.astype(int) - grey).max() <= 3
        seen.append((episode, length, demonstration.task_index))
    assert seen == [(0, 4, 1), (1, 5, 0), (2, 3, 1)]


@pytest.mark.parametrize("rows_at_once", [parquet.ROWS_AT_ONCE, 2])
def test_episodes_of_the_environments_task(dataset: Path, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ROWS_AT_ONCE", rows_at_once)
    shown = tables()[DATA]
    found = []
    for demonstration in read(dataset, WANTED):
        count = len(demonstration.state)
        start = 0 if count == LENGTHS[0] else sum(LENGTHS[:2])
        np.testing.assert_array_equal(
            demonstration.state, np.float32(shown["observation.state"][start : start + count])
        )
        np.testing.assert_array_equal(demonstration.action, np.float32(shown["action"][start : start + count]))
        assert (demonstration.success, demonstration.task_index) == (count - 1, 0)
        for number, (front, wrist) in enumerate(pictures_of(demonstration, count), start):
            assert (front == 20 * number).all()
            assert np.abs(wrist.astype(int) - (20 * number + 10)).max() <= 3
        found.append(demonstration.place)
    assert found == [f"{dataset / DATA}: episode 0", f"{dataset / DATA}: episode 2"]


def test_pictures_are_turned_back_where_the_environment_does_not_turn_them(dataset: Path) -> None:
    from PIL import Image

    columns = tables()[DATA]
    marked = dataset / "marked.png"
    image = Image.new("RGB", (16, 12))
    image.putpixel((0, 0), (255, 0, 0))
    image.save(marked)
    columns[FRONT] = [{"bytes": marked.read_bytes(), "path": None}] * len(columns["action"])
    write_table(dataset / DATA, columns)
    for turned, corner in ((True, (0, 0)), (False, (11, 15))):
        found = read(dataset, WANTED._replace(turned=turned))
        ((front, _),) = pictures_of(next(found), 1)
        assert np.argwhere(front[..., 0]).tolist() == [list(corner)]


def test_pictures_that_stand_in_a_video_in_another_order(tmp_path: Path) -> None:
    video, times = tmp_path / "a.mp4", np.arange(48) / FPS
    write_video(video, len(times), step=5, bf="2", g="12", qmax="2")
    whole = [picture.mean() for picture in videos.pictures_at(video, times, FPS, SIDE, SIDE)]
    assert np.abs(whole - (5 * np.arange(len(times)) + 10)).max() <= 2
    for first in range(1, 46, 4):
        part = videos.pictures_at(video, times[first : first + 3], FPS, SIDE, SIDE)
        assert [picture.mean() for picture in part] == whole[first : first + 3]


def test_cameras_in_the_order_that_was_asked_for(dataset: Path) -> None:
    found = read(dataset, WANTED._replace(camera_keys=(WRIST, FRONT)))
    assert [picture.shape[0] for picture in pictures_of(next(found), 1)[0]] == [SIDE, 12]


@pytest.mark.parametrize(
    ("marks", "found"),
    [
        ([0, 1, 1, 0, 0, 0, 0, 0, 1, 0], [1, 1]),
        ([0, 0, 0, 1, 0, 0, 0, 0, 0, 0], [3]),
    ],
    ids=["the first counts", "what never succeeds is left out"],
)
@pytest.mark.parametrize("name", ["next.success", "next.reward"])
def test_what_says_success(dataset: Path, name: str, marks: list[int], found: list[int]) -> None:
    features(dataset, lambda all: all.update({name: {"dtype": "float32", "shape": [1]}}))
    marked = [[bool(mark)] if name == "next.success" else float(mark) for mark in marks]
    write_table(
        dataset / DATA, tables()[DATA] | {name: [value[0] if isinstance(value, list) else value for value in marked]}
    )
    assert [demonstration.success for demonstration in read(dataset, WANTED)] == found


def test_an_index_of_pandas_without_a_name(dataset: Path) -> None:
    write_table(dataset / TASKS, {"task_index": [0, 1], "__index_level_0__": ["put it there", "Dance"]})
    assert len(list(read(dataset, WANTED))) == 2


def test_a_dataset_whose_episodes_do_not_say_their_tasks(dataset: Path) -> None:
    column(EPISODES, "tasks", gone)(dataset)
    found = [(demonstration.place, demonstration.task_index) for demonstration in read(dataset, WANTED)]
    assert found == [(f"{dataset / DATA}: episode {number}", 0) for number in (0, 2)]
    write_table(dataset / DATA, tables()[DATA] | {"task_index": [0, 1, *tables()[DATA]["task_index"][2:]]})
    with pytest.raises(ValueError, match=r"episode 0 must be one instruction, not \['put it there', 'Dance'\]"):
        next(read(dataset, WANTED))
    write_table(dataset / DATA, tables()[DATA] | {"task_index": [7] * FRAMES})
    with pytest.raises(ValueError, match="has the task_index 7, which"):
        next(read(dataset, WANTED))


@pytest.mark.parametrize("says_tasks", [True, False])
def test_each_table_is_a_sign_that_it_is_going_on(
    dataset: Path, says_tasks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the limit on time is none on the size of a dataset."""
    if not says_tasks:
        column(EPISODES, "tasks", gone)(dataset)
    happened, opened = list[bytes](), parquet.opened

    def opened_now(path: Path) -> AbstractContextManager[parquet.Table]:
        happened.append(path.name.encode())
        return opened(path)

    class Sender:
        send_bytes = staticmethod(happened.append)

    monkeypatch.setattr(parquet, "opened", opened_now)
    monkeypatch.setattr(lerobot.resource, "setrlimit", lambda *_: None)
    lerobot._read_all(lerobot_info.read_info(dataset, WANTED), WANTED, cast(Connection, Sender()))
    assert happened[-1] == b""
    tables_read = [place for place, what in enumerate(happened) if what.endswith(b".parquet")]
    assert len(tables_read) == (3 if says_tasks else 4)
    assert all(happened[place + 1] == trial.GOING_ON for place in tables_read)


Change = Callable[[Path], object]


def column(file: str, name: str, change: Callable[[list[Any]], Any]) -> Change:
    """Changes a column in place, or puts what is returned in its place; None takes it away."""

    def apply(dataset: Path) -> None:
        columns = tables()[file]
        columns[name] = change(columns[name])
        write_table(dataset / file, {key: value for key, value in columns.items() if value is not None})

    return apply


def at(row: int, value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [*values[:row], value, *values[row + 1 :]]


def gone(values: list[Any]) -> None:
    return None


def with_feature(name: str, values: list[Any]) -> Change:
    def apply(dataset: Path) -> None:
        features(dataset, lambda all: all.update({name: {"dtype": "float32", "shape": [1]}}))
        write_table(dataset / DATA, tables()[DATA] | {name: values})

    return apply


def content(file: str, data: bytes) -> Change:
    return lambda dataset: (dataset / file).write_bytes(data)


def cut(file: str, share: float) -> Change:
    return lambda dataset: os.truncate(dataset / file, int((dataset / file).stat().st_size * share))


def pipe(file: str) -> Change:
    def apply(dataset: Path) -> None:
        (dataset / file).unlink()
        os.mkfifo(dataset / file)

    return apply


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
FRAMES = sum(LENGTHS)
CHANGES: list[tuple[Change, str, str]] = [
    (column(DATA, "action", gone), DATA, "has no column action"),
    (column(DATA, FRONT, gone), DATA, f"has no column {FRONT}"),
    (column(DATA, "timestamp", gone), DATA, "has no column timestamp"),
    (column(DATA, "action", lambda rows: [[0.0] * 4] * FRAMES), DATA, "action must be lists of 3 numbers"),
    (column(DATA, "action", at(1, [0.0])), DATA, "action must be lists of 3 numbers"),
    (column(DATA, "action", at(1, None)), DATA, "action must be lists of 3 numbers"),
    (column(DATA, "action", at(1, [0.0, None, 1.0])), DATA, "action must be numbers in every row"),
    (column(DATA, "action", lambda rows: [["a"] * 3] * FRAMES), DATA, "action must be numbers in every row"),
    (column(DATA, "action", lambda rows: [1.0] * FRAMES), DATA, "action must be lists of 3 numbers, not double"),
    (
        column(DATA, "action", at(0, [0.0, float("inf"), 0.0])),
        DATA,
        "episode 0: action has numbers that are not finite",
    ),
    (column(DATA, "observation.state", at(0, [float("nan")] * 4)), DATA, "observation.state has numbers that are not"),
    (column(DATA, "frame_index", at(1, 2)), DATA, "episode 0 has 4 frames here; as meta/episodes says, it must be 4"),
    (column(DATA, "episode_index", at(0, 1)), DATA, "episode 0 has 3 frames here"),
    (column(DATA, "episode_index", at(0, -1)), DATA, "episode_index must be whole numbers from 0 on"),
    (column(DATA, "episode_index", at(0, 1 << 40)), DATA, "episode_index must be whole numbers from 0 on"),
    (column(DATA, "episode_index", lambda rows: [0.5] * FRAMES), DATA, "episode_index must be whole numbers"),
    (column(DATA, "task_index", at(0, 7)), DATA, "has the task_index 7, which meta/tasks.parquet does not have"),
    (column(DATA, "task_index", at(0, 1)), DATA, "has the instruction 'Dance', meta/episodes says 'put it there'"),
    (column(DATA, "timestamp", at(1, float("nan"))), DATA, "timestamp must be seconds from 0 on"),
    (column(DATA, "timestamp", at(1, 0.0)), DATA, "timestamp must rise"),
    (column(DATA, FRONT, lambda rows: [b"x"] * FRAMES), DATA, "must hold files of pictures (bytes)"),
    (column(DATA, FRONT, at(2, {"bytes": None, "path": "/etc/x"})), DATA, f"{FRONT} of row 2 is not in the table"),
    (column(DATA, FRONT, at(2, {"bytes": b"GIF89a", "path": ""})), DATA, "of row 2 is not a PNG or JPEG"),
    (column(DATA, FRONT, at(2, {"bytes": picture(kind="GIF", mode="L"), "path": ""})), DATA, "is not a PNG or JPEG"),
    (column(DATA, FRONT, at(2, {"bytes": picture()[:50], "path": ""})), DATA, "of row 2 is not a PNG or JPEG"),
    (
        column(DATA, FRONT, at(2, {"bytes": picture(9, 9), "path": ""})),
        DATA,
        "is RGB of 9 x 9 pixels; meta/info.json says",
    ),
    (column(DATA, FRONT, at(2, {"bytes": picture(mode="L"), "path": ""})), DATA, "row 2 is L of 16 x 12 pixels"),
    (with_feature("next.success", [0.0] * FRAMES), "", "none of its 2 episodes of the environment's tasks succeeds"),
    (with_feature("next.reward", [0.5] * FRAMES), DATA, "next.reward has other values than 0 and 1"),
    (lambda dataset: (dataset / DATA).unlink(), DATA, "No such file"),
    (content(DATA, b""), DATA, "cannot be read"),
    (content(DATA, POINTER), DATA, "git-LFS pointer"),
    (content(TASKS, POINTER), TASKS, "git-LFS pointer"),
    (cut(DATA, 0.5), DATA, "cannot be read"),
    (cut(EPISODES, 0.5), EPISODES, "cannot be read"),
    (pipe(DATA), DATA, "it is not a regular file"),
    (column(TASKS, "task", gone), TASKS, "has no column task"),
    (column(TASKS, "task", lambda rows: [1, 2]), TASKS, "task must be texts"),
    (lambda dataset: (dataset / EPISODES).unlink(), "", "meta/episodes/chunk-000/file-000.parquet is missing"),
    (
        column(EPISODES, "tasks", lambda rows: [["Dance"]] * 3),
        "",
        "has 3 episodes, none with an instruction of the env",
    ),
    (column(EPISODES, "tasks", at(0, ["a", "b"])), EPISODES, "tasks of episode 0 must be one instruction"),
    (column(EPISODES, "tasks", lambda rows: ["put it there"] * 3), EPISODES, "must be one instruction"),
    (column(EPISODES, "episode_index", at(1, 0)), EPISODES, "has the episode 0 twice"),
    (column(EPISODES, "length", at(0, 1 << 30)), EPISODES, "episode 0 has 1073741824 frames; 1 to 100000 can be read"),
    (column(EPISODES, "length", at(0, 0)), EPISODES, "episode 0 has 0 frames"),
    (column(EPISODES, "length", at(0, 3)), DATA, "episode 0 has 4 frames here; as meta/episodes says, it must be 3"),
    (column(EPISODES, "data/file_index", at(0, 7)), "file-007.parquet", "No such file"),
    (column(EPISODES, "data/file_index", at(0, -1)), EPISODES, "data/file_index must be whole numbers from 0 on"),
    (
        column(EPISODES, f"videos/{WRIST}/from_timestamp", gone),
        EPISODES,
        f"has no column videos/{WRIST}/from_timestamp",
    ),
    (column(EPISODES, f"videos/{WRIST}/from_timestamp", at(0, 50.0)), VIDEO, "where a picture should be"),
    (column(EPISODES, f"videos/{WRIST}/from_timestamp", at(0, 0.05)), VIDEO, "has no picture at 0.050 s"),
    (lambda dataset: (dataset / VIDEO).unlink(), VIDEO, "No such file"),
    (lambda dataset: write_video(dataset / VIDEO, FRAMES - 1), VIDEO, "ends before 0.900 s, where a picture should be"),
    (lambda dataset: write_video(dataset / VIDEO, FRAMES, rate=5), VIDEO, "has no picture at 0.100 s"),
    (lambda dataset: write_video(dataset / VIDEO, FRAMES, 32, 48), VIDEO, "has pictures of 48 x 32 pixels, meta/info"),
    (content(VIDEO, b"nothing"), VIDEO, "cannot be read"),
    (content(VIDEO, PLAYLIST), VIDEO, "cannot be read"),
    (lambda dataset: write_video(dataset / VIDEO, FRAMES, kind="matroska"), VIDEO, "cannot be read"),
    (content(VIDEO, POINTER), VIDEO, "git-LFS pointer"),
    (cut(VIDEO, 0.6), VIDEO, "has no video in it"),
    (pipe(VIDEO), VIDEO, "it is not a regular file"),
]


@pytest.mark.parametrize(("change", "named", "words"), CHANGES, ids=[words[:40] for _, _, words in CHANGES])
def test_whatever_is_wrong_is_one_sentence(dataset: Path, change: Change, named: str, words: str) -> None:
    change(dataset)
    with pytest.raises(ValueError, match="dataset") as caught:
        list(read(dataset, WANTED))
    said = str(caught.value)
    assert words in said
    assert named in said
    assert said.startswith(str(dataset))
    assert "\n" not in said


def test_tables_that_say_they_are_huge(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, words in (("MOST_ROWS", "rows; 2 can be read"), ("LARGEST_COLUMNS", "bytes; 2 can be read")):
        with monkeypatch.context() as patch:
            patch.setattr(parquet, limit, 2)
            with pytest.raises(ValueError, match=words):
                list(read(dataset, WANTED))


def crash(info: lerobot_info.Info, wanted: Wanted, sender: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_crash_of_a_library_is_one_sentence(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lerobot, "_read_all", crash)
    with pytest.raises(ValueError, match="reading it ended the process that tried to"):
        list(read(dataset, WANTED))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_one_sentence_or_what_can_be_read(
    dataset: Path, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot, "SECONDS", 3.0)  # from some damage the libraries do not come back
    path = dataset / data.draw(st.sampled_from([DATA, EPISODES, TASKS, VIDEO]))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=8)):
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    said = str(dataset)
    try:
        for demonstration in read(dataset, WANTED):
            assert np.isfinite(demonstration.action).all()
    except ValueError as error:
        said = str(error)
    finally:
        path.write_bytes(whole)
    assert said.startswith(str(dataset))
    assert "\n" not in said
