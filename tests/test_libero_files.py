"""Finding an installed LIBERO and reading its files, without LIBERO."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dsrl_async.config import validate
from dsrl_async.envs import environment_spec, libero_files

TASKS = ("pick_up_the_bowl", "KITCHEN_SCENE10_open_the_top_drawer", "STUDY_SCENE1_pick_up_the_book")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The tree of a source checkout, which would prompt when imported."""
    inner = tmp_path / "package" / "libero"
    for name in ("bddl_files/libero_goal", "init_files/libero_goal", "assets", "benchmark"):
        (inner / name).mkdir(parents=True)
    (inner / "__init__.py").write_text("input('Do you want to specify a custom path?')")
    (inner / "benchmark" / "libero_suite_task_map.py").write_text(f"libero_task_map = {{'libero_goal': {list(TASKS)}}}")
    found = {"libero": tmp_path / "package"}
    monkeypatch.setattr(libero_files, "_package_directory", found.get)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LIBERO_CONFIG_PATH", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    libero_files.task_names.cache_clear()
    yield inner
    libero_files.task_names.cache_clear()
    os.environ.pop("LIBERO_CONFIG_PATH", None)


def spec(**settings: object) -> object:
    return environment_spec(validate({"env": {"name": "libero_goal", **settings}}).env.model_dump())


def test_instructions_come_from_the_tasks_names(package: Path) -> None:
    assert spec().prompts == ("pick up the bowl", "open the top drawer", "pick up the book")
    assert spec(task_ids=[2, 0]).prompts == ("pick up the book", "pick up the bowl")


def test_a_task_that_is_not_there_is_refused(package: Path) -> None:
    with pytest.raises(ValueError, match=r"env.task_ids: libero_goal has tasks 0 to 2, not 3"):
        spec(task_ids=[3])


def test_a_suite_that_is_not_there_is_refused(package: Path) -> None:
    with pytest.raises(ValueError, match="no suite 'libero_10'"):
        libero_files.task_names("libero_10")


def test_without_libero_it_is_said_how_to_get_it(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libero_files, "_package_directory", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[libero\]'"):
        spec()


def test_the_question_at_import_is_answered_outside_the_home_directory(package: Path, tmp_path: Path) -> None:
    libero_files.prepare_import()
    directory = Path(os.environ["LIBERO_CONFIG_PATH"])
    assert directory.parent == tmp_path
    assert not (tmp_path / "home").exists()
    assert libero_files.directories()["assets"] == package / "assets"


def test_a_users_configuration_is_followed_and_left_alone(package: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    file = tmp_path / "home" / ".libero" / "config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"assets: {elsewhere}\n")
    libero_files.prepare_import()
    assert libero_files.directories()["assets"] == elsewhere
    assert "LIBERO_CONFIG_PATH" not in os.environ
    elsewhere.rmdir()
    with pytest.raises(ValueError, match="assets are not at"):
        libero_files.prepare_import()


def test_init_states_are_read_from_torchs_files_without_unpickling(package: Path) -> None:
    states = np.random.default_rng(0).normal(size=(50, 79))
    path = package / "init_files" / "libero_goal" / f"{TASKS[0]}.pruned_init"
    torch.save(states, path)
    assert np.array_equal(libero_files.init_states("libero_goal", 0), states)
    np.savez(path.with_name(path.name + ".npz"), states=states[:3])
    assert np.array_equal(libero_files.init_states("libero_goal", 0), states[:3])


class _Planted:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("content", [_Planted(), np.zeros((4, 5), np.float32), np.zeros(7)])
def test_other_files_are_refused_and_never_executed(package: Path, content: object) -> None:
    torch.save(content, package / "init_files" / "libero_goal" / f"{TASKS[0]}.pruned_init")
    with pytest.raises(ValueError, match="not a matrix of float64"):
        libero_files.init_states("libero_goal", 0)


def test_a_pickle_without_torchs_archive_is_refused(package: Path) -> None:
    (package / "init_files" / "libero_goal" / f"{TASKS[0]}.pruned_init").write_bytes(pickle.dumps(np.zeros((2, 3))))
    with pytest.raises(ValueError, match="not a matrix of float64"):
        libero_files.init_states("libero_goal", 0)


def test_missing_init_states_are_named(package: Path) -> None:
    with pytest.raises(ValueError, match=r"no init states at .*pick_up_the_bowl"):
        libero_files.init_states("libero_goal", 0)


def test_a_specification_imports_neither_simulator_nor_libero() -> None:
    program = (
        "import sys, dsrl_async.envs as envs\n"
        "try:\n"
        "    envs.environment_spec({'name': 'libero_spatial', 'task_ids': None, 'image_size': 224})\n"
        "except ValueError:\n"
        "    pass\n"  # LIBERO is not installed
        "assert not {'libero', 'robosuite', 'mujoco', 'torch'} & sys.modules.keys()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("options", [["--repeats", "0"], ["--starts", "0"], ["--together", "-1"]])
def test_impossible_options_of_the_benchmark_are_refused(options: list[str]) -> None:
    command = [sys.executable, "-m", "dsrl_async.bench", "env", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "positive" in result.stderr
    assert result.stderr.count("\n") == 1
