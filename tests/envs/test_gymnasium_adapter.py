"""The adapter for gymnasium: what it finds out about an environment, refuses, and does with a chunk."""

from __future__ import annotations

import inspect
import re
import sys
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gymnasium_envs import GOAL, HEIGHT, WIDTH, Corridor
from support.paths import ROOT

from dsrl_async.config.settings import EnvConfig
from dsrl_async.envs import environment_record, gymnasium_adapter, observations, robosuite_adapter
from dsrl_async.envs.gymnasium_adapter import GymnasiumEnvironment, make_environment
from dsrl_async.envs.images import resize_with_pad
from dsrl_async.envs.protocol import ChunkOutcome, UserEnvironment

FLAGS = re.MULTILINE | re.DOTALL | re.IGNORECASE
ID = "support.gymnasium_envs:Corridor-v0"
OPTIONS: dict[str, Any] = {"id": ID, "state": ["agent/place", "agent.steps"], "image_size": 32}
FORWARD, STAY, BACK = [0.5, 1.0], [0.0, 0.0], [-0.5, -1.0]


def described(**options: Any) -> UserEnvironment:
    return make_environment(**{**OPTIONS, **options})


def made(**options: Any) -> GymnasiumEnvironment:
    environment = described(**options).make()
    assert isinstance(environment, GymnasiumEnvironment)
    return environment


def corridor(environment: GymnasiumEnvironment) -> Corridor:
    inner = environment.env.unwrapped
    assert isinstance(inner, Corridor)
    return inner


def chunk(*actions: list[float]) -> np.ndarray:
    return np.array(actions, np.float32)


def observe(environment: GymnasiumEnvironment) -> tuple[np.ndarray, np.ndarray]:
    spec = environment.spec
    arrays = (
        np.zeros((spec.cameras, spec.image_size, spec.image_size, 3), np.uint8),
        np.zeros(spec.state_dim, np.float32),
    )
    environment.observe(*arrays)
    return arrays


# ---- keys

NAMES = st.text("abc", min_size=1, max_size=2)
TREES = st.recursive(st.integers(), lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3), max_leaves=8)


@given(TREES.filter(lambda tree: isinstance(tree, dict)), st.sampled_from("/."))
@settings(max_examples=50, deadline=None)
def test_every_key_that_is_listed_names_its_value(tree: Any, separator: str) -> None:
    for key in observations.keys_of(tree):
        value = tree
        for name in key.split("/"):
            value = value[name]
        assert observations.find(tree, key.replace("/", separator)) == value


@given(TREES.filter(lambda tree: isinstance(tree, dict)), st.text("abc/.", max_size=6))
@settings(max_examples=50, deadline=None)
def test_a_key_names_something_or_is_missing_and_never_fails(tree: Any, key: str) -> None:
    found = observations.find(tree, key)
    paths: list[str] = []

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for name, inner in node.items():
                paths.append(f"{path}{name}")
                walk(inner, f"{path}{name}/")

    walk(tree, "")
    assert (found is not observations.MISSING) == (key.replace(".", "/") in paths or key == observations.WHOLE)


def test_keys_may_have_the_separators_themselves() -> None:
    nested = {"observation.state": 1, "a": {"b.c": 2, "b": {"c": 3}}, "observation": {"state": 4}}
    found = [observations.find(nested, key) for key in ("observation.state", "a.b.c", "a/b/c", "observation/state")]
    assert found == [1, 2, 3, 4]


# ---- what is found out


def test_what_an_environment_is_comes_from_its_spaces_and_its_registration() -> None:
    before = Corridor.made
    known = described(cameras=["pixels/top", "pixels/wrist.camera"], state=["history", "agent/steps", "agent/place"])
    assert Corridor.made == before, "it is made in a child process only"
    assert known.spec == (2, 32, 6, 2, ("do the task",))
    assert (known.episode_steps, known.rate_hz) == (30, 12)
    assert "gymnasium" in known.packages
    assert described(episode_steps=7, rate_hz=50).episode_steps == 7


