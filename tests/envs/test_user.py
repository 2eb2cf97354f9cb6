"""A user's environment: how a name becomes one, and what is said of one that does not do what it should."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.user_environments import INSTALLED, env_settings, found_in

from dsrl_async.envs import Environment, EnvironmentSpec, environment_record, environment_spec, make_environment
from dsrl_async.envs.user import describe


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    with found_in(INSTALLED):
        yield


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory in which modules are found."""
    with found_in(tmp_path):
        yield tmp_path


def test_an_entry_point_is_an_environment_and_its_package_is_known() -> None:
    record = environment_record(env_settings("reaching", {"reach": 0.5}))
    assert record.spec() == EnvironmentSpec(2, 32, 5, 3, ("reach the green one", "reach the blue one"))
    assert (record.episode_steps, record.evaluation_episodes, record.rate_hz) == (12, 3, 10)
    assert record.versions() == {"reaching": "1.2"}
    assert record.file == str(INSTALLED / "reaching" / "__init__.py")
    assert environment_record(env_settings("reaching", max_episode_steps=7)).episode_steps == 7
    assert environment_spec(env_settings("reaching:make_environment")) == record.spec()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "reachin",
            {},
            r"env\.name: there is no environment 'reachin'; choose one of tabletop, .*reaching, or one of your",
        ),
        ("reaching/env.py:make", {}, r"env\.name: reaching/env\.py:make names a file; .*like reaching\.env:make"),
        ("reaching.py:make", {}, r"env\.name: .* names a file; name the module, like reaching:make"),
        ("reaching:", {}, r"env\.name: 'reaching:' is not like package\.module:function"),
        ("no.where:make", {}, r"env\.name: there is no module no for no\.where:make, .*start from the directory"),
        ("reaching.no:make", {}, r"env\.name: there is no module reaching\.no for"),
        ("reaching:make", {}, r"env\.name: .*reaching/__init__\.py has no make, which"),
        ("reaching:WORDS", {}, r"env\.name: WORDS in .* is no function, but \('reach"),
        (
            "reaching",
            {"reech": 1},
            r"env\.options: got an unexpected keyword argument 'reech'; reaching takes fault, reach$",
        ),
    ],
)
def test_a_name_or_an_option_that_cannot_be_is_one_sentence(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}") as caught:
        describe(env_settings(name, options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("wrong_syntax", "\ndef make(:\n", r"wrong_syntax\.py, line 2: SyntaxError: "),
        (
            "wrong_import",
            "import numpy\nimport nothing_of_the_kind\n",
            r"wrong_import\.py, line 2: ModuleNotFoundError: ",
        ),
        ("wrong_value", "x = 1\n\ny = x / 0\n", r"wrong_value\.py, line 3: ZeroDivisionError: division by zero"),
        ("wrong_exit", "import sys\nsys.exit('no licence')\n", r"wrong_exit\.py, line 2: SystemExit: no licence"),
        ("wrong_call", "def make():\n    return {}['robot']\n", r"wrong_call\.py, line 2: KeyError: 'robot'"),
        (
            "wrong_library",
            "import json\ndef make():\n    return json.loads('{')\n",
            r"wrong_library\.py, line 3: JSONDecodeError: ",
        ),
    ],
)
def test_what_a_users_module_raises_is_told_with_its_line(
    directory: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str, words: str
) -> None:
    (directory / f"{module}.py").write_text(source)
    monkeypatch.chdir(directory)
    with pytest.raises(ValueError, match=rf"^env\.name: {words}"):
        describe(env_settings(f"{module}:make"))


EXPRESSIONS = """
from dataclasses import replace
import numpy as np
from dsrl_async.envs import EnvironmentSpec, UserEnvironment
SPEC = EnvironmentSpec(1, np.int64(32), 4, 2, ["reach"])
FINE = UserEnvironment(spec=SPEC, make=object, episode_steps=10)
def make(expression):
    return eval(expression)
"""


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("None", r"must return a dsrl_async\.envs\.UserEnvironment, which None is not"),
        ("SPEC", r"must return a dsrl_async\.envs\.UserEnvironment, which EnvironmentSpec"),
        (
            "replace(FINE, spec=(1, 32, 4, 2, ('reach',)))",
            r"returns as spec a dsrl_async\.envs\.EnvironmentSpec, which",
        ),
        ("replace(FINE, spec=SPEC._replace(cameras=0))", r"as spec\.cameras, a whole number of at least 1, which 0 is"),
        ("replace(FINE, spec=SPEC._replace(image_size=32.0))", r"as spec\.image_size, a whole number .* which 32\.0"),
        ("replace(FINE, spec=SPEC._replace(state_dim=True))", r"as spec\.state_dim, .* which True is not"),
        ("replace(FINE, spec=SPEC._replace(action_dim='2'))", r"as spec\.action_dim, .* which '2' is not"),
        ("replace(FINE, spec=SPEC._replace(prompts='reach'))", r"as spec\.prompts a tuple of texts, which 'reach' is"),
        ("replace(FINE, spec=SPEC._replace(prompts=()))", r"as spec\.prompts a tuple of texts, which \(\) is not"),
        ("replace(FINE, spec=SPEC._replace(prompts=('reach', 1)))", r"as one of spec\.prompts a text, which 1 is not"),
        ("replace(FINE, spec=SPEC._replace(prompts=(' ',)))", r"as one of spec\.prompts a text, which ' ' is not"),
        ("replace(FINE, make=None)", r"as make a function, which None is not"),
        ("replace(FINE, episode_steps=0)", r"as episode_steps, .* which 0 is not"),
        ("replace(FINE, rate_hz=0.5)", r"as rate_hz, .* which 0\.5 is not"),
        ("replace(FINE, needs_opengl=1)", r"as needs_opengl True or False, which 1 is not"),
        ("replace(FINE, worker_bytes=-1)", r"as worker_bytes, a whole number of at least 0, which -1 is not"),
        ("replace(FINE, packages='mujoco')", r"as packages a tuple of distributions' names, which 'mujoco' is not"),
        ("replace(FINE, evaluation_episodes=None)", r"as evaluation_episodes, .* which None is not"),
    ],
)
def test_what_a_function_returns_is_checked_by_name(directory: Path, expression: str, words: str) -> None:
    (directory / "expressions.py").write_text(EXPRESSIONS)
    assert describe(env_settings("expressions:make", {"expression": "FINE"}))["spec"] == (1, 32, 4, 2, ("reach",))
    with pytest.raises(ValueError, match=rf"^env\.name: expressions:make .*{words}"):
        describe(env_settings("expressions:make", {"expression": expression}))


