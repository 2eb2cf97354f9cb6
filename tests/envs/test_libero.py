"""The LIBERO environment against LIBERO itself, to the last bit, and what it says when it cannot work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.commands import call
from support.launched import Launched, checkpoint_of
from support.paths import ROOT

from dsrl_async.bench.systems.stock_libero import StockEnvironment
from dsrl_async.config.load import validate
from dsrl_async.envs import libero_files, make_environment

if find_spec("libero") is None or find_spec("robosuite") is None:
    pytest.skip("LIBERO is not installed; pip install -e '.[libero]'", allow_module_level=True)

from support.libero_stock import Trajectory, differences, play, play_stock

from dsrl_async.envs import libero as libero_module
from dsrl_async.envs.libero import LiberoEnvironment
from dsrl_async.envs.simulator import import_libero, import_robosuite

pytestmark = pytest.mark.libero


def configuration(suite: str = "libero_spatial", **settings: Any) -> dict[str, Any]:
    return validate({"env": {"name": suite, "scene_order": "cycled", **settings}}).env.model_dump()


@pytest.fixture(scope="module", autouse=True)
def opengl() -> None:
    """Skips where OpenGL cannot be had."""
    try:
        import_robosuite().GLContext(max_width=64, max_height=64).make_current()
    except Exception as error:
        pytest.skip(f"OpenGL cannot be had: {error}")


def environment_of(suite: str, **settings: Any) -> LiberoEnvironment:
    environment = make_environment(configuration(suite, **settings))
    assert isinstance(environment, LiberoEnvironment)
    return environment


@pytest.fixture(scope="module")
def environment() -> Iterator[LiberoEnvironment]:
    found = environment_of("libero_spatial", task_ids=[0])
    yield found
    found.close()


@pytest.fixture(scope="module")
def stock(environment: LiberoEnvironment) -> Iterator[StockEnvironment]:
    found = StockEnvironment("libero_spatial", 0)
    yield found
    found.env.close()


def smooth_chunks(decisions: int, seed: int = 0) -> NDArray[np.float32]:
    """Actions that go somewhere, the gripper's too: float32[decisions, 5, 7], some of them outside [-1, 1]."""
    random = np.random.default_rng(seed)
    aims = random.uniform(-1, 1, (decisions, 1, 7))
    chunks = aims + random.normal(0, 0.2, (decisions, 5, 7)) - np.array([0, 0, 0.4, 0, 0, 0, 0])
    chunks[-1, :, 6] = 1.0  # the episode ends with a closed gripper, which must not leak into the next one
    return chunks.astype(np.float32)


def compare(
    environment: LiberoEnvironment, stock: StockEnvironment, number: int, chunks: NDArray[np.float32]
) -> tuple[list[str], Trajectory]:
    # robosuite draws into whichever graphics context was made current last.
    stock.env.sim._render_context_offscreen.gl_ctx.make_current()
    settling, size = environment.settling_steps, environment.spec.image_size
    expected = play_stock(stock, environment.scene(number, number), settling, chunks, size)
    return differences(expected, play(environment, number, number, chunks)), expected


def above_the_plate(environment: LiberoEnvironment) -> NDArray[np.float64]:
    """An initial state of the task with the bowl a little above the plate, where it succeeds soon by itself."""
    state = environment._init_states[0][0].copy()
    if environment._task is None:
        environment.reset(0)
    address = {
        name: environment.domain.sim.model.get_joint_qpos_addr(f"{name}_joint0")[0] + 1
        for name in ("akita_black_bowl_1", "plate_1")
    }
    bowl, plate = (slice(first, first + 3) for first in address.values())
    state[bowl] = state[plate] + np.array([0.0, 0.0, 0.06])
    return state


def test_episodes_are_those_of_libero_to_the_last_bit(environment: LiberoEnvironment, stock: StockEnvironment) -> None:
    different, expected = compare(environment, stock, 0, smooth_chunks(3))
    assert different == []
    assert np.abs(expected.simulation[-1] - expected.simulation[0]).max() > 0.01
    assert np.ptp(expected.images[0]) > 100
    assert not np.array_equal(expected.images[0], expected.images[-1])
    different, _ = compare(
        environment, stock, 1, smooth_chunks(1, seed=1)
    )  # after an episode; the fixtures stand elsewhere
    assert different == []


