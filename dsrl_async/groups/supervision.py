"""The learner's side of a run with groups: starts them, replaces those that end or hang, and ends them."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dsrl_async.config.settings import Config
from dsrl_async.groups.member import config_of
from dsrl_async.groups.placing import Ended, LocalPlacement, Placed, Placement, local_gpus
from dsrl_async.groups.ray_placement import RayPlacement, own_address
from dsrl_async.groups.reports import counters_for, lanes_of
from dsrl_async.groups.wire import Link, make_link
from dsrl_async.host.processes import Program
from dsrl_async.host.vigil import Vigil
from dsrl_async.run.channel import SocketDirectory, write_secret
from dsrl_async.run.preflight.host import cuda_index
from dsrl_async.run.supervisor import ending
from dsrl_async.run.supervisor.child import Child, Kind
from dsrl_async.run.supervisor.session import Session
from dsrl_async.run.supervisor.supervisor import LOADING_S, PROGRAMS, QUICK_FAILURES, QUICK_S, Supervisor
from dsrl_async.telemetry.monitor import Wait

logger = logging.getLogger(__name__)

DOWNLINK = "dsrl_async.groups.downlink"
AGAIN_S = 2.0
"""How long to wait before a group is started again that has failed quickly; doubled with each further time."""
GROUP_STOP_S = 20.0
"""How long groups may take to end after they were told: environments, then the rows that are under way."""
WORKER_STOP_S = 0.05


class Groups:
    """The groups of a run, in the place of its own environment workers (`supervisor.Crew`).

    A group's state is a `Child` whose process is somebody else's. It is *missing* while it is not asked for.

    Args:
        session: the run, of all environments together.
        config: the settings as the user gave them, by which each group has its own.
        placement: where groups run.
        link: the groups' ends of their channels to this machine.
        programs: what processes of a group run instead of the usual, for tests and benchmarks: kind -> module and
            settings.
    """

    def __init__(
        self,
        session: Session,
        config: Config,
        placement: Placement,
        link: Link,
        programs: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None,
    ) -> None:
        self._session, self._config, self._placement, self._link = session, config, placement, link
        self._programs = dict(programs or {})
        self._directory = session.run_dir / "groups"
        self.by_number = [Child(Kind.GROUP, self._directory / str(n) / "logs", n) for n in range(config.groups)]
        self.where: dict[int, str] = {}
        """Where each group is that runs, in words."""
        self._asked: set[int] = set()
        self._again = [0.0] * config.groups
        self._problem = [""] * config.groups
        self._decisions_before = [0] * config.groups
        self._vigil = Vigil(config.heartbeat_timeout_s)
        session.monitor.where = self.where

    @property
    def members(self) -> Sequence[Child]:
        return self.by_number

    @property
    def children(self) -> Sequence[Child]:
        return ()

    # ---- starting and replacing

    def start_missing(self) -> str | None:
        """Ask for groups that are missing, and take in what has become of the others."""
        self._vigil.look()
        now = time.monotonic()
        for group in self.by_number:
            if group.number not in self._asked and now >= self._again[group.number]:
                self._start(group)
        for event in self._placement.poll():
            group = self.by_number[event.group]
            if event.incarnation != group.incarnation:
                continue
            if isinstance(event, Placed):
                self.where[event.group], group.started = event.where, time.monotonic()
                logger.info("%s starts on %s", group.name, event.where)
            elif (hopeless := self._note_end(group, event)) is not None:
                return hopeless
        self._end_silent()
        return None

    def _start(self, group: Child) -> None:
        group.begin()
        counters, number = self._session.counters, group.number
        counters.group_started[number] = group.incarnation  # from here on nothing of its predecessor is stored
        self._decisions_before[number] = self._decisions(number)
        run_dir = self._directory / str(number)
        job = {
            "group": number,
            "incarnation": group.incarnation,
            "config": config_of(self._config, number),
            "run_dir": str(run_dir),
            "link": self._link,
            "counters": counters_for(counters, number, len(self.by_number)),
            "programs": self._programs,
        }
        self._asked.add(number)
        self._placement.start(number, group.incarnation, job)

    def _note_end(self, group: Child, event: Ended) -> str | None:
        """Have a group that has ended be started again; returns why the run must end, if it must."""
        number, lived = group.number, time.monotonic() - group.started
        self._asked.discard(number)
        where = self.where.pop(number, "its way to a machine")
        self._problem[number] = event.how
        if event.fatal:
            return ending.failure(f"{group.name}: {event.how}")
        quick = lived < QUICK_S or self._decisions(number) == self._decisions_before[number]
        group.quick_failures = group.quick_failures + 1 if quick else 0
        if group.quick_failures >= QUICK_FAILURES:
            return ending.failure(
                f"{group.name} ended {QUICK_FAILURES} times soon after its start, at last on {where} ({event.how}) "
                f"(all of its output is in {group.logs})"
            )
        wait_s = AGAIN_S * 2 ** (group.quick_failures - 1) if quick else 0.0
        self._again[number] = time.monotonic() + wait_s
        group.restarts += 1
        again = f"in {wait_s:g} s" if wait_s else "now"
        logger.warning(
            "%s on %s ended (%s) after %.0f s; starting it again %s, see %s",
            *(group.name, where, event.how, lived, again, group.logs),
        )
        return None

    def _end_silent(self) -> None:
        """Kill groups of which nothing was heard for too long."""
        for number in self.where:
            group = self.by_number[number]
            heard, patience_s = self._heard(group), self._config.heartbeat_timeout_s
            if heard is None:
                heard, patience_s = group.started, LOADING_S
            if (silent_s := self._vigil.silent_s(heard)) > patience_s:
                logger.warning("%s gives no sign of life for %.0f s; ending it", group.name, silent_s)
                self._placement.end(number)
                group.started = time.monotonic()  # it is not ended again while its end is awaited

    def _heard(self, group: Child) -> float | None:
        """When something came from this incarnation, by time.monotonic; None before the first time."""
        heard = int(self._session.counters.group_heard_ns[group.number]) * 1e-9
        return heard if heard > group.started else None

    def _decisions(self, number: int) -> int:
        decisions = self._session.counters.actor_decisions
        return int(decisions[lanes_of(number, len(self.by_number), len(decisions))].sum())

    # ---- what the supervisor asks

    def waits(self, patience_s: float, tries: int) -> list[Wait]:
        """What is waited for: the groups that have not decided anything yet since they were started."""
        pending, waits = self._placement.waits(), []
        for group in self.by_number:
            number, doing = group.number, ""
            if number not in self._asked:
                doing = f"starting again after: {self._problem[number]}"
            elif number in pending:
                doing = f"waiting for {pending[number]}"
            elif self._decisions(number) == self._decisions_before[number]:
                doing = f"starting on {self.where[number]}" if number in self.where else "starting"
            if doing:
                detail = f"try {group.quick_failures + 1} of {tries}" if group.quick_failures else ""
                waits.append(Wait(group.name, doing, time.monotonic() - group.started, detail))
        return waits

    def got_somewhere(self, child: Child) -> bool:
        raise AssertionError("a group is no child")

    def problem_of(self, child: Child) -> str | None:
        return None

    # ---- ending

    def start_no_more(self) -> None:
        """The downlink tells the groups to end, once the workers are to stop."""

    @property
    def end_s(self) -> float:
        return GROUP_STOP_S + WORKER_STOP_S * self._config.actors

    def wait(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while True:
            for event in self._placement.poll():
                if isinstance(event, Ended):
                    self.where.pop(event.group, None)
            if not self.where or time.monotonic() >= until:
                return not self.where
            time.sleep(0.02)

    def kill(self) -> None:
        self._placement.close()


def run_groups(session: Session, config: Config, programs: Mapping[Kind, Program] = PROGRAMS) -> dict[str, Any]:
    """Run until a limit, a signal or a failure; returns the summary, as `Supervisor.run` does.

    The session is that of all environments together, and `config` what the user gave. `programs` are those of a run.
    """
    with ExitStack() as stack:
        placement: Placement
        if config.ray is None:
            directories = SocketDirectory(), SocketDirectory()
            for directory in directories:
                stack.callback(directory.close)
            server, client = make_link(*(directory.endpoint for directory in directories))
            gpus = local_gpus(config.groups, config.group.gpus) if policy_on_gpu(config) else []
            placement = LocalPlacement(config.groups, gpus)
        else:
            address = own_address(config.ray, config.group.address)
            ports = config.group.ports or free_ports()
            server, client = make_link(*(f"tcp://{address}:{port}" for port in ports))
            if config.group.address is not None:  # it may be that of a machine which passes on to this one
                bound = [f"tcp://*:{port}" for port in ports]
                server = Link(*(end._replace(endpoint=place) for end, place in zip(server, bound, strict=True)))
            group, logs = config.group, session.run_dir / "logs"
            placement = RayPlacement(config.ray, logs, group.gpus, group.cpus, group.wait_s)
        link_fd = write_secret(server)
        stack.callback(os.close, link_fd)
        of_downlink = {
            "groups": config.groups,
            "tasks": len(session.run.spec.prompts),
            "publish_s": config.group.publish_s,
            "link_fd": link_fd,
        }
        of_groups = {
            kind.value: (programs[kind].module, dict(programs[kind].settings))
            for kind in (Kind.INFERENCE, Kind.WORKER)
            if programs[kind] != PROGRAMS[kind]
        }
        mine = {
            Kind.LEARNER: programs[Kind.LEARNER],
            Kind.DOWNLINK: Program(DOWNLINK, of_downlink, (link_fd,)),
        }
        groups = Groups(session, config, placement, client, of_groups)
        summary = Supervisor(session, mine, groups).run()
    return summary | {"groups": [summary_of(session.run_dir, number) for number in range(config.groups)]}


def summary_of(run_dir: Path, number: int) -> dict[str, Any]:
    """The main figures of a group that has ended as it was to, of its last incarnation; else empty."""
    try:
        summary = json.loads((run_dir / "groups" / str(number) / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    if (sentence := summary.get("bottleneck")) is not None:
        logger.info("profile of group %d: %s", number, sentence)
    names = ("exit_reason", "decisions_per_s", "batch_size_mean", "restarts", "bottleneck")
    return {name: summary[name] for name in names if name in summary}


def policy_on_gpu(config: Config) -> bool:
    """Whether the groups of this machine compute the policy on GPUs."""
    return cuda_index(config, "device") is not None and config.group.gpus > 0


def free_ports() -> list[int]:
    """Two ports of this machine that nobody uses now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for each in sockets:
            each.bind(("", 0))
        return [int(each.getsockname()[1]) for each in sockets]
