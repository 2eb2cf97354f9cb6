"""The scripted LIBERO expert and the files of its demonstrations."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from dsrl_async.envs import libero_files
from dsrl_async.pretraining import libero_demonstrations
from dsrl_async.pretraining.libero_demonstrations import (
    Attempt,
    Demonstration,
    Request,
    draw_attempt,
    file_of,
    make_demonstrations,
)
from dsrl_async.pretraining.libero_expert import SIDES, LiberoExpert, Situation, Way

TABLE = 0.9
RIM = np.array([0.048, 0.038])
"""Distance of the wall from the bowl's axis, and height above its origin, at which it is taken (m)."""


@dataclass
class Toy:
    """A hand that goes 30 % of the way to its goal in a step, and a bowl that it holds when it closes on the rim."""

    hand: NDArray[np.float64] = field(default_factory=lambda: np.array([-0.2, 0.0, 1.17]))
    bowl: NDArray[np.float64] = field(default_factory=lambda: np.array([-0.06, 0.2, TABLE]))
    plate: NDArray[np.float64] = field(default_factory=lambda: np.array([0.05, 0.05, TABLE]))
    yaw: float = 0.0
    opening: float = 0.04
    held: NDArray[np.float64] | None = None

    def situation(self) -> Situation:
        down, up = np.array([0.0, 0.0, -1.0]), np.array([0.0, 0.0, 1.0])
        return Situation(self.hand.copy(), down, self.yaw, self.opening, self.bowl.copy(), up, self.plate)

    def on_rim(self) -> bool:
        """The wall is between the fingers, which close along the radius."""
        apart = self.hand - self.bowl
        radius = np.hypot(*apart[:2])
        across = math.sin(math.atan2(apart[1], apart[0]) - self.yaw - math.pi / 2)
        return abs(radius - RIM[0]) < 0.02 and abs(apart[2] - RIM[1]) < 0.02 and abs(across) < 0.3

    def step(self, action: NDArray[np.float32]) -> None:
        assert np.abs(action).max() <= 1
        self.hand = self.hand + 0.3 * 0.05 * action[:3]
        self.yaw += 0.3 * 0.5 * float(action[5])
        narrowest = 0.002 if self.held is not None or self.on_rim() else 0.0
        self.opening = float(np.clip(self.opening - 0.005 * action[6], narrowest, 0.04))
        if self.opening > 0.01:
            self.held = None
        elif self.held is None and self.on_rim():
            self.held = self.bowl - self.hand
        if self.held is not None:
            self.bowl = self.hand + self.held
        else:
            self.bowl = np.array([*self.bowl[:2], TABLE])

    def done(self) -> bool:
        return self.held is None and bool(np.hypot(*(self.bowl - self.plate)[:2]) < 0.03)


def steps_to_success(toy: Toy, expert: LiberoExpert, drop_at: int | None = None, limit: int = 220) -> int:
    for step in range(limit):
        toy.step(expert.action(toy.situation()))
        if drop_at is not None and toy.held is not None and toy.bowl[2] > TABLE + 0.05 and step >= drop_at:
            toy.held, toy.bowl, drop_at = None, np.array([*toy.bowl[:2], TABLE]), None
            toy.opening = 0.0
        if toy.done() and expert.phase == "raise":
            return step + 1
    raise AssertionError(f"not done after {limit} steps, in phase {expert.phase}")


@pytest.mark.parametrize("side", range(0, 360, 45))
def test_expert_brings_the_bowl_by_any_side_of_its_rim_and_lets_go(side: int) -> None:
    toy, expert = Toy(), LiberoExpert(Way(side))
    steps_to_success(toy, expert)
    released = toy.hand - toy.bowl
    assert math.cos(math.atan2(released[1], released[0]) - math.radians(side)) > 0.95


@pytest.mark.parametrize("offset", [-0.045, 0.045])
def test_expert_tries_again_when_its_first_grasp_missed(offset: float) -> None:
    direct = steps_to_success(Toy(), LiberoExpert(Way(90)))
    assert steps_to_success(Toy(), LiberoExpert(Way(90), offset)) > direct + 10


def test_expert_picks_up_what_it_dropped() -> None:
    direct = steps_to_success(Toy(), LiberoExpert(Way(90)))
    assert steps_to_success(Toy(), LiberoExpert(Way(90)), drop_at=30) > direct + 10


