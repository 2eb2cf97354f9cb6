"""Where the groups of a run are: who starts their processes, sees them end, and ends them.

`Placement` is what the supervisor asks. `LocalPlacement` has the groups on this machine, as its own children.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dsrl_async.config.settings import ConfigError
from dsrl_async.host import processes
from dsrl_async.run.preflight.host import cuda_devices

MEMBER = "dsrl_async.groups.member"
LOG = "logs/supervisor.log"
"""The output of a group's supervisor, in the group's directory."""
TOLD = "told.jsonl"
"""In the group's directory: what it is told while it runs, see `Placement.tell`."""
END_S = 10.0
"""How long the groups may take for a clean end before they are killed."""
ASK_AGAIN_S = 0.2
CORES_PER_GROUP = 2
"""With fewer for each group, the groups share all cores."""


class Placed(NamedTuple):
    """A group's process has been started."""

    group: int
    incarnation: int
    where: str
    """In words, such as `this machine, GPU 3`."""


class Ended(NamedTuple):
    """A group's process has ended, and with it all others of the group."""

    group: int
    incarnation: int
    how: str
    """In one sentence, from the last line of its log where there is one."""
    fatal: bool = False
    """Whether a successor would end likewise."""


Event = Placed | Ended


class Placement(Protocol):
    """Starts groups and says what becomes of them. None of its functions waits, but for `close`."""

    def start(self, group: int, incarnation: int, job: dict[str, Any]) -> None:
        """Ask for a group; `job` is what `member` reads, or the module that it names as `module`."""

    def tell(self, group: int, line: str) -> None:
        """Append a line to the file `TOLD` of a group that is placed."""

    def poll(self) -> list[Event]:
        """What has happened since the last call."""

    def waits(self) -> dict[int, str]:
        """For the groups that are not placed yet: what they wait for, in words."""

    def end(self, group: int) -> None:
        """Kill the processes of a group; an `Ended` follows."""

    def close(self) -> None:
        """End all groups within seconds."""


class _Group(NamedTuple):
    incarnation: int
    popen: subprocess.Popen[bytes]
    run_dir: Path
    log_start: int


class LocalPlacement:
    """All groups on this machine.

    Args:
        groups: how many there are.
        gpus: for each group the names of its GPUs as CUDA_VISIBLE_DEVICES takes them; empty where there are none.
    """

    def __init__(self, groups: int, gpus: Sequence[Sequence[str]] = ()) -> None:
        self._gpus, self._cores = gpus, cores_of(groups)
        self._running: dict[int, _Group] = {}
        self._events: list[Event] = []

    def start(self, group: int, incarnation: int, job: dict[str, Any]) -> None:
        assert group not in self._running
        log = Path(job["run_dir"]) / LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        log_start = log.stat().st_size if log.is_file() else 0
        where, variables = "this machine", dict(os.environ)
        if self._gpus:
            gpus = self._gpus[group]
            where += f", GPU {', '.join(gpus)}"
            variables |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
            if gpus[0].isdigit():  # EGL's own numbers are these where the machine's GPUs are all NVIDIA's
                variables.setdefault("MUJOCO_EGL_DEVICE_ID", gpus[0])
        popen = start_member(job, log, variables)
        if self._cores:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(popen.pid, self._cores[group])  # those that it starts inherit them
        self._running[group] = _Group(incarnation, popen, Path(job["run_dir"]), log_start)
        self._events.append(Placed(group, incarnation, where))

    def tell(self, group: int, line: str) -> None:
        if group in self._running:  # else an `Ended` follows
            with (self._running[group].run_dir / TOLD).open("a") as file:
                file.write(line + "\n")

    def poll(self) -> list[Event]:
        for number, group in list(self._running.items()):
            if (code := group.popen.poll()) is not None:
                del self._running[number]
                how = processes.how_ended(code)
                if code >= 0:
                    how = f"{how}: {processes.last_line(group.run_dir / LOG, group.log_start)}"
                self._events.append(Ended(number, group.incarnation, how, code == processes.FATAL))
        events, self._events = self._events, []
        return events

    def waits(self) -> dict[int, str]:
        return {}

    def end(self, group: int) -> None:
        if group in self._running:
            self._running[group].popen.kill()  # the others of the group are tied to it

    def close(self) -> None:
        running = [group.popen for group in self._running.values()]
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline:
            for popen in running:
                if popen.poll() is None:
                    popen.send_signal(signal.SIGTERM)  # one that is just starting does not heed it yet
            if processes.wait_all(running, time.monotonic() + ASK_AGAIN_S):
                break
        processes.kill_all(running)


def start_member(job: Mapping[str, Any], log: Path, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a group's process, which reads its job from its stdin: there are secret keys in it.

    It runs `job["module"]` if there is one, else `MEMBER`.
    """
    stdin = os.memfd_create("dsrl_async-group", os.MFD_CLOEXEC)
    try:
        os.write(stdin, json.dumps(job).encode())
        os.lseek(stdin, 0, os.SEEK_SET)
        return processes.start_tied(
            ["-m", job.get("module", MEMBER)], [], log, {**processes.WAIT_POLICY, **variables}, stdin
        )
    finally:
        os.close(stdin)


def cores_of(groups: int) -> list[list[int]]:
    """The cores of each group, neighbours where there are enough of them; empty where all groups share all cores."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < CORES_PER_GROUP * groups:
        return []
    return [cores[len(cores) * n // groups : len(cores) * (n + 1) // groups] for n in range(groups)]


def local_gpus(groups: int, each: int, key: str = "groups") -> list[list[str]]:
    """The names of the GPUs of each group, as CUDA_VISIBLE_DEVICES takes them, of those that this process may use.

    Raises ConfigError, which names `key`, if the machine has fewer than `each` for every group.
    """
    count = cuda_devices()["devices"]
    if groups * each > count:
        raise ConfigError(
            f"{key}: {groups} groups with {each} GPU{'s' * (each > 1)} each need {groups * each}, and torch finds "
            f"{count} here; lower it, or have the policies computed on the CPU with --device cpu"
        )
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in named.split(",")] if named else [str(index) for index in range(count)]
    return [names[each * group : each * (group + 1)] for group in range(groups)]
