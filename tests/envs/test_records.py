"""What is known of the shipped environments: that the records say what the configuration and the environments say."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest

from dsrl_async.config.settings import EnvConfig
from dsrl_async.envs import OWN_SETTINGS, EnvironmentRecord, environment_record, make_environment
from dsrl_async.envs.libero_files import SUITES
from dsrl_async.envs.user import USER_SETTINGS

NAMES = ("tabletop", *SUITES)
COMMON = {"name", "max_episode_steps", "chunk", "use_step_penalty", "reward_rule", "reward"}
"""Settings of every environment."""


def record(name: str, **settings: Any) -> EnvironmentRecord:
    return environment_record(EnvConfig.model_validate({"name": name, **settings}).model_dump())


def test_every_shipped_name_has_a_record() -> None:
    assert {name: record(name).name for name in NAMES} == {name: name for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_of_an_environment_are_those_whose_description_begins_with_it(name: str) -> None:
    kind = "LIBERO: " if name in SUITES else "tabletop: "
    fields = EnvConfig.model_fields.items()
    described = {key for key, field in fields if (field.description or "").startswith(kind)}
    assert record(name).own_settings == described
    assert EnvConfig.model_fields.keys() == OWN_SETTINGS | COMMON


def test_the_settings_of_a_users_environment_are_those_whose_description_says_so() -> None:
    described = {
        key for key, field in EnvConfig.model_fields.items() if (field.description or "").startswith("yours: ")
    }
    assert described == USER_SETTINGS == OWN_SETTINGS - record("tabletop").own_settings - record(SUITES[0]).own_settings


def test_an_episode_of_the_tabletop_ends_when_its_record_says() -> None:
    for settings in ({}, {"max_episode_steps": 7}):
        known = record("tabletop", **settings)
        environment: Any = make_environment(known.settings)
        assert environment.max_episode_steps == known.episode_steps == settings.get("max_episode_steps", 50)
        environment.close()


def test_a_preset_fills_in_what_is_null() -> None:
    assert record("libero_goal").settings["seeding"] == "task"
    assert record("libero_goal").episode_steps == record("libero_goal").settings["max_episode_steps"] == 300
    changed = record("libero_goal", preset="lerobot", max_episode_steps=9)
    assert (changed.settings["seeding"], changed.settings["render_size"], changed.episode_steps) == ("episode", 360, 9)
    assert record("tabletop").settings["max_episode_steps"] is None  # there is no preset


def test_rlinfs_horizons_are_those_of_its_files_for_pi0() -> None:
    suites = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
    assert [record(suite, preset="rlinf").episode_steps for suite in suites] == [240, 240, 320, 480, 512]


def test_one_scene_is_the_templates_and_several_are_the_workers() -> None:
    one, several = record("libero_spatial", task_ids=[3]), record("libero_spatial", task_ids=[3, 4])
    assert one.template_bytes - several.template_bytes == several.worker_bytes - one.worker_bytes > 0
    assert record("libero_spatial", render_quality="fast").worker_bytes < record("libero_spatial").worker_bytes


def test_a_records_data_can_cross_a_process_border() -> None:
    for name in NAMES:
        functions = {"spec", "make", "check"}
        known = record(name)
        data = {key: getattr(known, key) for key in known.__dataclass_fields__ if key not in functions}
        assert pickle.loads(pickle.dumps(data)) == data


def test_a_record_needs_neither_a_simulator_nor_libero_nor_torch() -> None:
    settings = [EnvConfig.model_validate({"name": name}).model_dump() for name in NAMES]
    program = (
        "import sys, importlib.util\n"
        "importlib.util.find_spec = None\n"  # nothing is looked for
        "from dsrl_async.envs import environment_record\n"
        f"for settings in {settings}:\n"
        "    environment_record(settings)\n"
        "assert not {'libero', 'robosuite', 'mujoco', 'torch'} & sys.modules.keys()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
