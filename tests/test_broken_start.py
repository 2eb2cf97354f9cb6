"""Actors that hang or crash while their environment is made, as with a broken OpenGL driver."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from launched import SMALL, Launched

FAULT = """
import ctypes, pathlib, sys, time
if "dsrl_async.launch" in sys.orig_argv:
    from dsrl_async import supervisor
    supervisor.QUICK_S = 0.0  # what counts is whether the actor got anywhere
if "dsrl_async.worker" in sys.orig_argv:
    from dsrl_async.envs.tabletop import TabletopEnvironment
    healthy, first = TabletopEnvironment.__init__, pathlib.Path({first!r})
    def claimed():
        try:
            first.mkdir()
        except FileExistsError:
            return False
        return True
    def broken(*arguments, **keywords):
        if {always} or claimed():
            {fault}
        healthy(*arguments, **keywords)
    TabletopEnvironment.__init__ = broken
"""
FAULTS = {"crash": "ctypes.string_at(0)", "hang": "time.sleep(1000)"}


def launched(directory: Path, fault: str, always: bool, *arguments: str) -> Launched:
    """A run whose actors meet the fault (through Python's sitecustomize hook), all of them or only the first one."""
    code = FAULT.format(first=str(directory / "first"), always=always, fault=FAULTS[fault])
    (directory / "sitecustomize.py").write_text(code)
    path = os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))
    return Launched(directory / "run", *SMALL, *arguments, environment={"PYTHONPATH": path})


@pytest.mark.parametrize(("fault", "how"), [("crash", "killed by SIGSEGV"), ("hang", "no sign of life for 2 s")])
def test_actor_that_never_starts_ends_the_run_and_names_its_log(tmp_path: Path, fault: str, how: str) -> None:
    run = launched(tmp_path, fault, True, "--actors", "1", "--heartbeat-timeout-s", "2")
    result = run.finish()
    reason: str = result["exit_reason"]
    assert result["returncode"] == 1
    assert reason.startswith(f"failed: actor-000 ended 3 times soon after its start ({how})")
    assert "python -m dsrl_async.doctor" in reason
    assert str(run.run_dir / "logs" / "actor-000.log") in reason
    log = (run.run_dir / "logs" / "actor-000.log").read_text()
    assert fault == "hang" or ("Segmentation fault" in log and "in broken" in log)
    assert run.left_over() == []


@pytest.mark.parametrize("fault", ["crash", "hang"])
def test_actor_that_fails_once_is_replaced(tmp_path: Path, fault: str) -> None:
    run = launched(tmp_path, fault, False, "--heartbeat-timeout-s", "4")
    run.wait_learning()
    run.wait_for(lambda _: "starting it again" in (run.run_dir / "logs" / "supervisor.log").read_text())
    run.wait_for(lambda _: len(run.children("worker")) == 2)
    run.signal(signal.SIGINT)
    result: dict[str, Any] = run.finish()
    assert result["exit_reason"] == "interrupted"
    assert result["restarts"]["actor"] >= 1
    assert run.left_over() == []


def test_a_few_actors_come_up_at_a_time(tmp_path: Path) -> None:
    """While the first actors hang in their start, the others are not started yet."""
    run = launched(tmp_path, "hang", True, "--actors", "40", "--replay.capacity", "9600", "--heartbeat-timeout-s", "60")
    run.wait_for(lambda _: len(run.children("worker")) >= 2)
    run.wait_for(lambda figures: figures.get("wall_s", 0) > 3)
    assert 2 <= len(run.children("worker")) <= max(2, os.cpu_count() or 1)
    run.signal(signal.SIGINT)
    run.finish()
    assert run.left_over() == []
