"""The rules of the house: how the rooms of the package stand on one another, and what they know nothing of.

The tables are the rules. They are kept by reading the sources, with all their imports, those inside functions too.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import pytest
from support.paths import ROOT

PACKAGE = "dsrl_async"
GROUND = "untrusted users_code config pi0 policies envs demonstrations sac"
MACHINE = "shm host"
SHARED = (
    "run.replay_ratio run.channel run.sockets run.weights run.checkpoints run.set_aside run.instructions "
    "run.evaluation run.demonstrations"
)
RUN = f"{SHARED} run.preflight run.worker run.inference run.learner run.supervisor"
BELOW_COMMANDS = f"{GROUND} {MACHINE} telemetry {RUN}"

HOUSE = {
    # On the ground: settings, the policy, environments, the small agent. None of them knows that there are processes.
    "untrusted": "",
    "users_code": "untrusted",
    "config": "untrusted",
    "pi0": "untrusted",
    "policies": "untrusted users_code config pi0",
    "envs": "untrusted users_code config",
    "demonstrations": "untrusted config",
    "sac": "config",
    # What processes share, and what deals with the operating system and the device.
    "shm": "config envs",
    "host": "untrusted config envs policies shm",
    # What a run shows of itself.
    "telemetry": "untrusted config envs shm host",
    # What the processes of a run have in common: the ratio, the weights, the files.
    "run.replay_ratio": "",
    "run.channel": "",
    "run.sockets": "run.channel",
    "run.weights": "run.channel run.sockets",
    "run.checkpoints": "untrusted config shm host",
    "run.set_aside": "host run.checkpoints",
    "run.instructions": "untrusted config policies run.checkpoints",
    "run.evaluation": "untrusted config envs host run.checkpoints",
    "run.demonstrations": "untrusted config envs demonstrations shm run.checkpoints",
    # What is checked before anything starts.
    "run.preflight": f"untrusted config pi0 policies envs {MACHINE} {SHARED}",
    # One room for each process; they meet in shared memory, and none imports another.
    "run.worker": "config envs shm host",
    "run.inference": f"{GROUND} {MACHINE} run.replay_ratio run.channel run.weights run.instructions run.evaluation",
    # Ends before the others start.
    "run.inversion": f"{GROUND} {MACHINE} run.demonstrations",
    # DSRL-NA asks the frozen policy inside of its updates.
    "run.learner": f"config sac policies {MACHINE} run.replay_ratio run.channel run.weights run.checkpoints "
    "run.instructions run.evaluation",
    # The launched process, which starts the others, or in serial mode is all of them.
    "run.supervisor": f"{GROUND} {MACHINE} telemetry {RUN}",
    # Many of them: a supervisor without a learner on each GPU or machine, and what joins them.
    "groups": f"{GROUND} {MACHINE} telemetry {RUN}",
    # What a run has learned, for other programs.
    "agent": f"{GROUND} {MACHINE} {RUN}",
    # The commands, and what lists them.
    "__main__": "config host",
    "launch": f"{BELOW_COMMANDS} groups",
    "evaluate": f"{BELOW_COMMANDS} agent groups",
    "report": BELOW_COMMANDS,
    "plan": f"{BELOW_COMMANDS} groups",
    "doctor": f"{BELOW_COMMANDS} groups",
    # It measures the command, and simulates devices with the figures of the plan.
    "bench": f"{BELOW_COMMANDS} groups launch plan",
    "pretraining": f"{BELOW_COMMANDS} evaluate",  # it counts successes as an evaluation does
}
"""Room -> rooms that it may import, besides itself. A room names only rooms above it in this table, so nothing points
upward."""

PROCESSES = "subprocess multiprocessing concurrent asyncio threading signal socket mmap fcntl select psutil zmq"
LIBRARIES = {
    "config": "torch mujoco zmq",
    "pi0": f"mujoco {PROCESSES}",
    "sac": f"mujoco {PROCESSES}",
    "envs": "torch zmq subprocess multiprocessing",
    "demonstrations": "torch mujoco zmq",
    "shm": "torch mujoco zmq",
    "telemetry": "torch mujoco zmq",
    "run.preflight": "mujoco zmq",
    "run.worker": "torch zmq",
}
"""Room -> other modules that it may not import: what it knows nothing of."""

WITHOUT_TORCH = {
    *("untrusted", "config", "envs", "shm", "telemetry"),
    *(
        "demonstrations",
        "run.demonstrations",
        "run.evaluation",
        "run.preflight",
        "run.worker",
        "run.supervisor",
        "launch",
    ),
}
"""Rooms of the environment workers, their template and the supervisor: none of their modules imports torch, nor by way
of any other, but for those in `WITH_TORCH`."""
WITH_TORCH = {
    "run.supervisor.serial": "it is the inference process and the learner as well, and imported in serial mode only",
}


class Import(NamedTuple):
    """A line of the package that imports something."""

    module: str
    line: int
    imported: str
    """The module, without the package's name if it is one of the package."""
    own: bool
    """Whether it is one of the package."""

    def __str__(self) -> str:
        return f"{self.module}, line {self.line}, imports {self.imported}"


