"""Start the real command as a user does, and look at what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from support.planted import Planted

from dsrl_async.run import checkpoints

SMALL = [
    *("--actors", "2", "--log.console", "off", "--log.interval-s", "0.2"),
    *("--replay.warmup-decisions", "16", "--replay.capacity", "2000"),
    *("--sac.batch-size", "16", "--sac.hidden-dims", "[16, 16]", "--sac.num-q-heads", "2"),
    *("--sac.conv-channels", "[4]", "--policy.denoise-steps", "2", "--learner.publish-interval", "2"),
]
"""Arguments of a run that starts and learns within seconds."""
MODULES = {"run.inference.server": "inference", "run.learner.learner": "learner", "run.worker.template": "template"}
"""Module of a child process -> its kind, as long as it has not named itself."""
NAMES = {"inference": "inference", "learner": "learner", "template": "template", "actor": "worker"}
NAMES |= {"evaluation": "evaluation"}
"""The first part of a child process's name -> its kind."""
PATIENCE_S = 240.0
"""How long a test waits for what a run will do: more than a busy machine takes, and less than a test may."""


class Launched:
    """`python -m dsrl_async.launch` on `run_dir`, and the processes it started, which may meet what is `planted`.

    Another `module` may wrap the command.
    """

    def __init__(
        self,
        run_dir: Path,
        *arguments: str,
        planted: Planted | None = None,
        environment: dict[str, str] | None = None,
        module: str = "dsrl_async.launch",
    ) -> None:
        self.run_dir, self.planted = run_dir, planted
        self.begin, self.start_s = time.monotonic(), 0.0
        command = [sys.executable, "-m", module, *arguments]
        if "--resume" not in arguments:
            command += ["--run-dir", str(run_dir)]
        self.popen = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | (environment or {}) | (planted.variables if planted else {}),
        )
        self.process = psutil.Process(self.popen.pid)
        self.seen: dict[int, psutil.Process] = {}

    def children(self, kind: str | None = None) -> list[psutil.Process]:
        """Living children, all or those of a kind: those of `MODULES`, and `worker` and `evaluation`, which are forked
        from a template."""
        found = []
        for child in self.process.children():
            try:
                line, name = " ".join(child.cmdline()[:3]), child.name().partition("-")[0]
                ended = child.status() == psutil.STATUS_ZOMBIE
            except psutil.Error:
                continue
            runs = NAMES.get(name) or MODULES.get(line.rpartition("-m dsrl_async.")[2])
            ours = "-m dsrl_async." in line or line.startswith("dsrl_async: ")
            if not ended and ours and kind in (None, runs):
                found.append(child)
                self.seen[child.pid] = child
        return found

    def figures(self) -> dict[str, Any]:
        """The newest whole line of metrics.jsonl, which may be read while one is written; empty before the first."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().rpartition("\n")[0].splitlines() if path.is_file() else []
        return json.loads(lines[-1]) if lines else {}

    def wait_for(self, condition: Any, timeout_s: float = PATIENCE_S) -> None:
        """Wait until `condition(figures)` holds; fails if the run ends or the time passes first."""
        deadline = time.monotonic() + timeout_s
        while not condition(self.figures()):
            assert self.popen.poll() is None, f"the run ended: {self.popen.communicate()}"
            assert time.monotonic() < deadline, f"nothing happened: {self.figures()}"
            self.children()
            time.sleep(0.05)

    def wait_learning(self, updates: int = 5) -> None:
        self.wait_for(lambda figures: figures.get("updates", 0) >= updates)
        self.start_s = time.monotonic() - self.begin

    def signal(self, number: signal.Signals) -> None:
        self.children()
        self.popen.send_signal(number)

    def finish(self, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """Wait for the end; returns the JSON object on the last line of stdout, with `returncode` and `stderr`."""
        stdout, stderr = self.popen.communicate(timeout=timeout_s)
        assert self.planted is None or self.planted.met()
        lines = stdout.strip().splitlines()
        result = json.loads(lines[-1]) if lines else {}
        return {**result, "returncode": self.popen.returncode, "stderr": stderr}

    def left_over(self, timeout_s: float = 20.0) -> list[psutil.Process]:
        """Processes of this run that are still alive `timeout_s` later."""
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=timeout_s)
        return alive


@dataclass
class FinishedRun:
    """A run that has ended at its limit of 240 decisions, for tests that look at it; those that go on take a copy."""

    run_dir: Path
    result: dict[str, Any]
    mapped_by_workers: list[list[str]]
    """Files that each environment worker had mapped while the run went on."""
    titles: set[str]
    """What `ps` said of its processes meanwhile, as `NAME: TITLE`."""
    left_over: list[str]
    """Processes of it that were there after it had ended."""

    def copy(self, directory: Path) -> Path:
        return Path(shutil.copytree(self.run_dir, directory))


def finished_run(directory: Path) -> FinishedRun:
    run = Launched(directory / "run", *SMALL, "--max-decisions", "240", "--max-minutes", "2")
    run.wait_learning()
    mapped = [[file.path for file in worker.memory_maps()] for worker in run.children("worker")]
    titles = {f"{process.name()}: {process.cmdline()[0]}" for process in (run.process, *run.children())}
    return FinishedRun(run.run_dir, run.finish(), mapped, titles, list(map(str, run.left_over())))


def checkpoint_of(run_dir: Path) -> Path:
    checkpoint = checkpoints.find(run_dir)
    assert checkpoint is not None, "no checkpoint"
    return checkpoint


def state_of(run_dir: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint_of(run_dir) / "state.json").read_text())
    return state
