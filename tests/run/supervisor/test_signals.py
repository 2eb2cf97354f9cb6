"""Signals of a batch system, and output that nobody takes, in real runs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from support.launched import PATIENCE_S, SMALL, Launched, state_of

from dsrl_async.run import checkpoints


def fill(pipe: int) -> None:
    """Put as much into a pipe as it takes."""
    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"x")
    os.set_blocking(pipe, True)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes], seconds: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_warning_saves_and_a_full_pipe_stops_nothing(tmp_path: Path) -> None:
    """Nobody reads stderr from the first moment on; SIGUSR1 comes to all processes, and SIGUSR2 during the start."""
    run_dir = tmp_path / "run"
    arguments = [*SMALL, "--log.console", "plain", "--run-dir", str(run_dir)]
    unread, stderr = os.pipe()
    fill(stderr)
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "dsrl_async.launch", *arguments], stdout=subprocess.PIPE, stderr=stderr
    )
    supervisor = psutil.Process(process.pid)
    wait_for(lambda: (run_dir / "logs" / "learner.log").is_file(), process)
    process.send_signal(signal.SIGUSR2)
    log = run_dir / "logs" / "supervisor.log"
    wait_for(lambda: "is written" in log.read_text().partition("written next")[2], process)
    start_s, first = time.monotonic() - started, checkpoints.find(run_dir)
    wait_for(lambda: '"decisions": 0,' not in (run_dir / "metrics.jsonl").read_text()[-2000:], process)
    for each in [supervisor, *supervisor.children(recursive=True)]:
        each.send_signal(signal.SIGUSR1)
    wait_for(lambda: checkpoints.find(run_dir) != first, process)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    stdout = process.communicate(timeout=PATIENCE_S)[0]
    assert time.monotonic() - begin < max(10.0, start_s)  # less than a wait for a reader
    os.close(unread)
    os.close(stderr)
    assert process.returncode == 0
    summary = json.loads(stdout)
    assert summary["exit_reason"] == "terminated"
    assert sum(summary["restarts"].values()) == 0
    assert sum(state_of(run_dir)["counters"]["actor_decisions"]) == summary["decisions"]


def test_a_signal_to_all_processes_while_they_start(tmp_path: Path) -> None:
    """As soon as each of them is there, which is long before its imports end."""
    run = Launched(tmp_path / "run", *SMALL)
    while not (tmp_path / "run" / "logs" / "template.log").is_file():
        time.sleep(0.005)
    for each in [*run.process.children(recursive=True), run.process]:
        each.terminate()
    result = run.finish()
    assert (result["exit_reason"], result["returncode"]) == ("terminated", 0), result["stderr"]
    assert sum(result["restarts"].values()) == 0


def test_a_supervisor_that_is_killed_in_the_start_leaves_nothing(tmp_path: Path) -> None:
    run = Launched(tmp_path / "run", *SMALL)
    while not (tmp_path / "run" / "logs" / "inference.log").is_file():
        time.sleep(0.005)
    time.sleep(0.2)  # their imports take longer
    children = run.process.children(recursive=True)
    run.popen.kill()
    run.popen.communicate()
    assert children
    assert psutil.wait_procs(children, timeout=20.0)[1] == []


def test_a_run_without_standard_descriptors(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsrl_async.launch", *SMALL, "--run-dir", str(tmp_path / "run")]
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command, "--max-decisions", "20"]
    assert subprocess.run(shell, timeout=PATIENCE_S).returncode == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["exit_reason"], sum(summary["restarts"].values())) == ("max_decisions", 0)