def test_success_inside_a_chunk_is_liberos(
    environment: LiberoEnvironment, stock: StockEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = above_the_plate(environment)[None]
    monkeypatch.setitem(environment._init_states, 0, states)
    monkeypatch.setitem(environment._init_state_ids, 0, [0])
    monkeypatch.setattr(environment, "settling_steps", 0)
    monkeypatch.setattr(stock, "init_states", states)
    different, expected = compare(environment, stock, 0, np.zeros((6, 5, 7), np.float32))
    assert different == []
    assert expected.success[-1]
    assert len(expected.success) > 1
    with pytest.raises(ValueError, match="has ended"):
        environment.step_chunk(np.zeros((5, 7), np.float32))
    environment.reset(0)
    outcome = environment.step_chunk(np.zeros((30, 7), np.float32))
    assert outcome[:4] == (len(expected.success), len(expected.success) - 1, True, False)


def forget_the_gripper(environment: LiberoEnvironment, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(environment, "_reset_scene", lambda count: environment.domain.reset())


def draw_the_present(environment: LiberoEnvironment, patch: pytest.MonkeyPatch) -> None:
    observe = environment.observe

    def late(*arrays: Any) -> None:
        assert environment._cameras is not None
        environment._cameras.capture(environment.data)
        observe(*arrays)

    patch.setattr(environment, "observe", late)


def nudge_an_action(environment: LiberoEnvironment, patch: pytest.MonkeyPatch) -> None:
    step = environment.step
    patch.setattr(environment, "step", lambda action: step(action + 1e-9))


def seed_otherwise(environment: LiberoEnvironment, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(environment, "fixtures_seed", environment.fixtures_seed + 1)


PLANTED: dict[Callable[[LiberoEnvironment, pytest.MonkeyPatch], None], set[str]] = {
    forget_the_gripper: {"simulation", "state", "images"},
    draw_the_present: {"images"},
    nudge_an_action: {"simulation"},
    seed_otherwise: {"images"},
}


@pytest.mark.parametrize("plant", PLANTED)
def test_planted_deviations_are_seen(
    environment: LiberoEnvironment,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[LiberoEnvironment, pytest.MonkeyPatch], None],
) -> None:
    chunks = smooth_chunks(2)
    right = play(environment, 0, 0, chunks)
    with monkeypatch.context() as patch:
        plant(environment, patch)
        wrong = play(environment, 0, 0, chunks)
    assert PLANTED[plant] <= set(differences(right, wrong))
    assert differences(right, play(environment, 0, 0, chunks)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "task"),
    [("libero_object", 3), ("libero_goal", 3), ("libero_10", 5), ("libero_90", 20), ("libero_goal_swap", 3)],
)
def test_other_suites(suite: str, task: int) -> None:
    environment = environment_of(suite, task_ids=[task], preset="rlinf", settling_steps=2)
    stock = StockEnvironment(suite, task)
    try:
        for number in (0, 1):
            assert compare(environment, stock, number, smooth_chunks(2, seed=number))[0] == []
    finally:
        stock.env.close()
        environment.close()


@pytest.mark.slow
def test_a_stove_glows_in_the_same_picture_and_goes_out_at_a_reset() -> None:
    """LIBERO switches the flame after a step, so it is seen one observation later."""
    environment = environment_of("libero_goal", task_ids=[7], preset="rlinf", settling_steps=0)
    environment.reset(0)
    stock = StockEnvironment("libero_goal", 7)
    try:
        model = environment.domain.sim.model
        joint = environment.domain.fixtures_dict["flat_stove_1"].joints[0]
        spun = environment._init_states[7][0].copy()
        spun[1 + model.nq + model.get_joint_qvel_addr(joint)] = 12.0
        states = np.stack([spun, environment._init_states[7][1]])
        environment._init_states[7] = stock.init_states = states
        environment._init_state_ids[7] = [0, 1]
        different, expected = compare(environment, stock, 0, np.zeros((8, 1, 7), np.float32))
        assert different == []
        assert expected.success[-1]
        different, expected = compare(environment, stock, 1, np.zeros((2, 1, 7), np.float32))
        assert different == []
        assert not any(expected.success)
    finally:
        stock.env.close()
        environment.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("suite", "task"), [("libero_spatial", 4), ("libero_goal", 0), ("libero_10", 9)])