def test_a_function_may_make_the_environment() -> None:
    known = described(id=None, make="support.gymnasium_envs:Silent", kwargs={"tasks": 3}, episode_steps=5)
    environment = known.make()
    assert isinstance(environment, GymnasiumEnvironment)
    assert corridor(environment).tasks == 3
    assert known.episode_steps == 5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"id": None}, "give either id, such as CartPole-v1, or make"),
        ({"make": "support.gymnasium_envs:nothing"}, "give either id, such as CartPole-v1, or make"),
        ({"id": 3}, "id must be a text, not 3"),
        (
            {"id": "Nowhere-v0"},
            "id: Environment `Nowhere` doesn't exist; if a package registers it, write that in front",
        ),
        ({"id": "support.gymnasium_envs:Nowhere-v0"}, "id: Environment `Nowhere` doesn't exist$"),
        ({"id": "nowhere:Nowhere-v0"}, "nowhere:Nowhere-v0 cannot be made: .*ModuleNotFoundError: No module named"),
        ({"kwargs": [1]}, r"kwargs must be a mapping, such as \{key: value\}, not \[1\]"),
        ({"kwargs": {"speed": 1}}, f"{ID} cannot be made: .*TypeError: .*speed"),
        ({"kwargs": {"max_episode_steps": 1}}, "kwargs may not have max_episode_steps, write episode_steps beside"),
        ({"cameras": []}, r"cameras must be a text or a list of texts, not \[\]"),
        (
            {"cameras": ["pixels/left"]},
            "cameras: the observation space has no 'pixels/left', it has agent/place,",
        ),
        (
            {"state": "place"},
            "state: the observation space has no 'place', it has agent/place, agent/steps, ",
        ),
        ({"state": "."}, "state: '.' is a mapping; name what is in it, such as agent/place, agent/steps, history"),
        ({"state": "pixels"}, "state: 'pixels' is a mapping; name what is in it, such as top, wrist.camera"),
        ({"state": "pixels/top"}, r"state: 'pixels/top' has the shape \(48, 64, 3\), as an image has"),
        ({"prompt": ["a", "b"]}, "several prompts need task"),
        ({"prompt": ""}, "prompt must be a text or a list of texts, not ''"),
        ({"success": {"reward": 4}}, r"success must be a text, or \{reward_at_least: NUMBER\}, not \{'reward': 4\}"),
        ({"success": {"reward_at_least": "four"}}, "success: reward_at_least must be a number, not 'four'"),
        ({"success": "support.gymnasium_envs:near"}, "success: support.gymnasium_envs:near cannot be had: "),
        ({"actions": "clipped"}, "actions must be one of unchanged, clip, rescale, not 'clipped'"),
        ({"state_transform": "doubled"}, "state_transform must be like package.module:function, not 'doubled'"),
        ({"action_transform": "support.gymnasium_envs:GOAL"}, "action_transform must be a function, not 6.0"),
        ({"episode_steps": 0}, "episode_steps must be a whole number of at least 1, not 0"),
        ({"rate_hz": True}, "rate_hz must be a whole number of at least 1, not True"),
        ({"rotate_images": 1}, "rotate_images must be true or false, not 1"),
        ({"image_size": 2.5}, "image_size must be a whole number of at least 1, not 2.5"),
        ({"id": "support.gymnasium_envs:EndlessCorridor-v0"}, "episode_steps is needed, since the environment is"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"^env\.options: {sentence}") as caught:
        described(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("nothing", "support.gymnasium_envs:nothing makes no gymnasium.Env, but a builtins.NoneType"),
        (
            "broken",
            r"support.*:broken cannot be made: .*gymnasium_envs.py, line \d+: RuntimeError: no licence for this",
        ),
        (
            "Old",
            "support.gymnasium_envs:Old is an environment of the old package gym, not of gymnasium; let a",
        ),
        ("Discrete", r"the action space of Discrete is Discrete\(4\), and only a Box of real numbers can be steered"),
    ],
)
def test_what_cannot_be_steered_is_refused(function: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"^env\.options: {sentence}"):
        described(id=None, make=f"support.gymnasium_envs:{function}", episode_steps=5)


