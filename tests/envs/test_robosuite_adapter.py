"""The adapter for robosuite: what it refuses, and Lift played with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dsrl_async.envs.protocol import UserEnvironment
from dsrl_async.envs.robosuite_adapter import RobosuiteEnvironment, make_environment

SMALL = {"render_size": 64, "image_size": 64}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"env_name": 7}, "env_name must be a text, not 7"),
        ({"cameras": []}, r"cameras must be a text or a list of texts, not \[\]"),
        ({"orientation": "flipped"}, "orientation must be one of upright, opengl, rotated, not 'flipped'"),
        ({"render_size": 0}, "render_size must be a whole number of at least 1, not 0"),
        ({"kwargs": {"camera_names": ["agentview"]}}, "kwargs may not have camera_names, write cameras beside kwargs"),
        ({"kwargs": {"use_camera_obs": True}}, "kwargs may not have use_camera_obs, which is this package's to choose"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"^env\.options: {sentence}$"):
        make_environment(**options)


@pytest.fixture(scope="module")
def lift() -> UserEnvironment:
    return make_environment(cameras=["agentview", "robot0_eye_in_hand"], **SMALL)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.libero
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"env_name": "Lfit"}, "env_name: robosuite has no Lfit, it has Door, Lift, "),
        ({"robots": "Pandas"}, "robots: robosuite has no Pandas, it has "),
        ({"controller": "OSC"}, "controller: robosuite has no OSC, it has "),
        ({"cameras": "top"}, "cameras: Lift has no top, it has frontview, "),
        ({"state": "cube"}, "state: the observation has no 'cube', it has "),
        ({"kwargs": {"speed": 1}}, "Lift of robosuite cannot be made: .*TypeError: "),
    ],
)
def test_what_robosuite_does_not_have_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"^env\.options: {sentence}"):
        make_environment(**options)


@pytest.mark.slow
@pytest.mark.libero
def test_lift_is_played_and_rendered_at_decisions(lift: UserEnvironment) -> None:
    assert lift.spec == (2, 64, 9, 7, ("do the task",))
    environment: Any = lift.make()
    assert isinstance(environment, RobosuiteEnvironment)
    rendered: list[str] = []
    render = environment.env.sim.render

    def noting(camera_name: str, **size: int) -> np.ndarray:
        rendered.append(camera_name)
        picture: np.ndarray = render(camera_name=camera_name, **size)
        return picture

    environment.env.sim.render = noting
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    actions = np.tile(np.array([0.2, 0.1, -0.4, 0, 0, 0, 1], np.float32), (4, 1))
    for seed in (3, 4, 3):
        assert environment.reset(seed) == 0
        outcomes = [environment.step_chunk(actions) for _ in range(2)]
        assert [outcome[:4] for outcome in outcomes] == [(4, -1, False, False)] * 2
        assert [len(outcome.rewards) for outcome in outcomes] == [4, 4]
        arrays = np.zeros((2, 64, 64, 3), np.uint8), np.zeros(9, np.float32)
        environment.observe(*arrays)
        seen.append((arrays[0], arrays[1]))
    assert rendered == ["agentview", "robot0_eye_in_hand"] * 3
    assert all(np.array_equal(one, other) for one, other in zip(seen[0], seen[2], strict=True))
    assert not np.array_equal(seen[0][1], seen[1][1])
    assert seen[0][0].std(axis=(1, 2)).min() > 5, "the cameras show something"
    environment.env.sim.data.set_joint_qpos("cube_joint0", np.array([0.0, 0, 1.2, 1, 0, 0, 0]))
    outcome = environment.step_chunk(actions)
    assert outcome == (1, 0, True, False, (1.0,))
    with pytest.raises(ValueError, match="the episode has ended"):
        environment.step_chunk(actions)
    environment.close()
