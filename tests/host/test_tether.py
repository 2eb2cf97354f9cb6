"""What ties a child to its parent: from its first moment on, before its imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dsrl_async.host import processes
from dsrl_async.host.tether import LEFT_TO_THE_PARENT

SLOW = """
import pathlib, sys, time
pathlib.Path("{met}").touch()
time.sleep(1000 if "forever" in sys.argv[1] else 0.5)  # what imports would take
"""


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module whose import takes long; the path that it makes when it has begun."""
    met = tmp_path / "met"
    (tmp_path / "imports_slowly.py").write_text(SLOW.format(met=met))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return met


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("delay", [0.0, 0.005, 0.02, 0.05, None])
def test_signals_are_the_parents_from_the_first_moment_on(slow: Path, delay: float | None, tmp_path: Path) -> None:
    child = processes.start("imports_slowly", {}, [], tmp_path / "log", threads=1)
    if delay is None:
        wait_for(slow.exists)
    else:
        time.sleep(delay)
    for number in LEFT_TO_THE_PARENT:
        child.send_signal(number)
    assert child.wait(20) == 0, (tmp_path / "log").read_text()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert not mask & set(LEFT_TO_THE_PARENT)


STARTS = """
import sys, time
from pathlib import Path
from dsrl_async.host import processes
print(processes.start("imports_slowly", {{"forever": True}}, [], Path({log!r}), threads=1).pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("while_it_imports", [False, True])
def test_a_child_ends_with_its_parent_even_while_it_imports(slow: Path, while_it_imports: bool, tmp_path: Path) -> None:
    code = STARTS.format(log=str(tmp_path / "log"))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    if while_it_imports:
        wait_for(slow.exists)
    parent.kill()
    parent.communicate()
    assert psutil.wait_procs([child], timeout=2)[1] == []


def test_what_ends_a_child_is_not_inherited_by_accident(tmp_path: Path) -> None:
    """A child is not tied to a process that has its parent's number by now."""
    tied = [sys.executable, "-I", "-S", processes.tether.__file__, str(os.getppid()), sys.executable, "-c", "print(1)"]
    done = subprocess.run(tied, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
