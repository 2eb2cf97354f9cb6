"""The environment that child processes are started with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dsrl_async.host import processes


def started_with(tmp_path: Path, threads: int) -> dict[str, str]:
    """The environment variables of a started module."""
    (tmp_path / "shows_environment.py").write_text(
        "import os\nfor item in os.environ.items():\n    print(*item, sep='=')\n"
    )
    log = tmp_path / "log"
    assert processes.start("shows_environment", {}, [], log, threads).wait(20) == 0
    return dict(line.split("=", 1) for line in log.read_text().splitlines() if "=" in line)


def test_threads_are_limited_and_sleep_while_they_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    environment = started_with(tmp_path, threads=3)
    assert {environment[name] for name in processes.THREAD_VARIABLES} == {"3"}
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"


def test_the_users_wait_policy_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert started_with(tmp_path, threads=1)["OMP_WAIT_POLICY"] == "ACTIVE"
