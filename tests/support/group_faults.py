"""A run with groups whose processes are killed and stopped, and what must be true of its rows when it has ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from safetensors.numpy import load_file
from support.counting import COUNTS, MARKS, pictures
from support.launched import checkpoint_of, state_of
from support.planted import Planted

GROUPS, ACTORS = 2, 2
SETTINGS = [
    *("--groups", str(GROUPS), "--actors", str(ACTORS), "--log.console", "off", "--log.interval-s", "0.2"),
    *("--device", "cpu", "--replay.warmup-decisions", "16", "--replay.capacity", "40000"),
    *("--sac.batch-size", "16", "--sac.hidden-dims", "[16, 16]", "--sac.num-q-heads", "2"),
    *("--sac.conv-channels", "[4]", "--policy.denoise-steps", "1", "--learner.publish-interval", "2"),
    *("--log.loggers", "[]", "--group.publish-s", "0.2", "--replay-ratio", "0.5"),
]
SHORT = "import dsrl_async.run.supervisor.supervisor as supervisor; supervisor.QUICK_S = 0.5"
"""A process that lived so long did not die of its start."""
MINE, OF_GROUP = ("learner", "downlink"), ("inference", "uplink", "template", "actor")
VICTIMS = (*OF_GROUP, "group", *MINE)
PATIENCE_S = 180.0


class Fault(NamedTuple):
    """What befell a process, and how long it took until all environments went on."""

    victim: str
    what: str
    recovered_s: float


class GroupRun:
    """`launch --groups 2` with counting environments."""

    def __init__(self, directory: Path, *arguments: str, decisions: int | None = None) -> None:
        self.directory, self.run_dir = directory, directory / "run"
        (directory / "tmp").mkdir()
        planted = Planted(directory, {"dsrl_async.groups.member": SHORT, "support.counting": SHORT})
        command = [sys.executable, "-m", "support.counting", *SETTINGS, *arguments, "--run-dir", str(self.run_dir)]
        environment = os.environ | planted.variables | {"COUNTING": str(directory), "TMPDIR": str(directory / "tmp")}
        environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parents[1])
        self.shm = set(os.listdir("/dev/shm"))
        self.popen = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.process = psutil.Process(self.popen.pid)
        self.seen: dict[int, psutil.Process] = {}
        self.faults: list[Fault] = []
        self.begun = time.monotonic()

    # ---- its processes

    def find(self, victim: str, group: int = 0) -> list[psutil.Process]:
        """Its living processes of a kind: those of a group, or the learner's side."""
        found = []
        for child in self._children(self.process):
            if child.name() == f"group-{group}":
                if victim == "group":
                    found.append(child)
                elif victim in OF_GROUP:
                    found += [each for each in self._children(child) if each.name().partition("-")[0] == victim]
            elif child.name() == victim:
                found.append(child)
        return found

    def _children(self, process: psutil.Process) -> list[psutil.Process]:
        found = []
        for child in self._try(lambda: process.children(), []):
            if self._try(lambda child=child: child.status(), psutil.STATUS_ZOMBIE) != psutil.STATUS_ZOMBIE:
                found.append(child)
                self.seen[child.pid] = child
        return found

    @staticmethod
    def _try(what: Any, otherwise: Any) -> Any:
        try:
            return what()
        except psutil.Error:
            return otherwise

    def look(self) -> None:
        """Take note of all processes that there are."""
        for child in self._children(self.process):
            self._children(child)

    # ---- what it does

    def figures(self) -> dict[str, Any]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().rpartition("\n")[0].splitlines() if path.is_file() else []
        return json.loads(lines[-1]) if lines else {}

    def wait(self, condition: Any, what: str) -> float:
        """Wait until `condition()` holds; returns how long that took."""
        begin = time.monotonic()
        while not condition():
            assert self.popen.poll() is None, f"the run ended: {self.popen.communicate()}"
            assert time.monotonic() - begin < PATIENCE_S, f"{what}: {self.figures()}"
            self.look()
            time.sleep(0.05)
        return time.monotonic() - begin

    def decided(self) -> list[int]:
        """Decisions of each environment that the learner's side has, by the lengths of what the groups have done."""
        return [group["decisions"] for group in self.figures().get("groups", [])] or [0] * GROUPS

    def wait_working(self, decisions: int = 10) -> float:
        """Wait until both groups have decided so often, and the learner has updated, from now on."""
        before, updates = self.decided(), self.figures().get("updates", 0)

        def works() -> bool:
            now = self.decided()
            gone_on = all(b >= a + decisions for a, b in zip(before, now, strict=True))
            return gone_on and self.figures()["updates"] > updates

        return self.wait(works, "not all go on")

    def hit(self, victim: str, group: int, number: int = signal.SIGKILL, seconds: float = 0.0) -> None:
        """Send a signal to a process, one that is there or the next one; with `seconds` it is stopped for so long."""
        self.wait(lambda: self.find(victim, group), f"no {victim} of group {group}")
        with contextlib.suppress(psutil.Error):
            process = self.find(victim, group)[0]
            process.send_signal(signal.SIGSTOP if seconds else number)
            if seconds:
                time.sleep(seconds)
                process.send_signal(signal.SIGCONT)

    def fault(self, victim: str, group: int, times: int = 1, seconds: float = 0.0) -> None:
        """Hit a process, and its successor as soon as it is there; then wait until all go on."""
        for _ in range(times):
            known = {process.pid for process in self.find(victim, group)}
            self.hit(victim, group, seconds=seconds)
            begin = time.monotonic()
            if times > 1:  # a successor has its name once it has imported what it needs
                self.wait(lambda known=known: {p.pid for p in self.find(victim, group)} - known, "no successor")
        what = f"stopped for {seconds:g} s" if seconds else "killed" + (f" {times} times" if times > 1 else "")
        self.wait_working()
        self.faults.append(Fault(victim, what, time.monotonic() - begin))

    def end(self, number: int = signal.SIGTERM) -> dict[str, Any]:
        self.look()
        self.popen.send_signal(number)
        return self.finish()

    def finish(self) -> dict[str, Any]:
        """Wait for the end; returns the summary."""
        begin = time.monotonic()
        stdout, stderr = self.popen.communicate(timeout=PATIENCE_S)
        lines = stdout.strip().splitlines()
        assert lines, stderr
        summary: dict[str, Any] = json.loads(lines[-1])
        return summary | {"returncode": self.popen.returncode, "stderr": stderr, "end_s": time.monotonic() - begin}

    # ---- what must be true

    def left_over(self) -> list[str]:
        """What is there of it that should be gone: processes, shared memory, sockets."""
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=20)
        sockets = [str(path) for path in (self.directory / "tmp").glob("dsrl_async-*")]
        new = sorted(set(os.listdir("/dev/shm")) - self.shm)
        shared = [name for name in new if not name.startswith("sem.mp-")]  # semaphores of multiprocessing: not ours
        return [*map(str, alive), *shared, *sockets]

    def check(self, summary: dict[str, Any]) -> int:
        """Check the rows of the last checkpoint; returns how many there are."""
        counters = state_of(self.run_dir)["counters"]
        lanes = [load_file(path) for path in sorted((checkpoint_of(self.run_dir) / "replay").glob("*.safetensors"))]
        assert len(lanes) == GROUPS * ACTORS
        ended = self._counted()
        for number, lane in enumerate(lanes):
            check_lane(lane, *divmod(number, ACTORS), ended)
            assert lane["complete"].sum() == counters["actor_decisions"][number], number
        assert sum(counters["actor_decisions"]) == summary["decisions"]
        return sum(len(lane["complete"]) for lane in lanes)

    def _counted(self) -> dict[tuple[int, int, int], int]:
        """Group, lane and mark of the environments that ended as they should -> how many observations they made."""
        text = (self.directory / COUNTS).read_text() if (self.directory / COUNTS).is_file() else ""
        return {(group, lane, mark): count for group, lane, mark, count in map(json.loads, text.splitlines())}