def test_an_environment_that_kills_its_process_is_refused_and_this_one_lives_on() -> None:
    with pytest.raises(ValueError, match=r"^env\.options: support.*:crash cannot be made: .* was killed by SIGKILL$"):
        described(id=None, make="support.gymnasium_envs:crash", episode_steps=5)


def test_gymnasium_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ValueError, match=r"^env\.options: gymnasium is not installed: pip install .*gymnasium"):
        described()


# ---- what is played


def test_a_chunk_is_executed_and_the_cameras_render_at_decisions_only() -> None:
    environment = made()
    assert environment.reset(3) == 0
    place = corridor(environment).place
    observe(environment)
    outcome = environment.step_chunk(chunk(STAY, FORWARD, STAY))
    assert outcome == ChunkOutcome(3, -1, False, False, (place, place + 1.5, place + 1.5))
    images, state = observe(environment)
    assert corridor(environment).renders == 2
    assert state.tolist() == [np.float32(place + 1.5), 3]
    picture = np.full((HEIGHT, WIDTH, 3), 103, np.uint8)
    assert (images[0] == resize_with_pad(picture, 32)).all()
    assert not images[0, 0].any(), "the edges of a picture that is not square are black"
    assert (environment.render(48) == resize_with_pad(picture, 48)).all()
    assert corridor(environment).renders == 2
    environment.close()


def test_an_episode_ends_with_its_first_success_and_no_action_follows() -> None:
    environment = made()
    environment.reset(0)
    outcome = environment.step_chunk(chunk(*[FORWARD] * 9))
    steps = outcome.steps
    assert steps < 6
    assert outcome[:4] == (steps, steps - 1, True, False)
    assert outcome.success
    assert outcome.rewards[-1] >= GOAL > outcome.rewards[-2]
    assert len(corridor(environment).actions) == steps
    with pytest.raises(ValueError, match="the episode has ended"):
        environment.step_chunk(chunk(STAY))
    environment.reset(1)
    assert environment.step_chunk(chunk(STAY)).steps == 1


def test_an_environment_that_terminates_without_success_has_failed() -> None:
    environment = made()
    environment.reset(0)
    outcome = environment.step_chunk(chunk(*[BACK] * 9))
    assert outcome.steps < 4
    assert outcome[1:4] == (-1, True, False)
    assert not outcome.success


def test_an_environment_may_truncate_by_itself_and_gymnasium_does_not() -> None:
    environment = made()
    environment.reset(0)
    outcome = environment.step_chunk(chunk(*[STAY] * 60))
    assert outcome[:4] == (50, -1, False, True), "the limit of 30 steps is the worker's to keep"


@pytest.mark.parametrize(
    ("success", "actions", "expected"),
    [
        ("is_success", FORWARD, True),
        ("progress/done", FORWARD, True),
        ("terminated", BACK, True),
        ("terminated", FORWARD, False),
        ({"reward_at_least": 3}, FORWARD, True),
        ({"reward_at_least": 1000}, BACK, False),
        ("support.gymnasium_envs:far", FORWARD, True),
        ("support.gymnasium_envs:far", BACK, False),
    ],
)
def test_what_counts_as_success(success: Any, actions: list[float], expected: bool) -> None:
    environment = made(success=success)
    environment.reset(0)
    assert environment.step_chunk(chunk(*[actions] * 9)).success == expected