def test_whole_episodes(suite: str, task: int) -> None:
    """220 steps, after two resets and another episode, in tasks with a drawer, a stove and a microwave."""
    environment, stock = environment_of(suite, task_ids=[task]), StockEnvironment(suite, task)
    try:
        play(environment, 0, 0, smooth_chunks(2))
        different, expected = compare(environment, stock, 1, smooth_chunks(44))
        assert different == []
        assert (len(expected.images), len(expected.simulation)) == (45, 220)
        for name in libero_module.CHANGED_BY_EPISODES:
            assert np.array_equal(getattr(stock.env.sim.model, name), getattr(environment._model, name)), name
    finally:
        stock.env.close()
        environment.close()


def test_environments_of_one_process_leave_each_other_alone(environment: LiberoEnvironment) -> None:
    """Two that take turns do, to the last bit, what each of them does alone; the one that stays can still draw."""

    def turns(playing: dict[LiberoEnvironment, int]) -> list[list[NDArray[Any]]]:
        for one, number in playing.items():
            one.reset(number, number)
        seen: list[list[NDArray[Any]]] = [[] for _ in playing]
        for chunk in smooth_chunks(3):
            for found, one in zip(seen, playing, strict=True):
                one.step_chunk(chunk)
                images, state = np.empty((2, 224, 224, 3), np.uint8), np.empty(8, np.float32)
                one.observe(images, np.empty((64, 64, 3), np.uint8), state)
                found += [images, state, one.domain.sim.get_state().flatten()]
        return seen

    other = environment_of("libero_spatial", task_ids=[1])
    try:
        alone = turns({environment: 0}) + turns({other: 1})
        together = turns({environment: 0, other: 1})
        for one, both in zip(alone, together, strict=True):
            assert all(np.array_equal(*pair) for pair in zip(one, both, strict=True))
        environment.reset(0)
        environment.render()  # in its own graphics context, in which what the other one has must not be freed
    finally:
        other.close()
    assert all(np.array_equal(*pair) for pair in zip(alone[0], turns({environment: 0})[0], strict=True))


