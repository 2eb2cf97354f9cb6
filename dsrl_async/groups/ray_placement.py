"""Groups on the machines of a Ray cluster, as the supervisor sees them; Ray itself is in another process, `placer`.

What this has been asked for outlives a placer: those that it was not told of yet are asked for again, and those that it
was told of are taken for dead, since their hosts end with it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import socket
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from dsrl_async.config.files import how_to_install
from dsrl_async.config.settings import ConfigError
from dsrl_async.groups.placing import Ended, Event, Placed
from dsrl_async.host import processes
from dsrl_async.host.vigil import Vigil

logger = logging.getLogger(__name__)

VERSIONS = ((2, 59), (2, 60), (2, 61))
RAYS_FORM = re.compile(r"\[[^\]]*\] \S+:\d+: ")
PLACER = "dsrl_async.groups.placer"
AGAIN_S, LONGEST_AGAIN_S = 1.0, 30.0
"""Seconds before a placer is started again, which double while no cluster can be reached."""
FIRST_TRIES = 3
"""So many placers may fail before the first one has reached a cluster."""
TRY_S = 60.0
"""How long a placer may try to reach a cluster when that has been lost for longer than the run waits for one."""
SILENCE_S = 300.0
"""A placer that is silent for so long hangs. Starting a cluster, and waiting for a lost one, take a minute or two."""
CLOSE_S = 20.0


class _Asked(NamedTuple):
    incarnation: int
    job: dict[str, Any]
    lines: list[str]
    """What the group was told."""
    sent: bool
    """Whether a placer knows of it."""


class RayPlacement:
    """All groups on a cluster.

    Args:
        address: of the cluster's head, or `auto`.
        log_dir: where the placer's log is written to.
        gpus, cpus: what a group needs.
        wait_s: how long to wait for a cluster that is lost.
    """

    def __init__(self, address: str, log_dir: Path, gpus: float, cpus: float, wait_s: float) -> None:
        self._job = {"address": address, "resources": {"num_gpus": gpus, "num_cpus": cpus}}
        self._log, self._wait_s = log_dir / "placer.log", wait_s
        self._asked: dict[int, _Asked] = {}
        self._waits: dict[int, str] = {}
        self._events: list[Event] = []
        self._failures, self._why = 0, ""
        self._vigil = Vigil(wait_s)
        self._ready = False
        self._again = 0.0
        """When a placer is started, if there is none, by time.monotonic."""
        self._popen: subprocess.Popen[bytes] | None = None
        self._last_ready: float | None = None
        """When there was a cluster; None if there has never been one."""
        self._begin()

    # ---- what the supervisor asks

    def start(self, group: int, incarnation: int, job: dict[str, Any]) -> None:
        assert group not in self._asked
        self._asked[group] = _Asked(incarnation, job, [], False)
        self._ask()

    def poll(self) -> list[Event]:
        self._vigil.look()
        if self._popen is not None:
            self._hear()
            self._send()
            self._look_after(self._popen)
        elif time.monotonic() >= self._again:
            self._begin()
        events, self._events = self._events, []
        return events

    def waits(self) -> dict[int, str]:
        place = "the Ray cluster" if self._job["address"] == "auto" else f"the Ray cluster at {self._job['address']}"
        if not self._ready:
            return dict.fromkeys(self._asked, place + (f" ({self._why})" if self._why else ""))
        return {group: waits for group, waits in self._waits.items() if group in self._asked}

    def tell(self, group: int, line: str) -> None:
        if (asked := self._asked.get(group)) is not None:
            asked.lines.append(line)
            if asked.sent:
                self._say("tell", group, line)

    def end(self, group: int) -> None:
        if (asked := self._asked.get(group)) is not None:
            if asked.sent:
                self._say("end", group)
            else:
                self._give_up(group, "killed")

    def close(self) -> None:
        self._again = math.inf
        if self._popen is None:
            return
        if self._ready:
            self._say("close")
            deadline = time.monotonic() + CLOSE_S
            while self._popen.poll() is None and time.monotonic() < deadline:
                self._hear()
                self._send()
                time.sleep(0.05)
        processes.kill_all([self._popen])  # Ray ends what it has started for it
        self._link.close()
        self._popen = None

    # ---- the placer

    def _begin(self) -> None:
        """Start a placer."""
        self._link, other = socket.socketpair()
        self._link.setblocking(False)
        self._in, self._out = b"", b""
        self._began = self._heard = time.monotonic()
        self._log_start = self._log.stat().st_size if self._log.is_file() else 0
        job = self._job | {"link_fd": other.fileno()}
        self._popen = processes.start(PLACER, job, [other.fileno()], self._log, 1)
        other.close()

    def _ask(self) -> None:
        """Tell the placer of what it does not know yet."""
        for group, asked in self._asked.items():
            if self._ready and not asked.sent:
                self._asked[group] = asked._replace(sent=True)
                self._say("start", group, asked.incarnation, asked.job, asked.lines)

    def _say(self, *words: Any) -> None:
        self._out += json.dumps(words).encode() + b"\n"
        self._send()

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # it reads later, or has ended
            while self._out:
                self._out = self._out[self._link.send(self._out) :]

    def _hear(self) -> None:
        with contextlib.suppress(OSError):
            while part := self._link.recv(1 << 16):
                self._in += part
        *lines, self._in = self._in.split(b"\n")
        for line in lines:
            self._heard = time.monotonic()
            what, *words = json.loads(line)
            getattr(self, f"_hear_{what}")(*words)

    def _hear_ready(self, machines: int, resources: dict[str, float]) -> None:
        cores, gpus = (resources.get(name, 0) for name in ("CPU", "GPU"))
        logger.info("connected to Ray (machines: %d, CPUs: %g, GPUs: %g)", machines, cores, gpus)
        self._ready, self._failures, self._why = True, 0, ""
        self._ask()

    def _hear_waits(self, waits: dict[str, str]) -> None:
        self._last_ready = time.monotonic()
        self._waits = {int(group): text for group, text in waits.items()}

    def _hear_placed(self, group: int, incarnation: int, where: str) -> None:
        self._waits.pop(group, None)
        self._events.append(Placed(group, incarnation, where))

    def _hear_ended(self, group: int, incarnation: int, how: str, fatal: bool) -> None:
        self._give_up(group, how, fatal)

    def _give_up(self, group: int, how: str, fatal: bool = False) -> None:
        self._events.append(Ended(group, self._asked.pop(group).incarnation, how, fatal))

    def _look_after(self, popen: subprocess.Popen[bytes]) -> None:
        since = self._last_ready
        tried = not self._ready and self._vigil.silent_s(self._began) > TRY_S
        late = tried and since is not None and self._vigil.silent_s(since) > self._wait_s
        if popen.poll() is None and (late or self._vigil.silent_s(self._heard) > SILENCE_S):
            processes.kill_all([popen])
        if (code := popen.poll()) is None:
            return
        self._hear()  # its last words
        self._link.close()
        self._popen, self._ready, self._waits = None, False, {}
        how = processes.how_ended(code)
        if not late:
            self._why = plain(processes.last_line(self._log, self._log_start)) if code > 0 else how
        for group in [group for group, asked in self._asked.items() if asked.sent]:
            self._give_up(group, f"the placer, which talks to Ray, ended ({how})")
        self._failures += 1
        self._again = time.monotonic() + min(LONGEST_AGAIN_S, AGAIN_S * 2 ** (self._failures - 1))
        logger.warning("the placer, which talks to Ray, ended (%s), see %s; starting it again", self._why, self._log)
        if since is None:
            hopeless = code == processes.FATAL or self._failures >= FIRST_TRIES
            why = self._why
        else:
            hopeless = self._vigil.silent_s(since) > self._wait_s
            why = f"no Ray cluster for {self._wait_s:g} s (group.wait_s): {self._why}"
        if hopeless:
            for group in list(self._asked):
                self._give_up(group, why, fatal=True)


def plain(line: str) -> str:
    """The last line of a placer, or the first sentence of what Ray's C++ code has written there in its own form."""
    return line if (ray := RAYS_FORM.match(line)) is None else line[ray.end() :].partition(". ")[0]


def check_library() -> None:
    """Raises ConfigError with one sentence unless Ray is installed in a version that is known to work."""
    try:
        found = version("ray")
    except PackageNotFoundError as error:
        raise ConfigError(f"ray: the library is not installed; {how_to_install('ray')}") from error
    if tuple(map(int, found.split(".")[:2])) not in VERSIONS:
        first, last = (".".join(map(str, number)) for number in (VERSIONS[0], VERSIONS[-1]))
        raise ConfigError(
            f"ray: version {found} is installed, and {first} to {last} are known to work; {how_to_install('ray')}"
        )


def own_address(ray: str, configured: str | None) -> str:
    """This machine's address as the machines of a cluster see it, whose head is at `ray`, or `auto`."""
    if configured is not None:
        return configured
    outside = "8.8.8.8"  # nothing is sent there: the kernel says by which of its addresses it would be
    for host in (ray.rpartition(":")[0].strip("[]") if ray != "auto" else outside, outside):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    return "127.0.0.1"