def test_infos_that_never_tell_of_success_are_refused_after_an_episode() -> None:
    environment = made(id=None, make="support.gymnasium_envs:Silent", episode_steps=5)
    environment.reset(0)
    environment.step_chunk(chunk(STAY, STAY))
    with pytest.raises(ValueError, match=r"success: none of the 2 infos so far has 'is_success'; the last .* speed;"):
        environment.reset(1)


def test_the_seed_determines_an_episode() -> None:
    environment, states = made(), []
    for seed in (5, 6, 5, 2**32 - 1):
        environment.reset(seed)
        states.append(observe(environment)[1][0])
    assert states[0] == states[2] != states[1]


def test_cameras_that_hang_upside_down_are_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    monkeypatch.setattr(Corridor, "render", lambda self: picture)
    for turned, expected in ((False, picture), (True, np.rot90(picture, 2))):
        environment = made(rotate_images=turned)
        environment.reset(0)
        assert (observe(environment)[0][0] == expected).all()


def test_images_of_the_observation_are_taken_as_they_are() -> None:
    environment = made(cameras=["pixels.top", "pixels/wrist.camera"])
    environment.reset(0)
    environment.step_chunk(chunk(STAY, STAY))
    images, _ = observe(environment)
    assert corridor(environment).renders == 0
    assert (images[0] == resize_with_pad(np.full((HEIGHT, WIDTH, 3), 2, np.uint8), 32)).all()
    assert (images[1] == 2).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"make": "support.gymnasium_envs:Floating"},
            r"what render\(\) returns must be an image, uint8 .*float64",
        ),
        ({"make": "support.gymnasium_envs:Corridor", "cameras": "history"}, "env.options: history must be an image"),
    ],
)
def test_what_is_no_image_is_refused(options: dict[str, Any], sentence: str) -> None:
    environment = made(id=None, episode_steps=5, **options)
    environment.reset(0)
    with pytest.raises(ValueError, match=sentence):
        observe(environment)


def test_a_step_of_the_old_package_is_refused() -> None:
    environment = made(id=None, make="support.gymnasium_envs:Four", episode_steps=5)
    environment.reset(0)
    with pytest.raises(ValueError, match=r"^step must return .* one of the old package gym returns four$"):
        environment.step_chunk(chunk(STAY))


@given(st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=2))
@settings(max_examples=30, deadline=None)
def test_actions_are_left_clipped_or_rescaled(action: list[float]) -> None:
    low, high = np.array([-0.5, -2], np.float32), np.array([0.5, 4], np.float32)
    given_action = np.array(action, np.float32)
    for actions, environment in ENVIRONMENTS.items():
        environment.reset(0)
        environment.step_chunk(chunk(action))
        executed = corridor(environment).actions[-1]
        assert executed.dtype == np.float32
        if actions == "unchanged":
            assert (executed == given_action).all()
        elif actions == "clip":
            assert (executed == np.minimum(np.maximum(given_action, low), high)).all()
        else:
            assert (executed >= low).all()
            assert (executed <= high).all()
            inside = np.abs(given_action) <= 1
            share = (executed - low) / (high - low)
            np.testing.assert_allclose(share[inside], (given_action[inside] + 1) / 2, atol=1e-6)


ENVIRONMENTS = {actions: made(actions=actions) for actions in ("unchanged", "clip", "rescale")}


def test_functions_of_the_user_stand_between_the_policy_and_the_environment() -> None:
    environment = made(
        state_transform="support.gymnasium_envs:doubled", action_transform="support.gymnasium_envs:swapped"
    )
    assert environment.spec.state_dim == 4
    environment.reset(0)
    environment.step_chunk(chunk([0.25, 0.5]))
    assert corridor(environment).actions[0].tolist() == [0.5, 0.25]
    state = observe(environment)[1]
    assert (state[:2] == state[2:]).all()


