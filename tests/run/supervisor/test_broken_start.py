"""Actors that hang or crash in their start, as with a broken OpenGL driver, and a template that does so before them."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from support.launched import SMALL, Launched
from support.planted import Planted

QUICK = """
from dsrl_async.run.supervisor import supervisor
assert supervisor.QUICK_S
supervisor.QUICK_S = 0.0  # what counts is whether the worker got anywhere
kill_if_silent = supervisor.Supervisor._kill_if_silent
def kill_who_hangs(self, child, popen):
    return kill_if_silent(self, child, popen) if child.kind in {silent!r} and self._last_beat(child) else ""
supervisor.Supervisor._kill_if_silent = kill_who_hangs  # the others may take long over imports on a busy machine
"""
FAULT = """
import ctypes, pathlib, time
from dsrl_async.envs.tabletop import TabletopEnvironment
def plant(method, meet):
    healthy = getattr(TabletopEnvironment, method)
    def broken(*arguments, **keywords):
        meet()
        return healthy(*arguments, **keywords)
    setattr(TabletopEnvironment, method, broken)
def claimed(path):
    try:
        pathlib.Path(path).mkdir()
    except FileExistsError:
        return False
    return True
def refuse():
    raise ValueError("no such scene")
FAULTS = {{"crash": lambda: ctypes.string_at(0), "hang": lambda: time.sleep(1000), "refuse": refuse}}
for method, fault in {faults!r}.items():
    def meet(first={first!r} + method, fault=FAULTS[fault]):
        if {always} or claimed(first):
            fault()
    plant(method, meet)
"""
METHODS = {"template": "__init__", "actor": "reset"}
"""The method of the environment that each of them calls first."""


def launched(directory: Path, faults: dict[str, str], always: bool, *arguments: str) -> Launched:
    """A run whose template or workers meet their fault, all of them or only the first one."""
    of_methods = {METHODS[where]: fault for where, fault in faults.items()}
    launch = QUICK.format(silent=[where for where, fault in faults.items() if fault == "hang"])
    code = FAULT.format(faults=of_methods, first=str(directory / "first-"), always=always)
    planted = Planted(directory, {"dsrl_async.launch": launch, "dsrl_async.run.worker.template": code})
    return Launched(directory / "run", *SMALL, *arguments, planted=planted)


@pytest.mark.parametrize(("where", "name"), [("template", "template"), ("actor", "actor-000")])
@pytest.mark.parametrize(("fault", "how"), [("crash", "killed by SIGSEGV"), ("hang", r"no sign of life for \d+ s")])
def test_what_never_starts_ends_the_run_and_names_its_log(
    tmp_path: Path, where: str, name: str, fault: str, how: str
) -> None:
    run = launched(tmp_path, {where: fault}, True, "--actors", "1", "--heartbeat-timeout-s", "1")
    result = run.finish()
    reason: str = result["exit_reason"]
    assert result["returncode"] == 1
    assert re.match(rf"failed: {name} ended 3 times soon after its start \({how}\)", reason)
    assert "to go on" not in result["stderr"]
    assert "python -m dsrl_async.doctor" in reason
    log = run.run_dir / "logs" / f"{name}.log"
    assert str(log) in reason
    assert fault == "hang" or ("Segmentation fault" in log.read_text() and "in broken" in log.read_text())
    assert run.left_over() == []


@pytest.mark.parametrize("faults", [{"template": "crash", "actor": "hang"}, {"template": "hang", "actor": "crash"}])
def test_what_fails_once_is_replaced(tmp_path: Path, faults: dict[str, str]) -> None:
    run = launched(tmp_path, faults, False, "--heartbeat-timeout-s", "4")
    run.wait_learning()
    log = run.run_dir / "logs" / "supervisor.log"
    run.wait_for(lambda _: log.read_text().count("starting it again") >= 2)
    run.wait_for(lambda _: len(run.children("worker")) == 2)
    run.signal(signal.SIGINT)
    result: dict[str, Any] = run.finish()
    assert result["exit_reason"] == "interrupted"
    assert result["restarts"]["template"] >= 1
    assert result["restarts"]["actor"] >= 1
    assert run.left_over() == []


def test_an_environment_that_cannot_be_made_ends_the_run_with_its_sentence(tmp_path: Path) -> None:
    """The template cannot make it either, and leaves it to the actors to say so."""
    run = launched(tmp_path, {"template": "refuse"}, True, "--actors", "1")
    result = run.finish()
    assert result["exit_reason"].startswith("failed: actor-000 ended 3 times soon after its start (exit code 1): ")
    assert "ValueError: no such scene" in result["exit_reason"]
    assert run.left_over() == []


def test_a_few_actors_come_up_at_a_time(tmp_path: Path) -> None:
    """While the first actors hang in their start, the others are not started yet."""
    run = launched(
        tmp_path, {"actor": "hang"}, True, "--actors", "40", "--replay.capacity", "9600", "--heartbeat-timeout-s", "60"
    )
    run.wait_for(lambda _: len(run.children("worker")) >= 2)
    run.wait_for(lambda figures: figures.get("wall_s", 0) > 3)
    assert 2 <= len(run.children("worker")) <= max(2, os.cpu_count() or 1)
    run.signal(signal.SIGINT)
    run.finish()
    assert run.left_over() == []
