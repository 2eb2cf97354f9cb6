"""What `meta/info.json` of a LeRobotDataset must say, which is looked at without the libraries that read the rest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from support.lerobot_dataset import FRONT, WANTED, WRIST, features, write_info

from dsrl_async.demonstrations import Wanted, read
from dsrl_async.demonstrations.lerobot_info import Camera, read_info


def test_the_features_that_a_run_takes(tmp_path: Path) -> None:
    info = read_info(write_info(tmp_path), WANTED)
    assert info.cameras == (Camera(FRONT, 12, 16, False), Camera(WRIST, 64, 64, True))
    assert (info.state, info.action, info.success, info.fps) == ("observation.state", "action", None, 10.0)
    assert info.data_file(0, 12) == tmp_path / "data/chunk-000/file-012.parquet"
    assert info.video_file(info.cameras[1], 1, 0) == tmp_path / f"videos/{WRIST}/chunk-001/file-000.mp4"


def test_openpis_names_channels_first_and_what_says_success(tmp_path: Path) -> None:
    write_info(
        tmp_path,
        features={
            "wrist_image": {"dtype": "image", "shape": [3, 12, 16]},
            "image": {"dtype": "image", "shape": [24, 16, 3]},
            "state": {"dtype": "float32", "shape": [4]},
            "actions": {"dtype": "float32", "shape": [3]},
            "next.done": {"dtype": "bool", "shape": [1]},
            "next.reward": {"dtype": "float32", "shape": [1]},
        },
    )
    info = read_info(tmp_path, WANTED._replace(camera_keys=("image", "wrist_image")))
    assert info.cameras == (Camera("image", 24, 16, False), Camera("wrist_image", 12, 16, False))
    assert (info.state, info.action, info.success) == ("state", "actions", "next.reward")


def test_a_depth_map_is_no_camera(tmp_path: Path) -> None:
    depth = {"dtype": "video", "shape": [12, 16, 3], "info": {"video.is_depth_map": True}}
    features(write_info(tmp_path), lambda all: all.update(depth=depth))
    assert [camera.key for camera in read_info(tmp_path, WANTED).cameras] == [FRONT, WRIST]
    refused(tmp_path, WANTED._replace(camera_keys=("depth", WRIST)), "has no camera 'depth'")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"codebase_version": "v2.1"}, "lerobot.datasets.v30.convert_dataset_v21_to_v30"),
        ({"codebase_version": None}, "codebase_version is None"),
        ({"codebase_version": "v4.0"}, "codebase_version is 'v4.0'; datasets of version v3.0 are read"),
        ({"codebase_version": "v3.0\n"}, "codebase_version is 'v3.0\\n'"),
        ({"data_path": "../../elsewhere/{file_index}.parquet"}, "data_path must be data/chunk-{chunk_index:03d}"),
        ({"data_path": "data/{chunk_index:999999999d}"}, "data_path must be"),
        ({"video_path": "/etc/passwd"}, "video_path must be videos/{video_key}"),
        ({"fps": 0}, "fps must be a number above 0"),
        ({"fps": True}, "fps must be a number above 0"),
        ({"fps": "10"}, "fps must be a number above 0"),
        ({"features": []}, "features must be a mapping"),
        ({"features": {"action": {"dtype": "float32"}}}, "features must be a mapping"),
        ({"features": {"action": {"dtype": "float32", "shape": [3.0]}}}, "features must be a mapping"),
    ],
)
def test_faults_of_the_file(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    refused(write_info(tmp_path, **changed), WANTED, words)


@pytest.mark.parametrize(
    ("key", "feature", "words"),
    [
        ("action", None, "has no feature action; it has observation.images.front"),
        (
            "observation.state",
            {"dtype": "float32", "shape": [14]},
            "observation.state has the shape [14], the environm",
        ),
        ("action", {"dtype": "float32", "shape": [3, 1]}, "action has the shape [3, 1]"),
        (WRIST, None, "has pictures of 1 cameras, the environment has 2"),
        (
            "observation.images.up",
            {"dtype": "image", "shape": [9, 9, 3]},
            "say which ones it has, in its order, by replay",
        ),
        (WRIST, {"dtype": "video", "shape": [64, 64]}, "must have the shape [height, width, 3]"),
        (WRIST, {"dtype": "video", "shape": [1 << 40, 64, 3]}, "with sides of up to 4096 pixels"),
        (
            "../../elsewhere",
            {"dtype": "image", "shape": [9, 9, 3]},
            "'../../elsewhere' cannot be the name of a feature",
        ),
        ("..", {"dtype": "image", "shape": [9, 9, 3]}, "'..' cannot be the name"),
    ],
)
def test_faults_of_a_feature(tmp_path: Path, key: str, feature: dict[str, Any] | None, words: str) -> None:
    write_info(tmp_path)
    features(tmp_path, lambda all: all.pop(key) if feature is None else all.update({key: feature}))
    refused(tmp_path, WANTED, words)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            (FRONT, "above"),
            "has no camera 'above' (replay.demonstration_cameras); it has observation.images.front, obs",
        ),
        ((FRONT,), "has pictures of 1 cameras, the environment has 2"),
        ((FRONT, "action"), "has no camera 'action'"),
    ],
)
def test_cameras_that_it_does_not_have(tmp_path: Path, keys: tuple[str, ...], words: str) -> None:
    refused(write_info(tmp_path), WANTED._replace(camera_keys=keys), words)


def test_what_is_no_json(tmp_path: Path) -> None:
    (write_info(tmp_path) / "meta" / "info.json").write_text("{")
    refused(tmp_path, WANTED, "is not JSON")


@pytest.mark.parametrize("library", ["pyarrow", "av"])
def test_a_library_that_is_missing(tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "av":
        pytest.importorskip("pyarrow")
    monkeypatch.setitem(sys.modules, library, None)
    refused(
        write_info(tmp_path), WANTED, f"is read with {library}, which is not installed; pip install ", str(tmp_path)
    )


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    refused(tmp_path, WANTED, "or be the directory of a LeRobotDataset, which has meta/info.json", str(tmp_path))


def refused(directory: Path, wanted: Wanted, words: str, named: str = "info.json") -> None:
    with pytest.raises(ValueError, match=named) as caught:
        next(read(directory, wanted))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
