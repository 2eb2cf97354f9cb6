"""The launched process of an asynchronous run: owns the memory; starts, watches, replaces and stops the others."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsrl_async import processes
from dsrl_async.preflight import cpu_threads, policy_directory
from dsrl_async.session import Session
from dsrl_async.shm import events

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.05
QUICK_S = 15.0  # a process that dies younger than this died of starting
QUICK_FAILURES = 3  # so many in a row of the same process end the run
ACTORS_STOP_S, MODELS_STOP_S = 3.0, 5.0  # how long a clean end may take before SIGKILL
CHECKPOINT_SILENCE_S = 20.0  # the learner may take long over a last checkpoint, but not in silence


@dataclass
class Child:
    """A process and its history."""

    name: str
    popen: subprocess.Popen[bytes]
    started: float
    incarnation: int = 1
    quick_failures: int = 0


class Supervisor:
    """The processes of one asynchronous run. They read their configuration from the run directory."""

    def __init__(self, session: Session) -> None:
        self.session, self.config, self.run_dir = session, session.config, session.run_dir
        self.arena, self.counters = session.arena, session.counters
        self.observation_ready, self.transition_ready = events.create(), events.create()
        self.wake = [events.create() for _ in range(self.config.actors)]
        self.weights_address = f"ipc://@dsrl_async-{os.getpid()}-{secrets.token_hex(4)}"
        self.children: dict[str, Child] = {}
        self.restarts = {"actor": 0, "inference": 0, "learner": 0}

    # ---- starting

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        log = self.run_dir / "logs" / f"{name}.log"
        if name.startswith("actor"):
            return self._start_actor(int(name.removeprefix("actor-")), log)
        job: dict[str, Any] = {
            "arena": self.arena.describe(),
            "run_dir": str(self.run_dir),
            "weights_address": self.weights_address,
        }
        if name == "inference":
            job |= {
                "policy": str(policy_directory(self.config)),
                "observation_ready_fd": self.observation_ready,
                "wake_fds": self.wake,
            }
            fds = [self.arena.fd, self.observation_ready, *self.wake]
            threads = cpu_threads(self.config.inference.threads)
        else:
            job |= {"horizon": self.session.horizon, "transition_ready_fd": self.transition_ready}
            fds = [self.arena.fd, self.transition_ready]
            threads = cpu_threads(self.config.learner.threads)
        return processes.start(f"dsrl_async.{name}", job, fds, log, threads)

    def _start_actor(self, lane: int, log: Path) -> subprocess.Popen[bytes]:
        old = self.children.get(f"actor-{lane:03d}")
        job = {
            "arena": self.arena.describe(),
            "lane": lane,
            "incarnation": old.incarnation + 1 if old else 1,
            "seed": self.config.seed,
            "env": self.config.env.model_dump(),
            "wake_fd": self.wake[lane],
            "notify_fds": [self.observation_ready, self.transition_ready],
            "evaluation": None,
        }
        fds = [self.arena.fd, self.wake[lane], self.observation_ready, self.transition_ready]
        return processes.start("dsrl_async.worker", job, fds, log, threads=1)

    def _start_all(self) -> None:
        # The model processes first: they take longest to come up.
        for name in ("inference", "learner", *(f"actor-{lane:03d}" for lane in range(self.config.actors))):
            self.children[name] = Child(name, self._start(name), time.monotonic())

    # ---- watching

    def run(self) -> dict[str, Any]:
        """Run until a limit, a signal or a failure; returns the summary when no child is left."""
        reason = "failed: an error in the supervisor, see its log"
        try:
            self._start_all()
            reason = self._watch()
        except Exception:
            logger.exception("error in the supervisor")
        finally:
            logger.info("stopping: %s", reason)
            pids = self._pids()
            if not self._stop_children():
                lost = processes.last_lines(self.run_dir / "logs" / "learner.log")
                reason = f"failed: no checkpoint was written at the end ({reason}): {lost}"
                logger.error(reason)
            events.close([self.observation_ready, self.transition_ready, *self.wake])
        return {**self.session.finish(reason, pids), "restarts": self.restarts}

    def _watch(self) -> str:
        """Returns why the run ends."""
        while (reason := self.session.reason_to_stop() or self._replace_dead()) is None:
            if self.session.tick_due():
                self.session.tick(self._pids())
            time.sleep(WATCH_INTERVAL_S)
        return reason

    def _pids(self) -> dict[str, int]:
        return {name: child.popen.pid for name, child in self.children.items()}

    def _silent_s(self, child: Child) -> float:
        """Seconds since the process last gave a sign of life, or since its start."""
        if child.name.startswith("actor"):
            beat_ns = self.counters.actor_heartbeat_ns[int(child.name.removeprefix("actor-"))]
        else:
            beat_ns = getattr(self.counters, f"{child.name}_heartbeat_ns")[0]
        return time.monotonic() - max(int(beat_ns) * 1e-9, child.started)

    def _replace_dead(self) -> str | None:
        """Start a successor for every process that died or hangs; returns why the run must end, if it must."""
        for name, child in self.children.items():
            silent_s = self._silent_s(child)
            if silent_s > self.config.heartbeat_timeout_s:
                logger.warning("%s gave no sign of life for %.0f s; killing it", name, silent_s)
                processes.kill_all([child.popen])
            code = child.popen.poll()
            if code is None:
                continue
            lived = time.monotonic() - child.started
            child.quick_failures = child.quick_failures + 1 if lived < QUICK_S else 0
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            log = self.run_dir / "logs" / f"{name}.log"
            if child.quick_failures >= QUICK_FAILURES:
                lines = processes.last_lines(log)
                return f"failed: {name} ended {QUICK_FAILURES} times soon after its start ({how}): {lines}"
            logger.warning("%s ended (%s) after %.0f s; starting it again, see %s", name, how, lived, log)
            self.restarts[name.split("-")[0]] += 1
            child.popen = self._start(name)
            child.incarnation += 1
            child.started = time.monotonic()
        return None

    # ---- stopping

    def _stop_children(self) -> bool:
        """End the actors, then the others, so that the last checkpoint holds all transitions; False if it failed."""
        children = self.children.values()
        actors = [child.popen for child in children if child.name.startswith("actor")]
        models = [child.popen for child in children if not child.name.startswith("actor")]
        self._set_stop(1)
        if not processes.wait_all(actors, time.monotonic() + ACTORS_STOP_S):
            processes.kill_all(actors)
        self._set_stop(2)
        deadline = time.monotonic() + MODELS_STOP_S
        while not processes.wait_all(models, time.monotonic() + 1.0):
            learner = self.children["learner"]
            writing = learner.popen.poll() is None and self._silent_s(learner) < CHECKPOINT_SILENCE_S
            if time.monotonic() > deadline and not writing:
                break
        processes.kill_all(models)
        return "learner" in self.children and self.children["learner"].popen.returncode == 0

    def _set_stop(self, stage: int) -> None:
        self.counters.control_stop[0] = stage
        for fd in (self.observation_ready, self.transition_ready, *self.wake):
            events.notify(fd)
