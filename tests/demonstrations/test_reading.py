"""What a run takes from files with demonstrations, and that each fault of a file is one sentence which names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from dsrl_async.demonstrations import Demonstration, Wanted, read

WANTED = Wanted(cameras=2, state_dim=8, action_dim=7, prompts=("pick up the bowl", "open the drawer"), turned=True)
RECORDED = WANTED._replace(prompts=("put it there",))
FRAMES, SIZE = 6, 8


def libero(path: Path, change: Callable[[h5py.File], object] = lambda file: None) -> Path:
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": ["", "Pick up the bowl"][1]})
        data.attrs["env_args"] = json.dumps({"env_kwargs": {"controller_configs": {"type": "OSC_POSE"}}})
        demo = data.create_group("demo_0")
        demo["actions"] = rng.normal(size=(FRAMES, 7))
        demo["rewards"] = np.array([0, 0, 0, 0, 1, 1], np.uint8)
        observed = demo.create_group("obs")
        observed["ee_states"], observed["gripper_states"] = rng.normal(size=(FRAMES, 6)), rng.normal(size=(FRAMES, 2))
        for name in ("agentview_rgb", "eye_in_hand_rgb"):
            observed[name] = rng.integers(0, 256, (FRAMES, SIZE, SIZE, 3)).astype(np.uint8)
        change(file)
    return path


def recorded(path: Path, **changed: Any) -> Path:
    rng = np.random.default_rng(0)
    fields: dict[str, Any] = {
        "images": rng.integers(0, 256, (FRAMES, 2, SIZE, SIZE, 3)).astype(np.uint8),
        "state": rng.normal(size=(FRAMES, 8)).astype(np.float32),
        "action": rng.normal(size=(FRAMES, 7)).astype(np.float32),
        "episode": np.array([3, 3, 3, 3, 7, 7], np.int32),
        "success": np.array([False, False, False, True, False, True]),
    } | changed
    save_file({name: value for name, value in fields.items() if value is not None}, path)
    return path


def pictures_of(demonstration: Demonstration, count: int) -> NDArray[np.uint8]:
    return np.array([list(row) for row in demonstration.pictures(count)])


def test_liberos_layout(tmp_path: Path) -> None:
    path = libero(tmp_path / "a.hdf5")
    (demonstration, pictures), *rest = [(found, pictures_of(found, 3)) for found in read(path, WANTED)]
    assert not rest
    assert demonstration.place == f"{path}: demo_0"
    assert (demonstration.success, demonstration.task_index) == (4, 0)
    with h5py.File(path) as file:
        observed = file["data/demo_0/obs"]
        np.testing.assert_allclose(demonstration.action, file["data/demo_0/actions"][:], rtol=1e-6)
        np.testing.assert_allclose(demonstration.state[:, :6], observed["ee_states"][:], rtol=1e-6)
        np.testing.assert_allclose(demonstration.state[:, 6:], observed["gripper_states"][:], rtol=1e-6)
        turned = observed["eye_in_hand_rgb"][2][::-1, ::-1]
    assert pictures.shape == (3, 2, SIZE, SIZE, 3)
    np.testing.assert_array_equal(pictures[2, 1], turned)


def test_what_was_executed_counts(tmp_path: Path) -> None:
    executed = np.full((FRAMES, 7), 0.5)

    def change(file: h5py.File) -> None:
        file["data/demo_0"]["executed_actions"] = executed

    (demonstration,) = list(read(libero(tmp_path / "a.hdf5", change), WANTED))
    np.testing.assert_array_equal(demonstration.action, executed)


def test_what_our_recorder_writes(tmp_path: Path) -> None:
    (first, _), (second, pictures) = [
        (found, pictures_of(found, 2)) for found in read(recorded(tmp_path / "a.safetensors"), RECORDED)
    ]
    assert (len(first.state), first.success, len(second.action), second.success) == (4, 3, 2, 1)
    assert second.place.endswith("a.safetensors: episode 7")
    assert pictures.shape == (2, 2, SIZE, SIZE, 3)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (FRAMES, 2, SIZE, SIZE, 3)).astype(np.uint8)
    np.testing.assert_array_equal(pictures, images[4:])


def test_which_instruction_a_file_is_of_must_be_said_where_there_are_several(tmp_path: Path) -> None:
    path, prompts = recorded(tmp_path / "a.safetensors"), ("the red plate", "The yellow plate.")
    with pytest.raises(
        ValueError, match=r"a.safetensors does not say which of the environment's 2 instructions it is of"
    ):
        next(read(path, RECORDED._replace(prompts=prompts)))
    save_file(load_file(path), path, {"instruction": "the yellow plate"})
    assert next(read(path, RECORDED._replace(prompts=prompts))).task_index == 1
    with pytest.raises(
        ValueError, match="has the instruction 'the yellow plate', which is none of the environment's 1"
    ):
        next(read(path, RECORDED._replace(prompts=prompts[:1])))


def replaced(name: str, value: Any) -> Callable[[h5py.File], object]:
    def change(file: h5py.File) -> None:
        demo = file["data/demo_0"]
        del demo[name]
        if value is not None:
            demo[name] = value

    return change


def with_attribute(name: str, value: Any) -> Callable[[h5py.File], object]:
    return lambda file: file["data"].attrs.__setitem__(name, json.dumps(value))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replaced("actions", None), "actions is missing"),
        (replaced("actions", np.full((FRAMES, 7), np.nan)), "not finite"),
        (replaced("actions", np.zeros((FRAMES, 6))), "actions must be numbers of shape [6, 7]"),
        (replaced("obs/ee_states", None), "ee_states is missing"),
        (replaced("obs/ee_states", np.zeros((FRAMES - 1, 6))), "ee_states must be numbers of shape [6, 6]"),
        (replaced("obs/agentview_rgb", None), "agentview_rgb is missing"),
        (replaced("obs/agentview_rgb", np.zeros((FRAMES, SIZE, SIZE), np.uint8)), "agentview_rgb must be of shape"),
        (replaced("rewards", np.zeros(FRAMES)), "never succeeds"),
        (with_attribute("problem_info", {"language_instruction": "dance"}), "none of the environment's 2"),
        (
            with_attribute("env_args", {"env_kwargs": {"controller_configs": {"type": "JOINT_POSITION"}}}),
            "for the controller 'JOINT_POSITION'",
        ),
        (lambda file: file.__delitem__("data/demo_0"), "it has 0 episodes"),
        (lambda file: file.__delitem__("data"), "data is missing"),
    ],
)
def test_faults_of_liberos_layout(tmp_path: Path, change: Callable[[h5py.File], object], words: str) -> None:
    path = libero(tmp_path / "a.hdf5", change)
    with pytest.raises(ValueError, match=r"a\.hdf5") as caught:
        list(read(path, WANTED))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"success": None}, "lacks success"),
        ({"success": np.zeros(FRAMES, np.bool_)}, "never succeeds"),
        ({"success": np.zeros(FRAMES, np.int32)}, "success must be"),
        ({"state": np.zeros((FRAMES, 7), np.float32)}, "state must be numbers of shape [6, 8]"),
        ({"action": np.full((FRAMES, 7), np.inf, np.float32)}, "not finite"),
        ({"images": np.zeros((FRAMES, 1, SIZE, SIZE, 3), np.uint8)}, "1 cameras, the environment has 2"),
        ({"images": np.zeros((FRAMES, 2, SIZE, SIZE, 3), np.float32)}, "images must be uint8"),
        ({"images": np.zeros((0, 2, SIZE, SIZE, 3), np.uint8)}, "images must be uint8"),
        ({"episode": np.array([3, 2, 1, 0, 0, 0])}, "never fall"),
    ],
)
def test_faults_of_what_our_recorder_writes(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"a\.safetensors") as caught:
        list(read(recorded(tmp_path / "a.safetensors", **changed), RECORDED))
    assert words in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0")
    (tmp_path / "cut.hdf5").write_bytes(b"\x89HDF")
    (tmp_path / "a.zip").touch()
    for name, words in (
        ("cut.safetensors", "cannot be read"),
        ("cut.hdf5", "cannot be used"),
        ("a.zip", "must end in .hdf5"),
        ("nothing.hdf5", "cannot be read"),
        ("nothing.safetensors", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=name) as caught:
            list(read(tmp_path / name, WANTED))
        assert words in str(caught.value)


def test_another_robot_or_more_cameras_are_refused(tmp_path: Path) -> None:
    path = libero(tmp_path / "a.hdf5")
    for wanted, words in (
        (WANTED._replace(action_dim=14), "LIBERO's action has 7 numbers, the environment's has 14"),
        (WANTED._replace(state_dim=9), "LIBERO's state has 8 numbers"),
        (WANTED._replace(cameras=3), "has 2 cameras, the environment has 3"),
    ):
        with pytest.raises(ValueError, match=words):
            list(read(path, wanted))
