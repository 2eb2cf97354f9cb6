"""Runs of groups, or of one machine, with simulated environments and devices and a learner that only takes time."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import psutil

from dsrl_async.bench.simulated.environment import CHUNK, HORIZON
from dsrl_async.bench.simulated.run import (
    LANE_ROWS,
    START_LIMIT_S,
    WARMUP_DECISIONS,
    Simulation,
    Watch,
    programs_of,
    run_directory,
    run_watched,
)
from dsrl_async.config.load import validate
from dsrl_async.config.settings import Config
from dsrl_async.groups.supervision import run_groups
from dsrl_async.host.cpu_time import Usage, thread_usage, usage
from dsrl_async.host.processes import Program, raise_descriptor_limit
from dsrl_async.host.signals import StopRequest
from dsrl_async.run.preflight import check_run
from dsrl_async.run.supervisor.child import Kind
from dsrl_async.run.supervisor.session import Session
from dsrl_async.run.supervisor.supervisor import Supervisor
from dsrl_async.shm.counters import Counters
from dsrl_async.telemetry.console import NoDisplay

LINK = ("uplink", "downlink")
"""Processes that only groups have."""


@dataclass(frozen=True)
class LearningRun:
    """What happened during `seconds` in which all workers were at work."""

    seconds: float
    decisions: int
    updates: int
    policy_lag: float
    """Mean of the updates by which the weights of a decision were behind the learner's."""
    cpu_s: Mapping[str, Usage]
    """By the name of a process, without the numbers of workers and groups; `supervisor` is the launched one."""
    left_over: int
    """Number of processes of the run that still exist."""


def learning_config(simulation: Simulation, groups: int) -> Config:
    """The settings of a run with `simulation.workers` in each of the groups."""
    return validate(
        {
            "actors": simulation.workers,
            "groups": groups,
            "device": "cpu",
            "env": {"chunk": CHUNK},
            "policy": {"action_horizon": HORIZON},
            "replay": {"capacity": groups * simulation.workers * LANE_ROWS, "warmup_decisions": WARMUP_DECISIONS},
            "sac": {"batch_size": WARMUP_DECISIONS},
            "inference": {
                "buckets": sorted(simulation.service_s),
                "batch_wait_ms": simulation.batch_wait_ms,
                "threads": 1,
            },
        }
    )


class _Watch(Watch):
    """Measures all processes that the run has when its workers are at work."""

    def __init__(self, counters: Counters, stop: StopRequest, warm_s: float, seconds: float) -> None:
        super().__init__(stop, warm_s, seconds)
        self.counters = counters
        self.processes: list[psutil.Process] = []

    def measure(self) -> None:
        if self._sleep_until(time.monotonic() + START_LIMIT_S, started=True):
            self._sleep_until(time.monotonic() + self.warm_s)
            self.processes = psutil.Process().children(recursive=True)
            self._note()
            self._sleep_until(time.monotonic() + self.seconds)
            self._note()

    def _sleep_until(self, until: float, started: bool = False) -> bool:
        """Wait, if asked to only until all workers have `started`; returns whether they have."""
        while self.stop.reason is None and time.monotonic() < until:
            if started and self.counters.actor_decisions.min() > 0:
                return True
            time.sleep(min(0.02, max(0.001, until - time.monotonic())))
        return False

    def _note(self) -> None:
        used: defaultdict[str, Usage] = defaultdict(lambda: Usage(0.0, 0.0))
        used["supervisor"] = thread_usage(os.getpid(), self.main_thread)
        for process in self.processes:
            name, one = process.name().partition("-")[0], usage([process.pid])
            used[name] = Usage(used[name].running + one.running, used[name].waiting + one.waiting)
        self.moments.append((time.monotonic(), self.counters.snapshot(), dict(used)))


def measure_learning(
    simulation: Simulation, groups: int, update_s: float, warm_s: float, seconds: float
) -> LearningRun:
    """Start the processes of a run, of one machine where `groups` is 1, measure for so many seconds, and end them.

    Raises:
        ValueError: a process failed.
        KeyboardInterrupt: the run was interrupted.
    """
    raise_descriptor_limit()
    config = learning_config(simulation, groups)
    with run_directory(config) as (run_dir, stop):
        run = check_run(config)
        session = Session(run.with_actors(groups * config.actors), run_dir, stop, NoDisplay())
        programs = programs_of(simulation, run.spec.image_size)
        programs[Kind.LEARNER] = Program("dsrl_async.bench.simulated.learner", {"update_s": update_s})
        watch = _Watch(session.counters, stop, warm_s, seconds)
        run_all = partial(run_groups, session, config, programs) if groups > 1 else Supervisor(session, programs).run
        run_watched(watch, session, run_all)
    (begin, before, used), (end, after, now_used) = watch.moments
    decisions = int((after["actor_decisions"] - before["actor_decisions"]).sum())
    return LearningRun(
        seconds=end - begin,
        decisions=decisions,
        updates=int((after["learner_updates"] - before["learner_updates"])[0]),
        policy_lag=float((after["actor_policy_lag"] - before["actor_policy_lag"]).sum()) / decisions,
        cpu_s={name: now_used[name].since(used[name]) for name in used},
        left_over=sum(process.is_running() for process in watch.processes),
    )
