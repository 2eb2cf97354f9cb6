"""The tabletop environment, its scripted expert and its demonstrations."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path

import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from safetensors.numpy import load_file

from dsrl_async.config.settings import EnvConfig
from dsrl_async.envs import ChunkOutcome, Environment, environment_spec, make_environment
from dsrl_async.envs.tabletop import (
    _LIGHT,
    FINGER_OPEN,
    LANDING_RADIUS,
    LAYOUTS,
    PLATE_JITTER,
    PLATE_LOCATIONS,
    TabletopEnvironment,
)
from dsrl_async.pretraining import tabletop_demonstrations
from dsrl_async.pretraining.tabletop_demonstrations import make_demonstrations
from dsrl_async.pretraining.tabletop_expert import TabletopExpert

CONFIG = EnvConfig(name="tabletop", layout="swap2", max_episode_steps=50).model_dump()


def observation(environment: Environment) -> tuple[NDArray, NDArray, NDArray]:
    spec = environment.spec
    images = np.full((spec.cameras, spec.image_size, spec.image_size, 3), 77, np.uint8)
    sac_image = np.full((64, 64, 3), 77, np.uint8)
    state = np.full(spec.state_dim, np.nan, np.float32)
    environment.observe(images, sac_image, state)
    return images, sac_image, state


def random_chunks(seed: int, count: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 5, 7)).astype(np.float32)


def expert_actions(environment: TabletopEnvironment, goal: int, limit: int = 50) -> NDArray[np.float32]:
    """What the expert does until the block has landed on `goal`, or `limit` steps."""
    expert = TabletopExpert(goal)
    actions: list[NDArray[np.float32]] = []
    while len(actions) < limit and not environment.landed_on(goal):
        actions.append(expert.action(environment))
        environment.step(actions[-1])
    return np.array(actions)


def place(
    environment: TabletopEnvironment,
    block: NDArray,
    gripper: tuple[float, float, float],
    fingers: float = FINGER_OPEN,
    block_speed: float = 0.0,
) -> None:
    """Puts block (x, y, z) and gripper where a test wants them."""
    environment._data.qpos[:3] = block
    environment._data.qpos[environment._hand] = gripper
    environment._data.qpos[environment._fingers] = fingers
    environment._data.qvel[:] = 0
    environment._data.qvel[2] = block_speed


# The protocol


def test_specification_and_construction() -> None:
    environment = make_environment(CONFIG)
    spec = environment_spec(CONFIG)
    assert environment.spec == spec
    assert (spec.cameras, spec.image_size, spec.state_dim, spec.action_dim) == (2, 64, 8, 7)
    assert len(spec.prompts) == 1
    assert environment.reset(0) == 0
    environment.close()


@pytest.mark.parametrize("change", [{"name": "kitchen"}, {"layout": "circle"}, {"max_episode_steps": 0}])
def test_wrong_settings_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=str(*change.values())):
        make_environment(CONFIG | change)


@pytest.mark.parametrize(
    "variables",
    [{"MUJOCO_GL": name} for name in ("disabled", "osmesa", "egl", "bogus")] + [{"PYOPENGL_PLATFORM": "glx"}],
    ids=str,
)
def test_a_specification_needs_no_simulator_and_an_environment_neither_torch_nor_opengl(
    variables: dict[str, str],
) -> None:
    """Whatever its variables say, and so whatever is installed of OpenGL."""
    program = (
        "import sys, numpy as np, dsrl_async.envs as envs\n"
        f"envs.environment_spec({CONFIG})\n"
        "assert 'mujoco' not in sys.modules\n"
        f"environment = envs.make_environment({CONFIG})\n"
        "environment.reset(0)\n"
        "assert environment.render(64).std() > 10\n"
        "assert 'mujoco' in sys.modules and not {'torch', 'OpenGL', 'glfw'} & sys.modules.keys()\n"
        f"import os; assert all(os.environ[name] == value for name, value in {variables}.items())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("shape", [(7,), (0, 7), (5, 6)])
def test_wrong_chunks_are_refused(shape: tuple[int, ...]) -> None:
    environment = make_environment(CONFIG)
    environment.reset(0)
    with pytest.raises(ValueError, match="shape"):
        environment.step_chunk(np.zeros(shape, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_actions_that_are_not_finite_are_refused(value: float) -> None:
    environment = make_environment(CONFIG)
    environment.reset(0)
    chunk = np.zeros((5, 7), np.float32)
    chunk[3, 6] = value
    with pytest.raises(ValueError, match="finite"):
        environment.step_chunk(chunk)


# Determinism


def test_same_seed_and_actions_give_the_same_bits() -> None:
    """They do so even if the environment has a past, and if nobody looked on the way."""
    fresh, used = TabletopEnvironment("shuffle"), TabletopEnvironment("shuffle")
    used.reset(5)
    used.step_chunk(random_chunks(1, 1)[0])
    observation(used)
    fresh.reset(11)
    used.reset(11)
    chunks = random_chunks(2, 8)
    chunks[:, :, 2] -= 0.4  # down to the table, for contacts
    for index, chunk in enumerate(chunks):
        assert fresh.step_chunk(chunk) == used.step_chunk(chunk)
        seen = observation(fresh)
        if index in (0, 7):
            for one, other in zip(seen, observation(used), strict=True):
                np.testing.assert_array_equal(one, other)
    assert np.array_equal(fresh._data.qpos, used._data.qpos)


def test_seeds_give_different_episodes() -> None:
    environment = TabletopEnvironment("shuffle")
    starts = set()
    for seed in range(20):
        environment.reset(seed)
        starts.add((*environment.block_position, *environment.gripper_position, *environment.plate_positions.flat))
    assert len(starts) == 20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    environment = TabletopEnvironment(layout)
    seen: Counter[tuple[str, ...]] = Counter()
    for seed in range(240):
        environment.reset(seed)
        seen[environment.plate_colours] += 1
        assert np.abs(environment.plate_positions - PLATE_LOCATIONS).max() <= PLATE_JITTER
        assert environment.plate_colours[environment.red_plate] == "red"
    expected: dict[str, set[tuple[str, ...]]] = {
        "fixed": {("red", "yellow", "blue")},
        "swap2": {("red", "yellow", "blue"), ("yellow", "red", "blue")},
        "shuffle": set(permutations(("red", "yellow", "blue"))),
    }
    assert set(seen) == expected[layout]
    assert min(seen.values()) > 0.6 * 240 / len(expected[layout])


# Success, termination, truncation


def test_success_needs_the_block_at_rest_on_red_let_go_and_the_gripper_raised() -> None:
    environment = TabletopEnvironment("swap2")
    environment.reset(4)
    red = np.array([*environment.plate_positions[environment.red_plate], 0.025])
    away, raised, low = (0.0, 0.0, 0.15), (*red[:2], 0.15), (*red[:2], 0.06)
    edge = np.array([0.9 * LANDING_RADIUS, 0, 0])

    place(environment, red, raised)
    assert environment.success()
    place(environment, red + edge, away)
    assert environment.success()
    place(environment, red + edge * 1.2, away)
    assert not environment.success()
    place(environment, red, low)
    assert not environment.success()
    place(environment, red, raised, fingers=0.019)
    assert not environment.success()
    place(environment, red + np.array([0, 0, 0.05]), raised)
    assert not environment.success()
    place(environment, red, raised, block_speed=-0.3)
    assert not environment.success()
    for plate in {0, 1, 2} - {environment.red_plate}:
        place(environment, np.array([*environment.plate_positions[plate], 0.025]), raised)
        assert environment.landed_on(plate)
        assert not environment.success()


@pytest.mark.parametrize("chunk", [4, 7])
def test_an_episode_terminates_inside_a_chunk(chunk: int) -> None:
    environment = TabletopEnvironment("shuffle")
    environment.reset(0)
    actions = expert_actions(environment, environment.red_plate)
    whole, rest = divmod(len(actions) - 1, chunk)
    actions = np.pad(actions, ((0, chunk), (0, 0)))
    environment.reset(0)
    for index in range(whole):
        outcome = environment.step_chunk(actions[chunk * index : chunk * (index + 1)])
        assert outcome == ChunkOutcome(chunk, -1, False, False)
    assert environment.step_chunk(actions[chunk * whole :][:chunk]) == ChunkOutcome(rest + 1, rest, True, False)
    with pytest.raises(ValueError, match="reset"):
        environment.step_chunk(actions[:chunk])


def test_an_episode_is_truncated_at_its_limit() -> None:
    environment = TabletopEnvironment(max_episode_steps=7)
    environment.reset(0)
    chunk = np.zeros((5, 7), np.float32)
    assert environment.step_chunk(chunk) == ChunkOutcome(5, -1, False, False)
    assert environment.step_chunk(chunk) == ChunkOutcome(2, -1, False, True)
    environment.reset(1)
    assert environment.step_chunk(chunk).steps == 5


def test_success_at_the_limit_is_not_truncation() -> None:
    environment = TabletopEnvironment()
    environment.reset(0)
    actions = expert_actions(environment, environment.red_plate)
    environment = TabletopEnvironment(max_episode_steps=len(actions))
    environment.reset(0)
    assert environment.step_chunk(actions) == ChunkOutcome(len(actions), len(actions) - 1, True, False)


# Physics


def test_a_translation_of_one_moves_three_centimetres() -> None:
    environment = TabletopEnvironment()
    environment.reset(0)
    before = environment.gripper_position
    action = np.array([1, -0.5, 0.5, 1, 1, 1, -1], np.float32)  # the rotation components do nothing
    environment.step(action)
    moved = environment.gripper_position - before
    np.testing.assert_allclose(moved, [0.03, -0.015, 0.015], atol=0.001)
    environment.step(np.array([-4, 0, 0, 0, 0, 0, -1], np.float32))  # clipped to -1
    np.testing.assert_allclose(environment.gripper_position[0], before[0], atol=0.001)


@settings(max_examples=15, deadline=None)
@given(
    chunk=arrays(np.float32, (10, 7), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    seed=st.integers(0, 2**63 - 1),
)
def test_no_finite_action_breaks_the_simulation(chunk: NDArray[np.float32], seed: int) -> None:
    environment = TabletopEnvironment("shuffle")
    environment.reset(seed)
    environment.step_chunk(chunk)
    _, _, state = observation(environment)
    assert np.isfinite(state).all()
    assert np.isfinite(environment.block_position).all()
    low, high = np.array([-0.25, -0.25, 0.01]), np.array([0.21, 0.25, 0.23])
    assert ((state[:3] > low) & (state[:3] < high)).all()


def test_the_expert_succeeds_and_recovers_from_a_missed_grasp() -> None:
    environment = TabletopEnvironment("shuffle")
    for offset in (np.zeros(2), np.array([0.032, 0.004])):
        successes = 0
        for seed in range(20):
            environment.reset(seed)
            expert = TabletopExpert(environment.red_plate, offset)
            for _ in range(50):
                action = expert.action(environment)
                assert np.abs(action).max() <= 1
                if environment.step_chunk(action[None]).terminated:
                    successes += 1
                    break
        assert successes >= 18


def test_the_expert_goes_where_it_is_told_whatever_the_colour() -> None:
    environment = TabletopEnvironment("shuffle")
    for seed in range(3):
        for goal in range(3):
            environment.reset(seed)
            expert_actions(environment, goal)
            assert environment.landed_on(goal)
            assert environment.success() == (goal == environment.red_plate)


# Pictures


def pixel_of(environment: TabletopEnvironment, camera: int, point: NDArray, size: int) -> tuple[int, int]:
    """Row and column where a pinhole camera sees `point`."""
    camera_id = environment._cameras[camera]
    rotation = environment._data.cam_xmat[camera_id].reshape(3, 3)
    x, y, z = rotation.T @ (point - environment._data.cam_xpos[camera_id])
    scale = size / 2 / np.tan(np.radians(environment._model.cam_fovy[camera_id]) / 2)
    return int(size / 2 + scale * y / z), int(size / 2 - scale * x / z)


def looks(rgb: NDArray) -> str:
    """The colour a person would name, for the saturated colours of the scene."""
    red, green, blue = (int(c) for c in rgb)
    if blue > 1.5 * red and blue > 1.5 * green:
        return "blue"
    if green > 1.5 * red and green > 1.3 * blue:
        return "green"
    if red > 1.8 * green and red > 1.8 * blue:
        return "red"
    return "yellow" if min(red, green) > 1.8 * blue else "other"


def test_plates_and_block_are_seen_where_they_project_to() -> None:
    environment = TabletopEnvironment("shuffle")
    for seed in range(10):
        environment.reset(seed)
        place(environment, environment.block_position, (0.0, 0.0, 0.21))
        images, sac_image, _ = observation(environment)
        np.testing.assert_array_equal(sac_image, images[0])
        large = environment.render(128)
        for plate, colour in enumerate(environment.plate_colours):
            point = np.array([*environment.plate_positions[plate], 0.0])
            assert looks(images[0][pixel_of(environment, 0, point, 64)]) == colour
            assert looks(large[pixel_of(environment, 0, point, 128)]) == colour
        top = environment.block_position + np.array([0, 0, 0.025])
        assert looks(images[0][pixel_of(environment, 0, top, 64)]) == "green"
        assert looks(images[1][pixel_of(environment, 1, top, 64)]) == "green"


def test_a_block_out_of_sight_is_not_in_the_picture() -> None:
    environment = TabletopEnvironment()
    environment.reset(0)
    place(environment, np.array([0.0, 0.0, 0.025]), (0.0, 0.0, 0.15))
    shown = [sum(looks(pixel) == "green" for pixel in image.reshape(-1, 3)) for image in observation(environment)[0]]
    place(environment, np.array([5.0, 0.0, 0.025]), (0.0, 0.0, 0.15))
    hidden = [sum(looks(pixel) == "green" for pixel in image.reshape(-1, 3)) for image in observation(environment)[0]]
    assert min(shown) > 15
    assert hidden == [0, 0]


def test_the_block_throws_a_shadow() -> None:
    environment = TabletopEnvironment()
    environment.reset(0)
    block = np.array([0.0, 0.0, 0.15])
    shadow = _LIGHT + (block - _LIGHT) * _LIGHT[2] / (_LIGHT[2] - block[2])
    out_of_the_way = (-0.2, 0.2, 0.2)
    place(environment, np.array([5.0, 0.0, 0.025]), out_of_the_way)
    lit = observation(environment)[0][0].astype(float)
    place(environment, block, out_of_the_way)
    shaded = observation(environment)[0][0].astype(float)
    pixel = pixel_of(environment, 0, shadow, 64)
    np.testing.assert_allclose(shaded[pixel], 0.62 * lit[pixel], atol=1)


def test_pictures_show_the_present_and_skipped_rays_miss_nothing() -> None:
    environment = TabletopEnvironment()
    environment.reset(0)
    for action in expert_actions(environment, environment.red_plate, limit=9):
        environment.step(action)
    images, _, state = observation(environment)
    np.testing.assert_allclose(state[:3], environment.gripper_position, atol=1e-6)
    np.testing.assert_allclose(state[6:], environment.finger_positions, atol=1e-6)
    assert not state[3:6].any()
    mujoco.mj_forward(environment._model, environment._data)
    np.testing.assert_array_equal(observation(environment)[0], images)
    environment._object_radii = np.full_like(environment._object_radii, 10.0)  # no ray is left out
    np.testing.assert_array_equal(observation(environment)[0], images)


# Demonstrations


def test_demonstrations_depend_on_the_seed_only(tmp_path: Path) -> None:
    files = []
    for seed, processes in ((3, 1), (3, 2), (4, 1)):
        files.append(tmp_path / f"{seed}-{processes}.safetensors")
        episodes, frames = make_demonstrations(files[-1], 6, seed, processes)
        assert 4 <= episodes <= 6
        assert frames == len(load_file(files[-1])["state"])
    one, same, other = (load_file(file) for file in files)
    for name in one:
        np.testing.assert_array_equal(one[name], same[name])
    assert not np.array_equal(one["state"][:10], other["state"][:10])

    assert {name: (field.shape[1:], str(field.dtype)) for name, field in one.items()} == {
        "images": ((2, 64, 64, 3), "uint8"),
        "state": ((8,), "float32"),
        "action": ((7,), "float32"),
        "block_position": ((3,), "float32"),
        "episode": ((), "int32"),
        "goal": ((), "int32"),
    }
    assert np.abs(one["action"]).max() <= 1
    for episode in np.unique(one["episode"]):
        frames_of = one["episode"] == episode
        (goal,) = np.unique(one["goal"][frames_of])
        end = one["block_position"][frames_of][-1]
        assert np.hypot(*(end[:2] - PLATE_LOCATIONS[goal])) < LANDING_RADIUS + np.sqrt(2) * PLATE_JITTER
        assert one["state"][frames_of][-1, 2] > 0.1, "the last frames show the raised gripper"


def test_demonstrations_refuse_wrong_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="episodes"):
        make_demonstrations(tmp_path / "x", 0, 0, 1)


def test_demonstrations_that_miss_their_plate_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tabletop_demonstrations, "_MAX_STEPS", 10)  # too few to carry the block anywhere
    assert tabletop_demonstrations.record_episode(0, 0) is None
    with pytest.raises(ValueError, match="none of 2"):
        make_demonstrations(tmp_path / "x", 2, 0, 1)