def check_lane(lane: dict[str, np.ndarray], group: int, number: int, ended: dict[tuple[int, int, int], int]) -> None:
    """The rows of a lane are those that its environments made: all of them, in their order, and each once."""
    of_group, of_lane, mark, count = lane["state"][:, :4].astype(np.int64).T
    assert (of_group == group).all()
    assert (of_lane == number).all()
    pixels = lane["image"].reshape(len(count), -1)
    np.testing.assert_array_equal(pixels[:, :8], pictures(of_group, of_lane, mark, count))
    np.testing.assert_array_equal(pixels[:, 8], count % 256)
    np.testing.assert_array_equal(pixels[:, -1], count % 256)
    follows = (mark[1:] == mark[:-1]) & (count[1:] == count[:-1] + 1)
    begins = (mark[1:] > mark[:-1]) & (count[1:] == 0)
    assert (follows | begins).all(), list(zip(mark, count, strict=True))
    assert count[0] == 0
    assert not (lane["complete"][:-1] & begins).any()  # nobody completes what another one has begun
    # An environment that ended as it should has told how many observations it made: all of them are here.
    for last in np.flatnonzero(np.append(mark[1:] != mark[:-1], True)):
        if (told := ended.get((group, number, int(mark[last])))) is not None:
            assert count[last] + 1 == told, f"group {group}, lane {number}: {told - count[last] - 1} rows are missing"
    assert (mark // MARKS >= 1).all()