def test_an_object_without_the_methods_of_an_environment_is_refused(directory: Path) -> None:
    (directory / "expressions.py").write_text(EXPRESSIONS)
    with pytest.raises(RuntimeError, match=r"^the environment expressions:make: what make returns, .* has no reset$"):
        make_environment(env_settings("expressions:make", {"expression": "FINE"}))


def made(fault: str | None = None, agent_cameras: tuple[int, ...] = (0,), **settings: Any) -> Environment:
    return make_environment(env_settings("reaching", {"fault": fault, "reach": 0.01}, **settings), agent_cameras)


def observed(environment: Environment, agent_cameras: int = 1) -> list[np.ndarray]:
    arrays: list[Any] = [np.zeros((2, 32, 32, 3), np.uint8), np.zeros((64, 64, 3 * agent_cameras), np.uint8)]
    arrays.append(np.zeros(5, np.float32))
    environment.observe(*arrays)
    return arrays


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("make", r".*reaching/__init__\.py, line \d+: OSError: there is no such robot"),
        ("task", r"reset must return a task_index, a whole number from 0 to 1, not 2"),
        ("no task", r"reset must return a task_index, a whole number from 0 to 1, not None"),
        ("step", r".*reaching/__init__\.py, line \d+: ValueError: cannot reshape"),
        ("no outcome", r"step_chunk must return a dsrl_async\.envs\.ChunkOutcome, not \(1, -1, False, False\)"),
        ("too many steps", r"step_chunk says that it executed 6 steps of a chunk of 5"),
        ("too few steps", r"step_chunk executed 4 of 5 steps, although the episode is neither"),
        ("success later", r"step_chunk says that step 5 of 5 was the first successful one; .* -1 means that there was"),
        ("no bool", r"step_chunk must return terminated as True or False, not None"),
        ("rewards", r"step_chunk must return rewards for the 5 steps that it executed, or none, not \[1\.0\]"),
        ("one camera", r"observe left images\[1\] as it was; write into it"),
        ("half a state", r"observe must write the state, 5 finite numbers, and it is \[.*nan, nan\] now"),
        ("close", r".*reaching/__init__\.py, line \d+: RuntimeError: it will not close"),
    ],
)
def test_an_environment_that_does_what_it_must_not_is_named_in_one_sentence(fault: str, words: str) -> None:
    def play() -> None:
        environment = made(fault)
        environment.reset(1)
        observed(environment)
        environment.step_chunk(np.zeros((5, 3), np.float32))
        environment.close()

    with pytest.raises(RuntimeError, match=f"^the environment reaching: {words}") as caught:
        play()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("settings", "steps"), [({}, [5, 5, 2]), ({"max_episode_steps": 6}, [5, 1])])
def test_an_episode_ends_after_its_steps(settings: dict[str, Any], steps: list[int]) -> None:
    environment = made(**settings)
    for episode in range(2):
        environment.reset(episode)
        outcomes = [environment.step_chunk(np.zeros((5, 3), np.float32)) for _ in steps]
        assert [outcome.steps for outcome in outcomes] == steps
        assert [outcome.truncated for outcome in outcomes] == [False] * (len(steps) - 1) + [True]
        assert not any(outcome.terminated for outcome in outcomes)


def test_success_at_the_last_step_is_no_truncation() -> None:
    environment = make_environment(env_settings("reaching", {"reach": 9.0}, max_episode_steps=1))
    environment.reset(0)
    outcome = environment.step_chunk(np.zeros((5, 3), np.float32))
    assert (outcome.steps, outcome.success_step, outcome.terminated, outcome.truncated) == (1, 0, True, False)


def test_the_agent_sees_its_cameras_and_films_show_what_the_policy_sees() -> None:
    environment: Any = made(agent_cameras=(1, 0))
    environment.reset(0)
    images, sac_image, _ = observed(environment, 2)
    assert [image.max() for image in images] == [100, 101]
    assert sac_image[..., :3].min() == sac_image[..., :3].max() == 101
    assert sac_image[..., 3:].min() == sac_image[..., 3:].max() == 100
    frame = environment.render(48, 1)
    assert (frame.shape, frame.min(), frame.max()) == ((48, 48, 3), 101, 101)