@functools.cache
def read_sources() -> dict[str, str]:
    """Module -> its source, for all of the package: `run.supervisor.session`; a folder's own module has its name."""
    sources = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return sources


def imports_of(sources: Mapping[str, str]) -> Iterator[Import]:
    for module, source in sources.items():
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}, line {node.lineno}: imports are absolute here"
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name.removeprefix(f"{PACKAGE}.") in sources else str(node.module) for name in full]
            else:
                continue
            for name in names:
                own, inside = name.partition(".")[0] == PACKAGE, name.removeprefix(PACKAGE).lstrip(".")
                yield Import(module, node.lineno, inside if own else name, own)


def room_of(module: str) -> str:
    """The room in `HOUSE` that a module of the package is in, or the first part of its name."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "run" else 1])


def upward(sources: Mapping[str, str]) -> list[Import]:
    """Imports between rooms that `HOUSE` does not allow. What all may import is the package itself, for its version."""
    return [
        found
        for found in imports_of(sources)
        if found.own
        and found.imported
        and room_of(found.imported) not in (room_of(found.module), *HOUSE.get(room_of(found.module), "").split())
    ]


def foreign(sources: Mapping[str, str]) -> list[Import]:
    """Imports of what a room knows nothing of."""
    return [
        found
        for found in imports_of(sources)
        if found.imported.partition(".")[0] in LIBRARIES.get(room_of(found.module), "").split() and not found.own
    ]


def circle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import one another in a circle, or none. An import of a folder is one of its `__init__.py`."""
    graph: dict[str, set[str]] = {module: set() for module in sources}
    for found in imports_of(sources):
        if found.own:
            graph[found.module].add(found.imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def with_line(module: str, line: str) -> dict[str, str]:
    """The sources, of which one module has another line inside a function, and the others nothing."""
    source = f"{read_sources()[module]}\n\ndef planted():\n    {line}\n"
    return dict.fromkeys(read_sources(), "") | {module: source}


def test_the_table_has_every_room_and_points_nowhere_but_up_the_page() -> None:
    assert {room_of(module) for module in read_sources()} - {"", "run"} == set(HOUSE)
    above: set[str] = set()
    for room, may_import in HOUSE.items():
        assert set(may_import.split()) <= above | {room}, room
        above.add(room)


def test_rooms_import_only_what_they_may() -> None:
    assert list(map(str, upward(read_sources()))) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("pi0.model", "from dsrl_async.config.settings import Config"),
        ("envs.tabletop", "from dsrl_async.sac import agent"),
        ("envs.tabletop", "import dsrl_async.pi0"),
        ("sac.agent", "from dsrl_async.shm import replay"),
        ("sac.agent", "from dsrl_async.host import device"),
        ("shm.replay", "from dsrl_async.host import files"),
        ("host.machine", "from dsrl_async.run import preflight"),
        ("telemetry.profile.bottleneck", "from dsrl_async.run.preflight import check_device"),
        ("run.worker.worker", "from dsrl_async.run.inference.server import InferenceServer"),
        ("run.inference.server", "from dsrl_async.run.learner import learner"),
        ("run.learner.learner", "from dsrl_async.run.supervisor import session"),
        ("run.preflight", "import dsrl_async.run.supervisor.session"),
        ("run.weights", "from dsrl_async.run import checkpoints"),
        ("run.supervisor.session", "from dsrl_async import launch"),
        ("evaluate.play", "from dsrl_async.plan import capacity"),
        ("plan.capacity", "from dsrl_async.bench import pipeline"),
        ("bench.pipeline", "from dsrl_async.evaluate import episodes"),
    ],
)
def test_an_import_that_points_upward_or_sideways_is_found(module: str, line: str) -> None:
    assert [found.module for found in upward(with_line(module, line))] == [module]


def test_rooms_know_nothing_of_what_is_not_theirs() -> None:
    assert list(map(str, foreign(read_sources()))) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("pi0.sampler", "import subprocess"),
        ("sac.flat", "from multiprocessing import shared_memory"),
        ("envs.tabletop", "import torch"),
        ("shm.replay", "import torch.nn as nn"),
        ("telemetry.monitor", "from torch import Tensor"),
        ("config.load", "import torch"),
    ],
)
def test_an_import_of_what_is_not_the_rooms_is_found(module: str, line: str) -> None:
    assert [found.module for found in foreign(with_line(module, line))] == [module]


