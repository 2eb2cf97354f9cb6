"""LIBERO's HDF5 layout: groups data/demo_0, data/demo_1 and so on, with actions, rewards, and observations in obs.

Where `executed_actions` stand beside `actions`, as our recorder writes them, they are what came before what follows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from dsrl_async import untrusted
from dsrl_async.demonstrations import hdf5
from dsrl_async.demonstrations.episode import Demonstration, Wanted, first_success, task_index

CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
STATE = {"ee_states": 6, "gripper_states": 2}
"""What makes the robot's state, and how wide it is."""
ACTION_DIM = 7
SUPPORTED_CONTROL = "OSC_POSE"


def read(path: Path, wanted: Wanted) -> Iterator[Demonstration]:
    """See `demonstrations.read`."""
    if wanted.cameras > len(CAMERAS):
        raise ValueError(f"{path} has {len(CAMERAS)} cameras, the environment has {wanted.cameras}")
    for what, here, theirs in (
        ("action", ACTION_DIM, wanted.action_dim),
        ("state", sum(STATE.values()), wanted.state_dim),
    ):
        if here != theirs:
            raise ValueError(f"{path}: LIBERO's {what} has {here} numbers, the environment's has {theirs}")
    with hdf5.opened(path) as data:
        _check_control(data)
        task = task_index(wanted, _instruction(data), str(path))
        for name, demo in hdf5.episodes(data).items():
            yield _demonstration(demo, f"{path}: {name}", task, wanted)


def _demonstration(demo: h5py.Group, place: str, task: int, wanted: Wanted) -> Demonstration:
    observed = hdf5.child(demo, "obs", h5py.Group)
    actions = "executed_actions" if "executed_actions" in demo else "actions"
    count = hdf5.frames(hdf5.child(demo, actions, h5py.Dataset))
    state = [hdf5.numbers(observed, name, (count, width)) for name, width in STATE.items()]
    marks = hdf5.numbers(demo, "rewards" if "rewards" in demo else "dones", (count,))
    size = None
    for name in CAMERAS[: wanted.cameras]:
        shape = hdf5.child(observed, name, h5py.Dataset).shape
        size = size or (shape[1] if len(shape) > 1 else 0)
        if shape != (count, size, size, 3):
            raise ValueError(f"{observed.name}/{name} must be of shape {[count, 'size', 'size', 3]}, not {list(shape)}")
    return Demonstration(
        place,
        np.concatenate(state, 1),
        hdf5.numbers(demo, actions, (count, ACTION_DIM)),
        first_success(marks > 0, place),
        task,
        functools.partial(_pictures, observed, count, size or 0, wanted),
    )


def _pictures(observed: h5py.Group, total: int, size: int, wanted: Wanted, count: int) -> NDArray[np.uint8]:
    images = np.stack([hdf5.pictures(observed, name, total, size)[:count] for name in CAMERAS[: wanted.cameras]], 1)
    return np.ascontiguousarray(images[:, :, ::-1, ::-1]) if wanted.turned else images


def _instruction(data: h5py.Group) -> str | None:
    """What the task is called, where our recorder or LIBERO's says it."""
    if "language_instruction" in data.attrs:
        said: str = hdf5.attribute(data, "language_instruction", str)
        return said
    if "problem_info" in data.attrs:
        instruction = _object(data, "problem_info").get("language_instruction")
        return instruction if isinstance(instruction, str) else None
    return None


def _check_control(data: h5py.Group) -> None:
    """Raises ValueError if the actions are known to mean something else than a change of the hand's pose."""
    if "env_args" not in data.attrs:
        return
    control = (_object(data, "env_args").get("env_kwargs") or {}).get("controller_configs") or {}
    kind, delta = control.get("type", SUPPORTED_CONTROL), control.get("control_delta", True)
    if kind != SUPPORTED_CONTROL or not delta:
        how = f"{untrusted.shown(kind)}{'' if delta else ' with absolute goals'}"
        raise ValueError(f"its actions are for the controller {how}, the environment's for {SUPPORTED_CONTROL} steps")


def _object(data: h5py.Group, name: str) -> dict[str, Any]:
    content = untrusted.parse_json(hdf5.attribute(data, name, str), f"the attribute {name} of /data")
    if not isinstance(content, dict):
        raise ValueError(f"the attribute {name} of /data must be a JSON object")
    return content
