"""Demonstrations that are damaged, or that mean to lead their reader elsewhere: one sentence with the file."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from rich.console import Console
from support.demonstrations import write_file

from dsrl_async.demonstrations import hdf5
from dsrl_async.pretraining import libero, tabletop


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_file(tmp_path / "a_demo.hdf5")
    return tmp_path / "a_demo.hdf5"


def read(file: Path) -> libero.Frames:
    return libero.read_frames(file.parent, 8, 1, Console(quiet=True))


def replace(group: h5py.Group, name: str, **dataset: object) -> None:
    del group[name]
    group.create_dataset(name, **dataset)


def attribute(**values: object) -> Callable[[h5py.Group, Path], object]:
    return lambda data, outside: data.attrs.update(values)


def link(value: Callable[[Path], object], name: str = "demo_0/actions") -> Callable[[h5py.Group, Path], object]:
    def change(data: h5py.Group, outside: Path) -> None:
        del data[name]
        data[name] = value(outside)

    return change


def virtual(data: h5py.Group, outside: Path) -> None:
    layout = h5py.VirtualLayout((3, 7), np.float32)
    layout[:] = h5py.VirtualSource(str(outside), "data/demo_0/actions", (3, 7))
    del data["demo_0/actions"]
    data.create_virtual_dataset("demo_0/actions", layout)


ACTIONS = "demo_0/actions"
CHANGES: list[tuple[Callable[[h5py.Group, Path], object], str]] = [
    (link(lambda outside: h5py.ExternalLink(str(outside), "/data/demo_0/actions")), "leads somewhere else"),
    (link(lambda outside: h5py.ExternalLink(str(outside), "/data/demo_0"), "demo_0"), "leads somewhere else"),
    (link(lambda outside: h5py.SoftLink("/data/demo_1/actions")), "leads somewhere else"),
    (link(lambda outside: np.dtype("f4")), "is not a dataset"),
    (virtual, "is stored elsewhere"),
    (
        lambda data, outside: replace(data, ACTIONS, shape=(3, 7), dtype="f4", external=[(str(outside), 0, 84)]),
        "is stored elsewhere",
    ),
    (
        lambda data, outside: replace(data, ACTIONS, data=np.zeros((3, 7)), compression="lzf"),
        "packed in another way",
    ),
    (
        lambda data, outside: replace(data, ACTIONS, shape=(3, 7), dtype="f4", chunks=(3, 1 << 26), maxshape=(3, None)),
        "which are too large",
    ),
    (lambda data, outside: replace(data, ACTIONS, shape=(10**12, 7), dtype="f4", chunks=(1, 7)), "frames; 1 to 100000"),
    (lambda data, outside: replace(data, ACTIONS, data=np.zeros((3, 6))), r"of shape \[3, 7\], not float64 of shape"),
    (lambda data, outside: replace(data, ACTIONS, data=np.zeros(())), "has 0 frames"),
    (lambda data, outside: replace(data, ACTIONS, dtype="f4"), "has 0 frames"),
    (lambda data, outside: replace(data, ACTIONS, data=np.full((3, 7), np.nan)), "numbers that are not finite"),
    (lambda data, outside: replace(data, ACTIONS, data=np.full((3, 7), b"1")), "must be numbers"),
    (lambda data, outside: replace(data, "demo_0/obs/robot_state", data=np.zeros((2, 8))), r"of shape \[3, 8\]"),
    (
        lambda data, outside: replace(data, "demo_1/obs/agentview_rgb", data=np.zeros((3, 9, 9, 3), np.uint8)),
        r"must be uint8 of shape \[3, 8, 8, 3\]",
    ),
    (lambda data, outside: data.__delitem__("demo_1/obs/agentview_rgb"), "/obs/agentview_rgb is missing"),
    (lambda data, outside: data.__delitem__("demo_1/obs"), "/obs is missing"),
    (lambda data, outside: data.create_group("mask"), "'mask' beside the episodes"),
    (lambda data, outside: data.create_group("demo_-1"), "'demo_-1' beside the episodes"),
    (lambda data, outside: [data.__delitem__(name) for name in ("demo_0", "demo_1")], "it has 0 episodes"),
    (lambda data, outside: data["demo_0"].attrs.__delitem__("init_state"), "/data/demo_0 has no attribute init_state"),
    (lambda data, outside: data["demo_0"].attrs.update(init_state=[1, 2]), "must be one number"),
    (lambda data, outside: data["demo_0"].attrs.update(init_state=0.5), "must be one number"),
    (attribute(versions="{"), "is not JSON"),
    (attribute(versions="[" * 100_000), "nested too deeply"),
    (attribute(image_size=0), "image_size is 0; it must be from 1 to 1024"),
    (attribute(image_size=10**9), "it must be from 1 to 1024"),
    (attribute(suite=5), "must be one text"),
    (attribute(language_instruction="a\nb"), "is not printable text"),
    (attribute(language_instruction=np.bytes_(b"\xff")), "is not printable text|can't decode"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=[words[:30] for _, words in CHANGES])
def test_what_is_not_a_demonstration_is_one_sentence(
    file: Path, tmp_path: Path, change: Callable[[h5py.Group, Path], object], words: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    outside = tmp_path / "elsewhere" / "outside"
    write_file(outside)
    with h5py.File(file, "r+") as opened:
        change(opened["data"], outside)
    with pytest.raises(ValueError, match=words) as caught:
        read(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_whole_demonstrations_are_read(file: Path) -> None:
    assert len(read(file).state) == 6


@pytest.mark.parametrize("size", [0, 10, 100, 1000, 5000])
def test_a_cut_file_is_one_sentence(file: Path, size: int) -> None:
    os.truncate(file, size)
    with pytest.raises(ValueError, match="cannot be used") as caught:
        read(file)
    assert str(caught.value).startswith(str(file))


def test_what_is_not_a_regular_file_is_not_opened(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match="it is not a regular file"):
        read(file)


def test_a_group_in_the_place_of_the_data_is_not_followed(file: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "b", "w") as linked:
        linked["data"] = h5py.ExternalLink(str(file), "/data")
    with pytest.raises(ValueError, match="/data leads somewhere else"), hdf5.opened(tmp_path / "b"):
        pass


def test_damaged_demonstrations_of_the_tabletop_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.safetensors"
    for content, words in ((b"", "is damaged"), (b"\x02" + bytes(7) + b"{}", "lacks action, block_position")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            tabletop.read_demonstrations(path, None, None, "")  # type: ignore[arg-type]  # they are not reached


def hang(path: Path, sender: object) -> None:
    time.sleep(60)


def crash(path: Path, sender: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("behaviour", "words"), [(hang, "was not read within 1 s"), (crash, "ended the process")])
def test_a_file_over_which_the_library_hangs_or_crashes_is_one_sentence(
    file: Path, monkeypatch: pytest.MonkeyPatch, behaviour: Callable[[Path, object], None], words: str
) -> None:
    monkeypatch.setattr(hdf5, "SECONDS", 0.5)
    monkeypatch.setattr(hdf5, "_read_all", behaviour)
    with pytest.raises(ValueError, match=words):
        read(file)
