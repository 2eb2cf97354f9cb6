"""Actors that hang or crash in their start, as with a broken OpenGL driver, and a template that does so before them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.launched import SMALL, Launched

FAULT = """
import ctypes, pathlib, sys, time
if "dsrl_async.launch" in sys.orig_argv:
    from dsrl_async.run.supervisor import supervisor
    supervisor.QUICK_S = 0.0  # what counts is whether the actor got anywhere
if "dsrl_async.run.worker.template" in sys.orig_argv:
    from dsrl_async.envs.tabletop import TabletopEnvironment
    healthy, first = TabletopEnvironment.{method}, pathlib.Path({first!r})
    def claimed():
        try:
            first.mkdir()
        except FileExistsError:
            return False
        return True
    def broken(*arguments, **keywords):
        if {always} or claimed():
            {fault}
        return healthy(*arguments, **keywords)
    TabletopEnvironment.{method} = broken
"""
FAULTS = {"crash": "ctypes.string_at(0)", "hang": "time.sleep(1000)", "refuse": "raise ValueError('no such scene')"}
METHODS = {"template": "__init__", "actor": "reset"}
"""Of the environment: the first thing that each of them does."""


def launched(directory: Path, where: str, fault: str, always: bool, *arguments: str) -> Launched:
    """A run whose actors or template meet the fault (through Python's sitecustomize hook), all or the first one."""
    code = FAULT.format(first=str(directory / "first"), always=always, fault=FAULTS[fault], method=METHODS[where])
    (directory / "sitecustomize.py").write_text(code)
    path = os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))
    return Launched(directory / "run", *SMALL, *arguments, environment={"PYTHONPATH": path})


@pytest.mark.parametrize(("where", "name"), [("template", "template"), ("actor", "actor-000")])
@pytest.mark.parametrize(("fault", "how"), [("crash", "killed by SIGSEGV"), ("hang", "no sign of life for 2 s")])
def test_what_never_starts_ends_the_run_and_names_its_log(
    tmp_path: Path, where: str, name: str, fault: str, how: str
) -> None:
    run = launched(tmp_path, where, fault, True, "--actors", "1", "--heartbeat-timeout-s", "2")
    result = run.finish()
    reason: str = result["exit_reason"]
    assert result["returncode"] == 1
    assert reason.startswith(f"failed: {name} ended 3 times soon after its start ({how})")
    assert "to go on" not in result["stderr"]
    assert "python -m dsrl_async.doctor" in reason
    log = run.run_dir / "logs" / f"{name}.log"
    assert str(log) in reason
    assert fault == "hang" or ("Segmentation fault" in log.read_text() and "in broken" in log.read_text())
    assert run.left_over() == []


@pytest.mark.parametrize("where", ["template", "actor"])
@pytest.mark.parametrize("fault", ["crash", "hang"])
def test_what_fails_once_is_replaced(tmp_path: Path, where: str, fault: str) -> None:
    run = launched(tmp_path, where, fault, False, "--heartbeat-timeout-s", "4")
    run.wait_learning()
    run.wait_for(lambda _: "starting it again" in (run.run_dir / "logs" / "supervisor.log").read_text())
    run.wait_for(lambda _: len(run.children("worker")) == 2)
    run.signal(signal.SIGINT)
    result: dict[str, Any] = run.finish()
    assert result["exit_reason"] == "interrupted"
    assert result["restarts"][where] >= 1
    assert run.left_over() == []


def test_an_environment_that_cannot_be_made_ends_the_run_with_its_sentence(tmp_path: Path) -> None:
    """The template cannot make it either, and leaves it to the actors to say so."""
    run = launched(tmp_path, "template", "refuse", True, "--actors", "1")
    result = run.finish()
    assert result["exit_reason"].startswith("failed: actor-000 ended 3 times soon after its start (exit code 1): ")
    assert "ValueError: no such scene" in result["exit_reason"]
    assert run.left_over() == []


def test_a_few_actors_come_up_at_a_time(tmp_path: Path) -> None:
    """While the first actors hang in their start, the others are not started yet."""
    run = launched(
        tmp_path, "actor", "hang", True, "--actors", "40", "--replay.capacity", "9600", "--heartbeat-timeout-s", "60"
    )
    run.wait_for(lambda _: len(run.children("worker")) >= 2)
    run.wait_for(lambda figures: figures.get("wall_s", 0) > 3)
    assert 2 <= len(run.children("worker")) <= max(2, os.cpu_count() or 1)
    run.signal(signal.SIGINT)
    run.finish()
    assert run.left_over() == []