def test_the_prompt_of_an_episode_is_told_by_number_or_text() -> None:
    environment = made(prompt=["go", "run", "walk"], task="task", kwargs={"tasks": 3})
    for seed in range(6):
        assert environment.reset(seed) == corridor(environment).task
    told = made(prompt=["go", "0"], task="task")
    told.env.unwrapped.reset = lambda **_: ({}, {"task": "walk"})
    with pytest.raises(ValueError, match=r"^env\.options: prompt does not have 'walk', which task is$"):
        told.reset(0)
    few = made(prompt=["go", "run"], task="task", kwargs={"tasks": 9})
    few.env.unwrapped.reset = lambda **_: ({}, {"task": np.array([2])})
    with pytest.raises(ValueError, match=r"^env\.options: task is 2, and there are 2 prompts, from 0$"):
        few.reset(0)


def test_a_run_finds_it_under_its_name_and_looks_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EnvConfig.model_validate({"name": "gymnasium", "options": OPTIONS, "max_episode_steps": 4}).model_dump()
    record = environment_record(settings)
    assert record.spec() == described().spec
    assert (record.episode_steps, record.rate_hz, record.file) == (4, 12, gymnasium_adapter.__file__)
    environment = record.make((0,))
    environment.reset(0)
    outcome = environment.step_chunk(chunk(*[STAY] * 6))
    assert outcome[:4] == (4, -1, False, True)
    assert len(outcome.rewards) == 4
    images, sac_image, state = np.zeros((1, 32, 32, 3), np.uint8), np.zeros((64, 64, 3), np.uint8), np.zeros(2, "f4")
    environment.observe(images, sac_image, state)
    assert sac_image.max() == 104
    monkeypatch.setattr(gymnasium.Wrapper, "reset", lambda *arguments, **options: {})
    with pytest.raises(RuntimeError, match=r"^the environment gymnasium: reset must return \(observation, info\), as"):
        environment.reset(0)


def test_a_run_says_what_is_wrong_with_an_option_and_nothing_else() -> None:
    settings = EnvConfig.model_validate({"name": "gymnasium", "options": {**OPTIONS, "state": "x"}}).model_dump()
    with pytest.raises(ValueError, match=r"^env\.options: state: the observation space has no 'x', it has agent/place"):
        environment_record(settings)
    with pytest.raises(
        ValueError, match=r"^env\.options: .* unexpected keyword argument 'colour'; gymnasium takes id, make,"
    ):
        environment_record({**settings, "options": {"colour": "red"}})


@pytest.mark.parametrize("adapter", [gymnasium_adapter, robosuite_adapter])
def test_every_option_is_told_where_users_look(adapter: ModuleType) -> None:
    page = (ROOT / "docs/adapters.md").read_text()
    (section,) = re.findall(rf"^## {adapter.__name__.rpartition('.')[2].split('_')[0]}\n(.*?)^## ", page, FLAGS)
    told = {name for row in re.findall(r"^\| (`.*?`) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert told == set(inspect.signature(adapter.make_environment).parameters)
    assert all(f"\n        {name}: " in adapter.make_environment.__doc__ for name in told)


class Physics:
    """Stands for dm_control's."""

    def render(self, height: int = 240, width: int = 320, camera_id: int = -1, depth: bool = False) -> np.ndarray:
        return np.full((height, width, 3), 9, np.uint8)


def test_what_dm_control_renders_in_a_step_is_black_unless_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = ModuleType("dm_control.mujoco.engine")
    engine.Physics = Physics
    monkeypatch.setitem(sys.modules, "dm_control.mujoco.engine", engine)
    stock, seen = Physics.render, []
    for options in ({}, {"cameras": "pixels/top"}):
        environment = made(**options)
        step = corridor(environment).step

        def stepping(action: np.ndarray, step: Any = step) -> Any:
            seen.append(int(Physics().render(4, 6, camera_id=0).max()))
            return step(action)

        monkeypatch.setattr(corridor(environment), "step", stepping)
        environment.reset(0)
        environment.step_chunk(chunk(STAY))
        assert Physics.render is stock
    assert seen == [0, 9]
