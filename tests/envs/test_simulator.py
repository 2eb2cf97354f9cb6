"""MuJoCo, robosuite and OpenGL's variables: what a process is surrounded by does not decide whether they work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.paths import ROOT

from dsrl_async.config.load import validate
from dsrl_async.config.settings import ConfigError
from dsrl_async.envs import environment_record, graphics, simulator
from dsrl_async.run import preflight

VARIABLES = ("MUJOCO_GL", "MUJOCO_EGL_DEVICE_ID", "PYOPENGL_PLATFORM", "CUDA_VISIBLE_DEVICES")


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def test_mujoco_comes_from_one_place() -> None:
    plain = re.compile(r"^\s*(import mujoco\b(?!\.)|from mujoco import)", re.MULTILINE)
    found = [path.stem for path in (ROOT / "dsrl_async").rglob("*.py") if plain.search(path.read_text())]
    assert found == ["simulator"]


@pytest.fixture
def robosuite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A robosuite that, as the real one, reads CUDA's variable and its own settings when it is imported."""
    for name in [name for name in sys.modules if name.split(".")[0] == "robosuite"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "robosuite" / "utils").mkdir(parents=True)
    (tmp_path / "robosuite" / "__init__.py").write_text("from robosuite.macros_private import *\n")
    (tmp_path / "robosuite" / "macros_private.py").write_text("FILE_LOGGING_LEVEL = SIMULATION_TIMESTEP = 'mine'\n")
    (tmp_path / "robosuite" / "utils" / "__init__.py").touch()
    module = tmp_path / "robosuite" / "utils" / "binding_utils.py"
    module.write_text("import os\nfrom robosuite import *\nSEEN = dict(os.environ)\n")
    monkeypatch.syspath_prepend(tmp_path)
    return module


@pytest.mark.parametrize("cuda", [None, "", "-1", "3", "0,1", "GPU-1234abcd", "MIG-1234abcd", "NoDevFiles"])
def test_cudas_choice_is_kept_from_robosuite_and_from_nobody_else(
    robosuite: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None
) -> None:
    if cuda is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", cuda)
    seen = simulator.import_robosuite().SEEN
    assert "CUDA_VISIBLE_DEVICES" not in seen
    assert (seen["MUJOCO_EGL_DEVICE_ID"], seen["MUJOCO_GL"]) == ("0", "egl")
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == cuda


def test_cudas_choice_is_put_back_when_the_import_fails(robosuite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    robosuite.write_text("raise RuntimeError('no OpenGL')")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(RuntimeError, match="no OpenGL"):
        simulator.import_robosuite()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


def test_robosuites_own_settings_are_not_taken_from_a_file(robosuite: Path) -> None:
    found = simulator.import_robosuite()
    assert found.FILE_LOGGING_LEVEL is None
    assert not hasattr(found, "SIMULATION_TIMESTEP")


@pytest.mark.libero
@pytest.mark.skipif(find_spec("robosuite") is None, reason="needs the extra libero")
def test_the_real_robosuite_draws_whatever_cuda_says_and_writes_no_log() -> None:
    program = (
        "import logging, os\n"
        "from dsrl_async.envs.simulator import import_robosuite\n"
        "robosuite = import_robosuite()\n"
        "assert not logging.getLogger('robosuite_logs').handlers\n"
        "print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n"
        "robosuite.GLContext(max_width=64, max_height=64)\n"
    )
    variables = {"CUDA_VISIBLE_DEVICES": "GPU-1234abcd", "MUJOCO_EGL_DEVICE_ID": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | variables, capture_output=True, text=True)
    assert done.stdout == "GPU-1234abcd\n", done.stderr
    if done.returncode and "MUJOCO_EGL_DEVICE_ID" in done.stderr:
        pytest.skip("EGL has no device")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "backend", "device"),
    [
        ({}, "egl", "0"),
        ({"MUJOCO_GL": " OSMesa", "PYOPENGL_PLATFORM": "osmesa"}, "osmesa", "0"),
        ({"MUJOCO_GL": "EGL", "PYOPENGL_PLATFORM": "EGL", "MUJOCO_EGL_DEVICE_ID": "2"}, "egl", "2"),
        ({"MUJOCO_GL": "glx", "PYOPENGL_PLATFORM": "x11", "MUJOCO_EGL_DEVICE_ID": ""}, "glx", "0"),
        *(({"MUJOCO_GL": word}, "egl", "0") for word in ("glfw", "disabled", "off", "1")),
    ],
)
def test_what_the_variables_mean(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], backend: str, device: str
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert graphics.variables() == {"MUJOCO_GL": backend, "MUJOCO_EGL_DEVICE_ID": device}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"MUJOCO_GL": "bogus"}, "MUJOCO_GL=bogus is no way to draw"),
        ({"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "glx"}, "PYOPENGL_PLATFORM=glx contradicts MUJOCO_GL=egl"),
        ({"PYOPENGL_PLATFORM": "osmesa"}, "contradicts MUJOCO_GL=egl"),
        *(({"MUJOCO_EGL_DEVICE_ID": text}, "not the number of a device") for text in ("-1", "0,1", "GPU-1", "\u0663")),
    ],
)
def test_variables_that_make_no_sense_are_refused_for_libero_alone(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], words: str
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    preflight.check_graphics(environment_record(validate({}).env.model_dump()))
    with pytest.raises(ConfigError, match=words):
        preflight.check_graphics(environment_record(validate({"env": {"name": "libero_goal"}}).env.model_dump()))


@pytest.mark.parametrize(
    ("chosen", "there", "words"),
    [
        ("egl", (), "install the GPU's driver with EGL, or without a GPU libegl1"),
        ("egl", ("libEGL.so.1",), "install the GPU's driver with EGL"),
        ("egl", ("libEGL.so.1", "libEGL_mesa.so.0"), "its libraries are installed"),
        ("egl", ("libEGL.so.1", "libEGL_nvidia.so.0"), "its libraries are installed"),
        ("osmesa", ("libEGL.so.1",), "install libosmesa6"),
        ("osmesa", ("libOSMesa.so.8",), "its libraries are installed"),
        ("glx", (), "it needs a display: set MUJOCO_GL=egl"),
    ],
)
def test_nobody_is_told_to_install_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, chosen: str, there: tuple[str, ...], words: str
) -> None:
    def load(name: str) -> None:
        if name not in there:
            raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", load)
    monkeypatch.setenv("MUJOCO_GL", chosen)
    sentence = graphics.no_rendering(RuntimeError("two\nlines"))
    assert sentence.startswith(f"LIBERO cannot render with MUJOCO_GL={chosen} (RuntimeError: two lines); {words}")