def test_speed_and_carry_height_are_the_callers() -> None:
    assert steps_to_success(Toy(), LiberoExpert(Way(90, speed=0.5))) > steps_to_success(Toy(), LiberoExpert(Way(90)))
    heights = []
    for carry_height in (0.08, 0.16):
        toy, expert, highest = Toy(), LiberoExpert(Way(90, carry_height)), 0.0
        while not toy.done():
            toy.step(expert.action(toy.situation()))
            highest = max(highest, float(toy.bowl[2]))
        heights.append(highest)
    assert heights[1] > heights[0] + 0.05


def test_attempts_depend_on_nothing_but_seed_task_and_number() -> None:
    states = (3, 4, 5)
    attempts = [draw_attempt(0, 2, number, states) for number in range(60)]
    assert draw_attempt(0, 2, 17, states) == attempts[17]
    assert [attempt.init_state for attempt in attempts[:4]] == [3, 4, 5, 3]
    assert {attempt.way.side for attempt in attempts} == set(SIDES[2])
    assert {attempt.noise_scale for attempt in attempts} == set(libero_demonstrations.NOISE_SCALES)
    assert 0 < sum(attempt.sloppy_offset != 0 for attempt in attempts) < 30
    for other in (draw_attempt(1, 2, 17, states), draw_attempt(0, 3, 17, states), attempts[18]):
        assert other.scene_seed != attempts[17].scene_seed
        assert other.noise_seed != attempts[17].noise_seed


# Files, without LIBERO


FRAMES = 11


def synthetic(attempt: Attempt) -> Demonstration:
    random = np.random.default_rng(attempt.noise_seed)
    shapes = {"actions": 7, "obs/robot_state": 8, "obs/target_position": 3, "obs/goal_position": 3}
    fields: dict[str, np.ndarray] = {
        name: random.normal(size=(FRAMES, width)).astype(np.float32) for name, width in shapes.items()
    }
    fields["states"] = random.normal(size=(FRAMES, 92))
    for name in ("agentview_rgb", "eye_in_hand_rgb"):
        fields[f"obs/{name}"] = random.integers(256, size=(FRAMES, 16, 16, 3)).astype(np.uint8)
    return Demonstration(attempt, fields)


@pytest.fixture
def request_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """Two episodes of a task, recorded without a simulator; every second attempt fails."""
    domain = SimpleNamespace(control_freq=20)
    environment = SimpleNamespace(settling_steps=10, domain=domain, close=lambda: None)
    monkeypatch.setattr(libero_demonstrations, "environment_for", lambda *arguments: environment)
    monkeypatch.setattr(libero_demonstrations, "libero_versions", lambda: {"mujoco": "0"})
    monkeypatch.setattr(libero_files, "task_names", lambda suite: ("put_it_there",))
    monkeypatch.setattr(
        libero_demonstrations,
        "record_episode",
        lambda environment, attempt: synthetic(attempt) if attempt.init_state == 0 else None,
    )
    return Request("libero_spatial", 0, (0, 1), 2, 0, 16, "fast", str(tmp_path / "out"))


def test_files_have_the_layout_of_liberos(request_of_two: Request) -> None:
    path = libero_demonstrations.record_task(request_of_two)
    assert path.name == "put_it_there_demo.hdf5"
    with h5py.File(path) as file:
        data = file["data"]
        assert sorted(data) == ["demo_0", "demo_1"]
        assert data.attrs["num_demos"] == 2
        assert data.attrs["total"] == 2 * FRAMES
        assert data.attrs["language_instruction"] == "put it there"
        assert [data[name].attrs["attempt"] for name in sorted(data)] == [0, 2]
        demo = data["demo_1"]
        attempt = draw_attempt(0, 0, 2, (0, 1))
        assert demo.attrs["num_samples"] == FRAMES
        assert demo.attrs["scene_seed"] == attempt.scene_seed
        assert demo.attrs["way"] == f"side {attempt.way.side:g}"
        for name, values in synthetic(attempt).fields.items():
            assert demo[name].dtype == values.dtype
            np.testing.assert_array_equal(demo[name][:], values)


