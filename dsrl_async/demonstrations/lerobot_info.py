"""What `meta/info.json` of a LeRobotDataset says, version 3: its features, of which the run takes some.

The files' names are LeRobot's own, whatever patterns the file gives for them: `data_path` and `video_path` could lead
anywhere, and nothing that LeRobot writes has other ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsrl_async import untrusted
from dsrl_async.demonstrations.episode import Wanted
from dsrl_async.untrusted import shown

INFO = Path("meta", "info.json")
VERSION = re.compile(r"v3\.\d{1,3}", re.ASCII)
PATTERNS = {
    "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
STATE, ACTION = ("observation.state", "state"), ("action", "actions")
"""LeRobot's names, and those of openpi's converters."""
SUCCESS = ("next.success", "next.reward", "next.done")
"""What says when an episode succeeded; the first that there is."""
LARGEST_SIDE = 4096
FASTEST = 1000.0


class Camera(NamedTuple):
    """A camera of a dataset."""

    key: str
    height: int
    width: int
    is_video: bool
    """Its pictures are in videos, not in the tables."""


class Info(NamedTuple):
    """What a run takes from a dataset."""

    directory: Path
    fps: float
    cameras: tuple[Camera, ...]
    """In the environment's order."""
    state: str
    action: str
    success: str | None

    def data_file(self, chunk: int, file: int) -> Path:
        return self.directory / PATTERNS["data_path"].format(chunk_index=chunk, file_index=file)

    def video_file(self, camera: Camera, chunk: int, file: int) -> Path:
        pattern = PATTERNS["video_path"]
        return self.directory / pattern.format(video_key=camera.key, chunk_index=chunk, file_index=file)


def read_info(directory: Path, wanted: Wanted) -> Info:
    """What the file says; raises ValueError, naming it, unless it is of this version and fits the environment."""
    path = directory / INFO
    content = untrusted.read_object(path)
    _check_version(content.get("codebase_version"), path)
    for name, pattern in PATTERNS.items():
        if content.get(name) not in (pattern, None):
            raise ValueError(f"{path}: {name} must be {pattern}, as LeRobot writes it, not {shown(content[name])}")
    fps = content.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= FASTEST:
        raise ValueError(f"{path}: fps must be a number above 0 and up to {FASTEST:g}, not {shown(fps)}")
    features = content.get("features")
    if not isinstance(features, dict) or not all(map(_is_feature, features.values())):
        raise ValueError(f"{path}: features must be a mapping, of objects with dtype and shape")
    for key in features:
        if "/" in key or not key.isprintable() or key in ("", ".", ".."):
            raise ValueError(f"{path}: {shown(key)} cannot be the name of a feature")
    return Info(
        directory,
        float(fps),
        _choose_cameras(features, wanted, path),
        _vector(features, STATE, wanted.state_dim, "state", path),
        _vector(features, ACTION, wanted.action_dim, "action", path),
        next((name for name in SUCCESS if name in features), None),
    )


def _is_feature(feature: Any) -> bool:
    if not isinstance(feature, dict) or not isinstance(feature.get("dtype"), str):
        return False
    shape = feature.get("shape")
    return isinstance(shape, list) and all(type(side) is int and side >= 0 for side in shape)


def _check_version(version: Any, path: Path) -> None:
    if isinstance(version, str) and VERSION.fullmatch(version):
        return
    advice = ""
    if isinstance(version, str) and version.startswith("v2"):
        advice = "; LeRobot converts it: python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 --repo-id=..."
    raise ValueError(f"{path}: codebase_version is {shown(version)}; datasets of version v3.0 are read{advice}")


def _vector(features: Mapping[str, Any], names: tuple[str, ...], width: int, what: str, path: Path) -> str:
    """The name of the feature that is the robot's state or action."""
    name = next((name for name in names if name in features), None)
    if name is None:
        raise ValueError(f"{path} has no feature {names[0]}; it has {', '.join(features) or 'none at all'}")
    if features[name]["shape"] != [width]:
        raise ValueError(
            f"{path}: {name} has the shape {shown(features[name]['shape'])}, the environment's {what} has {width} "
            "numbers; it is of another robot"
        )
    return name


def _choose_cameras(features: Mapping[str, Any], wanted: Wanted, path: Path) -> tuple[Camera, ...]:
    known = [key for key, feature in features.items() if _is_camera(feature)]
    keys = wanted.camera_keys
    if keys is None:
        keys = tuple(known)
        if len(keys) > wanted.cameras:
            raise ValueError(
                f"{path} has {len(keys)} cameras, {', '.join(keys)}, the environment has {wanted.cameras}; say which "
                "ones it has, in its order, by replay.demonstration_cameras"
            )
    if unknown := [key for key in keys if key not in known]:
        raise ValueError(
            f"{path} has no camera {shown(unknown[0])} (replay.demonstration_cameras); it has {', '.join(known)}"
        )
    if len(keys) != wanted.cameras:
        raise ValueError(f"{path} has pictures of {len(keys)} cameras, the environment has {wanted.cameras}")
    return tuple(_camera(key, features[key], path) for key in keys)


def _is_camera(feature: Mapping[str, Any]) -> bool:
    info = feature.get("info")
    depth = isinstance(info, dict) and (info.get("video.is_depth_map") or info.get("is_depth_map"))
    return feature["dtype"] in ("image", "video") and not depth


def _camera(key: str, feature: Mapping[str, Any], path: Path) -> Camera:
    """`shape` has the channels at its end or, as some converters have it, at its beginning, whatever `names` says."""
    shape = feature["shape"]
    sides = shape[:2] if shape[2:] == [3] else shape[1:] if shape[:1] == [3] else []
    if len(sides) != 2 or not all(0 < side <= LARGEST_SIDE for side in sides):
        raise ValueError(
            f"{path}: {key} must have the shape [height, width, 3], with sides of up to {LARGEST_SIDE} pixels, not "
            f"{shown(shape)}"
        )
    return Camera(key, sides[0], sides[1], feature["dtype"] == "video")