IMPORTS_USERS_MODULES = {
    "run.worker.worker": "environment workers and their template",
    "host.environments": "a child process is asked",
}
"""Modules of a run that may make an environment, or ask what is known of one; all others ask `host.environments`."""
ASKS_ITSELF = {"environment_record", "environment_spec", "make_environment", "describe"}


def asking_here(sources: Mapping[str, str]) -> list[str]:
    """Modules of a run and its commands that would import a user's module into their own process."""
    return [
        module
        for module, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        and node.module == f"{PACKAGE}.envs"
        and ASKS_ITSELF & {alias.name for alias in node.names}
        and module not in IMPORTS_USERS_MODULES
        and room_of(module) not in ("pretraining", "bench")  # LIBERO's environments, in processes of their own
    ]


def test_only_workers_import_a_users_module() -> None:
    assert asking_here(read_sources()) == []


def test_an_import_of_a_users_module_is_found() -> None:
    planted = with_line("run.preflight.policy", "from dsrl_async.envs import environment_record")
    assert asking_here(planted) == ["run.preflight.policy"]


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert circle(read_sources()) == []


def test_a_circle_is_found() -> None:
    planted = with_line("envs.images", "from dsrl_async.envs.recording import RecordingEnvironment")
    planted["envs.recording"] = "from dsrl_async.envs.images import libero_image\n"
    assert {"envs.images", "envs.recording"} <= set(circle(planted))


IMPORT_ALL = """
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    if "torch" in sys.modules:
        sys.exit(module + " imports torch")
"""


def imports_torch(modules: list[str]) -> str:
    """What is said if one of the modules, imported one after another in a new interpreter, brings torch along."""
    code = IMPORT_ALL.format(modules=modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode in (0, 1), done.stderr
    return done.stderr


def test_workers_their_template_and_the_supervisor_import_no_torch() -> None:
    # They need extras; `LIBRARIES` holds for them.
    of_extras = {"envs.libero", "envs.light_graphics", "demonstrations.lerobot", "demonstrations.parquet"}
    modules = [
        f"{PACKAGE}.{module}"
        for module in read_sources()
        if room_of(module) in WITHOUT_TORCH and module not in {*WITH_TORCH, *of_extras}
    ]
    assert len(modules) > 30
    assert imports_torch(modules) == ""


def test_a_module_that_imports_torch_by_way_of_another_is_found() -> None:
    assert "serial imports torch" in imports_torch([f"{PACKAGE}.launch", *(f"{PACKAGE}.{name}" for name in WITH_TORCH)])


KNOWS_RAY = {"groups.placer", "groups.ray_host"}
"""Modules that import Ray: it ends its process when a cluster is lost, so that must be one of its own."""


def with_ray(sources: Mapping[str, str]) -> set[str]:
    return {found.module for found in imports_of(sources) if found.imported.partition(".")[0] == "ray"}


def test_only_the_placer_and_what_it_starts_import_ray() -> None:
    assert with_ray(read_sources()) == KNOWS_RAY
    assert with_ray(with_line("run.supervisor.supervisor", "import ray")) == {"run.supervisor.supervisor"}


STATE = """
import logging, os, signal, sys, threading
def state():
    signals = {number: str(signal.getsignal(number)) for number in signal.valid_signals()}
    handlers = list(logging.getLogger().handlers), logging.getLogger().level, logging.raiseExceptions
    hooks = sys.excepthook, sys.displayhook, sys.unraisablehook, threading.excepthook
    return signals, handlers, hooks, dict(os.environ), list(sys.path), list(sys.argv), threading.active_count()
sys.argv[:] = arguments
before = state()
"""


def changed_by(line: str, arguments: list[str]) -> bool:
    """Whether a new interpreter's hooks, signal handlers, logging, environment or arguments are others after `line`."""
    code = f"arguments = {arguments}\n{STATE}\n{line}\nsys.exit(7 * (state() != before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 7), done.stderr
    return done.returncode == 7


def test_importing_the_package_sets_nothing() -> None:
    for arguments in (["-c"], ["-m"]):  # the latter are there while Python looks for a module that it is to run
        assert not changed_by("import dsrl_async", arguments)


@pytest.mark.parametrize(
    "line",
    [
        "sys.excepthook = print",
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN)",
        "os.environ['DSRL_PLANTED'] = 'yes'",
        "logging.basicConfig()",
    ],
)
def test_what_an_import_may_not_set_is_found(line: str) -> None:
    assert changed_by(line, ["-c"])