def test_complete_files_are_left_and_incomplete_ones_do_not_appear(
    request_of_two: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_of(request_of_two)

    def interrupted(environment: Any, attempt: Attempt) -> Demonstration | None:
        if attempt.init_state == 1:
            raise KeyboardInterrupt
        return synthetic(attempt)

    with monkeypatch.context() as patch:
        patch.setattr(libero_demonstrations, "record_episode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            libero_demonstrations.record_task(request_of_two)
    assert list(path.parent.iterdir()) == []
    libero_demonstrations.record_task(request_of_two)
    written = path.read_bytes()
    monkeypatch.setattr(libero_demonstrations, "record_episode", interrupted)
    libero_demonstrations.record_task(request_of_two)
    assert path.read_bytes() == written


def test_a_task_that_keeps_failing_is_reported(request_of_two: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libero_demonstrations, "record_episode", lambda environment, attempt: None)
    with pytest.raises(ValueError, match="task 0: only 0 of 8 attempts succeeded"):
        libero_demonstrations.record_task(request_of_two)
    assert list(file_of(request_of_two).parent.iterdir()) == []


def test_files_of_another_request_are_refused(request_of_two: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    libero_demonstrations.record_task(request_of_two)
    assert make_demonstrations([request_of_two], 1) == [file_of(request_of_two)]
    for change in ({"seed": 1}, {"episodes": 1}, {"init_states": (0, 1, 2)}, {"render_quality": "exact"}):
        with pytest.raises(ValueError, match=f"{next(iter(change)).replace('episodes', 'num_demos')} .*, not "):
            make_demonstrations([request_of_two._replace(**change)], 1)
    monkeypatch.setattr(libero_files, "init_states", lambda suite, task: np.zeros((50, 3)))
    other = request_of_two._replace(out=request_of_two.out + "-2", init_states=(49, 50))
    with pytest.raises(ValueError, match="initial states 0 to 49"):
        make_demonstrations([other], 1)


def killed(argument: int, advance: Callable[[], None]) -> int:
    if argument == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return argument


def test_a_killed_process_is_noticed() -> None:
    assert libero_demonstrations.spread(killed, [2, 0], 1, 2, "") == [2, 0]
    with pytest.raises(ValueError, match="a process was killed"):
        libero_demonstrations.spread(killed, [0, 1], 1, 2, "")


def test_other_suites_are_refused(request_of_two: Request) -> None:
    with pytest.raises(ValueError, match="knows libero_spatial only"):
        make_demonstrations([request_of_two._replace(suite="libero_goal")], 1)


# With LIBERO


@pytest.mark.libero
@pytest.mark.skipif(find_spec("libero") is None or find_spec("robosuite") is None, reason="LIBERO is not installed")
def test_recorded_episode_is_what_a_policy_would_have_seen() -> None:
    try:
        environment = libero_demonstrations.environment_for("libero_spatial", 0, 64, "fast")
    except ValueError as error:
        if "cannot render" not in str(error):
            raise
        pytest.skip(str(error))
    attempt = draw_attempt(0, 0, 0, (0,))._replace(noise_scale=0.3, sloppy_offset=0.0)
    demonstration = libero_demonstrations.record_episode(environment, attempt)
    assert demonstration is not None  # the expert succeeded in spite of the noise
    fields = demonstration.fields
    frames = len(fields["actions"])
    assert fields["rewards"][-1] == 1
    assert np.abs(fields["executed_actions"] - fields["actions"]).max() > 0.3
    np.testing.assert_array_equal(fields["obs/robot_state"][:, :6], fields["obs/ee_states"].astype(np.float32))

    images, sac_image = np.empty((2, 64, 64, 3), np.uint8), np.empty((64, 64, 3), np.uint8)
    state = np.empty(8, np.float32)
    environment.reset(attempt.scene_seed, attempt.init_state)
    for frame in range(frames):
        np.testing.assert_array_equal(environment.domain.sim.get_state().flatten(), fields["states"][frame])
        if frame % 20 == 0:
            environment.observe(images, sac_image, state)
            np.testing.assert_array_equal(images[0], fields["obs/agentview_rgb"][frame])
            np.testing.assert_array_equal(images[1], fields["obs/eye_in_hand_rgb"][frame])
            np.testing.assert_array_equal(state, fields["obs/robot_state"][frame])
        success = environment.step(fields["executed_actions"][frame])
        assert success == fields["rewards"][frame]
    environment.close()


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.skipif(find_spec("libero") is None or find_spec("robosuite") is None, reason="LIBERO is not installed")
def test_files_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    contents = []
    for processes in (1, 2):
        out = str(tmp_path / str(processes))
        requests = [Request("libero_spatial", task, (0, 1), 1, 3, 64, "fast", out) for task in (0, 2)]
        found = {}
        for path in make_demonstrations(requests, processes):
            with h5py.File(path) as file:
                for name, values in file["data/demo_0"].items():
                    arrays = values.items() if isinstance(values, h5py.Group) else [(name, values)]
                    found.update({(path.name, key): array[()].tobytes() for key, array in arrays})
        contents.append(found)
    assert len(contents[0]) > 20
    assert contents[0] == contents[1]