def test_an_episode_is_truncated_at_its_limit(environment: LiberoEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.max_episode_steps == 220
    monkeypatch.setattr(environment, "max_episode_steps", 7)
    monkeypatch.setattr(environment, "settling_steps", 0)
    environment.reset(0)
    assert environment.step_chunk(np.zeros((5, 7), np.float32))[:4] == (5, -1, False, False)
    assert environment.step_chunk(np.zeros((5, 7), np.float32))[:4] == (2, -1, False, True)


@pytest.mark.parametrize("chunk", [np.zeros((5, 6), np.float32), np.full((5, 7), np.nan, np.float32)])
def test_wrong_chunks_are_refused(environment: LiberoEnvironment, chunk: NDArray[np.float32]) -> None:
    environment.reset(0)
    with pytest.raises(ValueError, match=r"shape|finite"):
        environment.step_chunk(chunk)


def test_the_sac_image_is_the_agents_view(environment: LiberoEnvironment) -> None:
    environment.reset(0)
    images, small = np.zeros((2, 224, 224, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    environment.observe(images, small, np.zeros(8, np.float32))
    means = [image.reshape(32, len(image) // 32, 32, len(image) // 32, 3).mean((1, 3)) for image in (*images, small)]
    assert np.abs(means[2] - means[0]).mean() < 3 < np.abs(means[2] - means[1]).mean()


def test_the_agent_sees_the_cameras_it_was_given(
    environment: LiberoEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment.reset(0)
    images, state = np.zeros((2, 224, 224, 3), np.uint8), np.zeros(8, np.float32)
    front, both = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 6), np.uint8)
    environment.observe(images, front, state)
    monkeypatch.setattr(environment, "_agent_cameras", [1, 0])
    environment.observe(images, both, state)
    np.testing.assert_array_equal(both[:, :, 3:], front)
    wrist = images[1].reshape(32, 7, 32, 7, 3).mean((1, 3))
    assert np.abs(both[:, :, :3].reshape(32, 2, 32, 2, 3).mean((1, 3)) - wrist).mean() < 3


@pytest.mark.parametrize(
    ("preset", "settling", "steps", "pictures", "seeds", "resets"),
    [
        ("openpi", 10, 220, (256, True), {7}, {1, 2, 3}),
        ("rlinf", 15, 240, (256, True), {0}, {1}),
        ("lerobot", 10, 280, (360, False), None, {1}),
    ],
)
def test_presets(
    preset: str, settling: int, steps: int, pictures: tuple[int, bool], seeds: set[int] | None, resets: set[int]
) -> None:
    environment = environment_of("libero_spatial", preset=preset, task_ids=[2, 5], init_states=[0, 1, 2])
    assert (environment.settling_steps, environment.max_episode_steps) == (settling, steps)
    assert (environment._render_size, environment._antialias) == pictures
    scenes = [environment.scene(100 + number, number) for number in range(7)]
    assert [scene[:2] for scene in scenes] == [(2, 0), (2, 1), (2, 2), (5, 0), (5, 1), (5, 2), (2, 0)]
    assert {scene.resets for scene in scenes} == resets
    assert seeds is None or {scene.seed for scene in scenes} == seeds
    assert seeds is not None or len({scene.seed for scene in scenes}) == 7


def test_sampled_scenes_depend_on_the_seed_only() -> None:
    environment = environment_of("libero_spatial", scene_order="sampled", task_ids=[1, 2], seeding="episode")
    scenes = [environment.scene(seed, number=0) for seed in range(200)]
    assert scenes == [environment.scene(seed, number=9) for seed in range(200)]
    assert {scene.task for scene in scenes} == {1, 2}
    assert len({scene.init_state for scene in scenes}) > 40


def test_an_init_state_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"env.init_states: task 0 has initial states 0 to 49, not 50"):
        make_environment(configuration(init_states=[50]))


def test_instructions_are_those_of_liberos_benchmark() -> None:
    libero_files.prepare_import()
    from libero.libero.benchmark import get_benchmark

    for suite in libero_files.SUITES:
        tasks = get_benchmark(suite)().tasks
        names = libero_files.task_names(suite)
        assert [(task.name, task.language) for task in tasks] == [(n, libero_files.instruction(n)) for n in names]


def test_what_bddl_files_say_is_what_libero_reads_in_them() -> None:
    """In all suites that are installed, variations included; LIBERO's own code reads each file."""
    import_libero()
    from libero.libero.envs.bddl_base_domain import TASK_MAPPING
    from libero.libero.envs.bddl_utils import get_problem_info
    from libero.libero.envs.objects import get_object_dict

    for suite in libero_files.suites():
        for task, name in enumerate(libero_files.task_names(suite)):
            info = get_problem_info(str(libero_files.bddl_file(suite, task)))
            (told,) = libero_files.instructions(suite, [task], "bddl")
            named = libero_files.instruction(name)
            assert told == (named if info["language_instruction"] == named.lower() else info["language_instruction"])
    kinds = libero_files._known_kinds(libero_files.root() / "envs")
    assert kinds is not None
    assert kinds.objects.keys() > get_object_dict().keys()
    assert kinds.problems >= TASK_MAPPING.keys()


def test_fast_pictures_differ_and_it_is_said(environment: LiberoEnvironment, caplog: pytest.LogCaptureFixture) -> None:
    fast = environment_of("libero_spatial", task_ids=[0], render_quality="fast")
    assert "pictures differ" in caplog.text
    frames = []
    for each in (environment, fast):
        each.reset(0)
        frames.append(each.render(224).astype(int))
    fast.close()
    difference = np.abs(frames[0] - frames[1])
    assert 0 < (difference.max(-1) > 8).mean() < 0.2
    assert difference.mean() < 5


def test_the_benchmark_prints_a_line_per_figure() -> None:
    options = ["--system", "dsrl_async", "--decisions", "1", "--repeats", "1", "--together", "2"]
    result = call("bench", "env", *options)
    if "cannot render" in result.stderr:
        pytest.skip(result.stderr.splitlines()[-1])
    assert result.code == 0, result.stderr
    value = {record["metric"]: record["value"] for record in map(json.loads, result.stdout.splitlines())}
    assert value["steps_per_second"] == pytest.approx(1000 / value["step"], rel=1e-3)
    assert value["memory"] > 200
    assert value["start"] > 1
    assert value["start_together"] > 1
    assert 200 < value["memory_together"] < 2 * value["memory"]


# What goes wrong


def test_a_reset_that_fails_is_an_error_and_not_an_endless_loop(
    environment: LiberoEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment.reset(0)

    def broken() -> None:
        raise RuntimeError("the context is gone")

    with monkeypatch.context() as patch:
        patch.setattr(environment.domain, "reset", broken)
        with pytest.raises(RuntimeError, match="the context is gone"):
            environment.reset(0)

    from robosuite.utils.errors import RandomizationError

    def crowded() -> None:
        raise RandomizationError("Cannot place all objects")

    with monkeypatch.context() as patch:
        patch.setattr(environment.domain, "reset", crowded)
        with pytest.raises(ValueError, match="no place was found for the objects of task 0 in 100 trials"):
            environment.reset(0)


@pytest.mark.parametrize("change", [lambda states: states[:, :50], lambda states: np.hstack([states, states])])
def test_init_states_of_another_scene_are_refused(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> None:
    published = libero_files.init_states("libero_spatial", 0)
    monkeypatch.setattr(libero_files, "init_states", lambda suite, task: change(published))
    with pytest.raises(ValueError, match=r"pruned_init.* holds init states of \d+ numbers, and the scene .* has 92;"):
        environment_of("libero_spatial", task_ids=[0])


def test_graphics_that_cannot_be_set_up_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = environment_of("libero_spatial", task_ids=[0])
    environment.reset(0)

    def broken(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("mujoco.MjrContext", broken)
    with pytest.raises(ValueError, match=r"LIBERO cannot render with MUJOCO_GL=\w+ \(RuntimeError: out of memory\)"):
        environment.render()


def test_a_scene_that_cannot_be_compiled_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("mujoco.MjModel.from_xml_string", broken)
    with pytest.raises(ValueError, match="task 0 of libero_spatial cannot be set up: RuntimeError: out of memory"):
        environment_of("libero_spatial", task_ids=[0])


def test_missing_opengl_is_the_last_line_that_an_actor_leaves() -> None:
    program = (
        "from dsrl_async.envs import make_environment\n"
        f"environment = make_environment({configuration(task_ids=[0])})\n"
        "environment.reset(0)\n"
        "environment.render()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "99"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: LIBERO cannot render with MUJOCO_GL=egl (RuntimeError:")
    assert last.endswith("its libraries are installed: see Graphics in docs/libero.md for what else it needs")


def test_a_module_that_is_missing_is_not_blamed_on_opengl() -> None:
    program = (
        "import sys\n"
        "sys.modules['bddl'] = None\n"
        "from dsrl_async.envs import make_environment\n"
        f"make_environment({configuration()})\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ValueError: LIBERO cannot be imported: No module named 'bddl.parsing'" in result.stderr


def test_no_torch_in_an_actor() -> None:
    program = (
        "import sys\n"
        "from dsrl_async.envs import make_environment\n"
        f"make_environment({configuration()})\n"
        "assert 'robosuite' in sys.modules and 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if "cannot render" in result.stderr:
        pytest.skip(result.stderr.splitlines()[-1])
    assert result.returncode == 0, result.stderr


def test_a_run_with_the_small_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of docs/libero_policy.md, until it has learned a little."""
    monkeypatch.chdir(ROOT)
    limits = "--max-decisions", "24", "--replay.warmup-decisions", "16", "--sac.batch-size", "16"
    arguments = "--config", "configs/libero_spatial_small.yaml", "--actors", "2", "--log.console", "off", *limits
    run = Launched(tmp_path / "run", *arguments)
    run.wait_for(lambda _: len(run.children("worker")) == 2, timeout_s=150)
    result = run.finish(timeout_s=100)
    assert result["returncode"] == 0, result["stderr"]
    assert result["exit_reason"] == "max_decisions"
    assert result["decisions"] == 24
    assert result["env_steps"] > 0
    assert result["updates"] > 0
    assert not any(result["restarts"].values())
    checkpoint_of(run.run_dir)
    assert run.left_over() == []
