"""Fixtures that several test files use, and what tests that run side by side need."""

from __future__ import annotations

import fcntl
import os
import pickle
import signal
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support import launched
from support.paths import ROOT

from dsrl_async.config.load import validate
from dsrl_async.config.settings import Config
from dsrl_async.envs import EnvironmentSpec, environment_spec
from dsrl_async.host import probe, waiting
from dsrl_async.host.signals import SIGNALS, WARNINGS
from dsrl_async.run.preflight.host import cuda_devices
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.memory import create_memory

HORIZON = 10
DOOR, ROOM = ROOT / "pyproject.toml", Path(__file__)
"""Files that are locked while a test runs; any would do."""

torch.set_num_threads(1)  # more would take the cores from the tests that run beside


@contextmanager
def locked(path: Path, how: int) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY)  # of a directory, too
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Under pytest-xdist, a test marked `alone` waits until those beside it have ended, and they wait for it."""
    with ExitStack() as stack:
        if hasattr(item.config, "workerinput"):  # not in a pytest that a test has started
            alone = item.get_closest_marker("alone") is not None
            with locked(DOOR, fcntl.LOCK_EX):  # nobody else comes in while one waits here to be alone
                stack.enter_context(locked(ROOM, fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        return (yield)


@pytest.fixture(autouse=True)
def no_waits_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long something takes depends on what else runs; so what a command says in this process must not."""
    monkeypatch.setattr(waiting, "PATIENCE_S", 3600.0)


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """A command that a test calls in this process answers signals in its own way, which children would inherit."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, *WARNINGS)}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """What a failed test has started is ended, so that it takes no core from those that follow."""
    report = yield
    if report.failed:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                process.kill()
    return report


@pytest.fixture(autouse=True)
def ask_anew() -> Iterator[None]:
    """What a test says of CUDA's devices and of users' environments and policies is not kept for the next one."""
    for forget in (cuda_devices.cache_clear, probe.ask_anew):
        forget()
    yield
    for forget in (cuda_devices.cache_clear, probe.ask_anew):
        forget()


@pytest.fixture
def small_config() -> Config:
    """Two actors, a tiny replay buffer, quick warm-up."""
    return validate(
        {
            "actors": 2,
            "replay": {"capacity": 200, "warmup": "gaussian", "warmup_decisions": 16},  # which needs no weights
            "sac": {"batch_size": 16, "hidden_dims": [16, 16], "num_q_heads": 2, "conv_channels": [4]},
        }
    )


@pytest.fixture
def spec(small_config: Config) -> EnvironmentSpec:
    return environment_spec(small_config.env.model_dump())


@pytest.fixture
def memory(small_config: Config, spec: EnvironmentSpec) -> Arena:
    return create_memory(small_config, spec, HORIZON)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> launched.FinishedRun:
    """One run for all test processes: the first that asks starts it."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if hasattr(request.config, "workerinput") else base) / "finished"
    directory.mkdir(exist_ok=True)
    with locked(directory, fcntl.LOCK_EX):
        said = directory / "run.pickle"
        if not said.is_file():
            said.write_bytes(pickle.dumps(launched.finished_run(directory)))
        found: launched.FinishedRun = pickle.loads(said.read_bytes())
    return found
