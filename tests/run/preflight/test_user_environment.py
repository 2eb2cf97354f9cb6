"""What is checked of a run with a user's environment, and that a setting without an effect is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.user_environments import INSTALLED, found_in, write_policy

from dsrl_async.config.command_line import load_config
from dsrl_async.config.load import to_yaml
from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.run import preflight


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    with found_in(INSTALLED):
        yield


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policy")
    write_policy(directory, cameras=2, image_size=32, robot_state_dim=5, robot_action_dim=3, action_dim=6)
    return directory


def load(*arguments: str, name: str = "reaching") -> Config:
    return load_config(["--env.name", name, *arguments])


@pytest.mark.parametrize(
    ("name", "arguments", "key"),
    [
        ("reaching", ["--env.task-ids", "[0]"], "task_ids"),
        ("reaching", ["--env.image-size", "64"], "image_size"),
        ("reaching", ["--env.layout", "shuffle"], "layout"),
        ("reaching:make_environment", ["--env.render-quality", "fast"], "render_quality"),
        ("tabletop", ["--env.preset", "rlinf"], "preset"),
        ("tabletop", ["--env.scene-order", "cycled"], "scene_order"),
        ("tabletop", ["--env.options", "{a: 1}"], "options"),
        ("libero_goal", ["--env.options", "{a: 1}"], "options"),
        ("libero_goal", ["--env.layout", "fixed"], "layout"),
    ],
)
def test_a_setting_without_an_effect_is_refused_by_name(name: str, arguments: list[str], key: str) -> None:
    preflight.check_effect(load(name=name))
    with pytest.raises(ConfigError, match=rf"^env\.{key}: it has no effect on {name}; leave it out$"):
        preflight.check_effect(load(*arguments, name=name))


def test_a_run_that_was_made_with_such_a_setting_goes_on_and_is_given_no_other(tmp_path: Path) -> None:
    """Earlier versions said nothing of it."""
    (tmp_path / "config.yaml").write_text(to_yaml(load("--env.image-size", "64", name="tabletop")))
    preflight.check_effect(load_config(["--resume", str(tmp_path)]))
    preflight.check_effect(load_config(["--resume", str(tmp_path), "--env.image-size", "224"]))
    with pytest.raises(ConfigError, match=r"^env\.image_size: it has no effect on tabletop"):
        preflight.check_effect(load_config(["--resume", str(tmp_path), "--env.image-size", "96"]))


def test_the_agent_has_the_widths_of_environment_and_policy_unless_others_are_given(policy: Path) -> None:
    run = preflight.check_run(load("--policy.checkpoint", str(policy)))
    assert (run.config.sac.state_dim, run.config.sac.noise_dim) == (5, 6)
    written = yaml.safe_load(to_yaml(run.config))
    assert (written["sac"]["state_dim"], written["sac"]["noise_dim"], written["env"]["options"]) == (5, 6, {})
    tabletop = preflight.check_run(Config())
    assert (tabletop.config.sac.state_dim, tabletop.config.sac.noise_dim) == (8, 32)
    for key, given, width in (("state_dim", 8, 5), ("noise_dim", 32, 6)):
        with pytest.raises(ConfigError, match=rf"^sac\.{key}: {given} must be the .* width, {width}; leave it out$"):
            preflight.check_run(load("--policy.checkpoint", str(policy), f"--sac.{key}", str(given)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], r"policy\.checkpoint: null means the tabletop's policy; for reaching give --policy\.checkpoint DIR$"),
        (
            ["--policy.checkpoint", "{policy}", "--sac.cameras", "[2]"],
            r"sac\.cameras: reaching has no camera 2; choose",
        ),
        (
            ["--policy.checkpoint", "{policy}", "--env.chunk", "11"],
            r"env\.chunk: 11 is more than the policy's 10 action",
        ),
        (
            ["--policy.checkpoint", "{other}"],
            r"policy\.checkpoint: the cameras of .* is 1, that of the environment reach",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(arguments: list[str], words: str, policy: Path, tmp_path: Path) -> None:
    write_policy(tmp_path, cameras=1, image_size=32, robot_state_dim=5, robot_action_dim=3, action_dim=6)
    with pytest.raises(ConfigError, match=f"^{words}"):
        preflight.check_run(load(*(word.format(policy=policy, other=tmp_path) for word in arguments)))


def test_a_run_keeps_the_shapes_of_its_environment_and_tells_of_another_file(policy: Path, tmp_path: Path) -> None:
    run = preflight.check_run(load("--policy.checkpoint", str(policy)))
    before = preflight.made_with(run)
    preflight.record_made_with(tmp_path, before)

    def changes(**environment: Any) -> list[str]:
        now = {**before, "environment": {**before["environment"], **environment}}
        return preflight.check_made_with(tmp_path, now, policy)

    assert before["packages"] == {"reaching": "1.2"}
    assert changes() == []
    assert changes(file="/elsewhere/env.py") == [f"environment {INSTALLED}/reaching/__init__.py -> /elsewhere/env.py"]
    other = run.spec._replace(prompts=("reach the red one",))._asdict()
    with pytest.raises(
        ConfigError, match=r"^env\.name: the prompts of the environment in .* is \('reach the red one',\)"
    ):
        changes(spec=other)
    preflight.record_made_with(tmp_path, {key: value for key, value in before.items() if key != "environment"})
    assert changes(spec=other) == []  # an earlier version has made it
    assert "environment" not in preflight.made_with(replace(run, environment=replace(run.environment, file=None)))


def test_the_default_run_directory_has_a_name_of_words(policy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    config = load("--policy.checkpoint", str(policy), name="reaching:make_environment")
    assert preflight.choose_run_directory(config).name.endswith("-reaching-make_environment")
