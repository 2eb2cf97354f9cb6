"""The launched process of an asynchronous run: owns the memory; starts, watches, replaces and stops the others."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from dsrl_async.config.command_line import program
from dsrl_async.host import processes
from dsrl_async.host.machine import cpu_threads
from dsrl_async.host.vigil import Vigil
from dsrl_async.run import checkpoints
from dsrl_async.run.channel import SocketDirectory, make_ends, write_secret
from dsrl_async.run.supervisor import ending
from dsrl_async.run.supervisor.child import Child, Kind
from dsrl_async.run.supervisor.session import Session
from dsrl_async.run.supervisor.starting import wait_of
from dsrl_async.run.supervisor.workers import Workers
from dsrl_async.run.worker.template import WORKER
from dsrl_async.shm import events
from dsrl_async.shm.counters import EVALUATION_LANES, Counters, Graphs, Stop
from dsrl_async.telemetry.monitor import Wait

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.05
QUICK_S = 15.0  # a process that dies younger than this, or before it got anywhere, died of starting
QUICK_FAILURES = 3  # so many in a row of the same process end the run
LOADING_S = 900.0  # silence of a model process that is loading: compiling for one batch size may take minutes
MODELS_STOP_S = 5.0  # how long a clean end may take before SIGKILL
CHECKPOINT_SILENCE_S = 20.0  # the learner may take long over a last checkpoint, but not in silence
PROGRAMS = {
    Kind.INFERENCE: processes.Program("dsrl_async.run.inference.server"),
    Kind.LEARNER: processes.Program("dsrl_async.run.learner.learner"),
    Kind.WORKER: WORKER,
}


MODELS = (Kind.INFERENCE, Kind.DOWNLINK, Kind.LEARNER, Kind.UPLINK)
"""Processes of which a run has one each: one that answers observations or stands for groups that do, and one that
learns or stands for the learner elsewhere."""


class Crew(Protocol):
    """Who takes the decisions of a run: its environment workers (`Workers`), or groups of them elsewhere."""

    @property
    def members(self) -> Sequence[Child]:
        """All that are started and replaced."""

    @property
    def children(self) -> Sequence[Child]:
        """Those of them that are processes of this one's."""

    def start_missing(self) -> str | None:
        """Start who is not there; returns why the run must end, if it must."""

    def waits(self, patience_s: float, tries: int) -> Sequence[Wait]:
        """What is waited for."""

    def got_somewhere(self, child: Child) -> bool:
        """Whether this incarnation of one of the children did what it is for."""

    def problem_of(self, child: Child) -> str | None:
        """What is known of why one of the children has ended."""

    def start_no_more(self) -> None:
        """Prepare for the end."""

    def wait(self, seconds: float) -> bool:
        """Wait until all have ended, who were told to; returns False if some still run after so long."""

    @property
    def end_s(self) -> float:
        """How long they may take for that."""

    def kill(self) -> None:
        """End those that are still there."""


class Supervisor:
    """The processes of one asynchronous run. They read their configuration from the run directory.

    Benchmarks give other `programs`; without one for the learner there is none. A `crew` stands in the place of
    environment workers of this process's own.
    """

    def __init__(
        self, session: Session, programs: Mapping[Kind, processes.Program] = PROGRAMS, crew: Crew | None = None
    ) -> None:
        self.programs = programs
        self.session, self.config, self.run_dir = session, session.config, session.run_dir
        self.arena, self.counters = session.arena, session.counters
        self.observation_ready, self.transition_ready = events.create(), events.create()
        self.wake = [events.create() for _ in range(self.config.lanes if crew is None else 0)]
        self._sockets = SocketDirectory()
        self._channel = make_ends(self._sockets.endpoint)
        logs = self.run_dir / "logs"
        self.models = [Child(kind, logs) for kind in MODELS if kind in programs]
        self.learner = next((child for child in self.models if child.kind in (Kind.LEARNER, Kind.UPLINK)), None)
        notify_fds = (self.observation_ready, self.transition_ready)
        self.crew = crew or Workers(session, self.wake, notify_fds, programs[Kind.WORKER])
        self.children = [*self.models, *self.crew.children]
        self._vigil = Vigil(self.config.heartbeat_timeout_s)
        self._graphs = {
            Kind.INFERENCE: self.counters.inference_graphs,
            Kind.LEARNER: self.counters.learner_graphs,
        }
        self._heartbeats = {
            Kind.INFERENCE: self.counters.inference_heartbeat_ns,
            Kind.LEARNER: self.counters.learner_heartbeat_ns,
            Kind.UPLINK: self.counters.learner_heartbeat_ns,
            Kind.DOWNLINK: self.counters.downlink_heartbeat_ns,
            Kind.TEMPLATE: self.counters.template_heartbeat_ns,
            Kind.WORKER: self.counters.actor_heartbeat_ns,
        }
        if self.config.evaluation.lanes:
            evaluation = Counters(self.arena, EVALUATION_LANES)
            self._heartbeats[Kind.EVALUATION] = evaluation.actor_heartbeat_ns

    def run(self) -> dict[str, Any]:
        """Run until a limit, a signal or a failure; returns the summary when no child is left."""
        try:
            reason = self._watch()
        except Exception as error:
            reason = ending.failure(": ".join(self._own_error(error)))
        logger.info("stopping: %s", reason)
        pids = self.pids()
        try:
            self._stop_children()
        except Exception as error:
            reason = ending.with_consequence(reason, *self._own_error(error))
            processes.kill_all(running(self.children))
            self.crew.kill()
        if (why := self._why_nothing_was_saved()) is not None:
            reason = ending.without_checkpoint(reason, why, checkpoints.what_is_left(self.run_dir))
            logger.error(reason)
        events.close([self.observation_ready, self.transition_ready, *self.wake])
        self._sockets.close()
        lost_updates = int(self.counters.learner_lost_updates[0])
        return {**self.session.finish(reason, pids), "restarts": self.restarts, "lost_updates": lost_updates}

    @property
    def restarts(self) -> dict[str, int]:
        """How often processes were replaced, by the public name of their kind."""
        restarts: dict[str, int] = {}
        for child in (*self.models, *self.crew.members):
            restarts[child.kind.value] = restarts.get(child.kind.value, 0) + child.restarts
        return restarts

    def _own_error(self, error: Exception) -> tuple[str, str]:
        """What is wrong with this process, and what the error says of it."""
        logger.exception("error in the supervisor")
        return f"{type(error).__name__} in the supervisor", str(error)

    def _why_nothing_was_saved(self) -> str | None:
        """Why there is no last checkpoint; None if there is one, or no learner that would write it."""
        if (learner := self.learner) is None or learner.kind is Kind.UPLINK:
            return None
        if learner.popen is not None and learner.popen.returncode == 0:
            return None
        if (gone := self.session.missing_directory()) is not None:
            return gone
        if learner.popen is None or learner.popen.returncode is None:
            return "there was no learner"
        if (code := int(learner.popen.returncode)) < 0:
            return f"the learner was {processes.how_ended(code)}"
        return processes.last_line(learner.log, learner.log_start)

    def pids(self) -> dict[str, list[int]]:
        """The processes that there are, by the public name of their kind."""
        pids: dict[str, list[int]] = {}
        for child in self.children:
            if child.popen is not None:
                pids.setdefault(child.kind.value, []).append(child.popen.pid)
        return pids

    def _watch(self) -> str:
        """Start everyone, replace who fails, show figures; returns why the run ends."""
        failed_saves = 0
        uncaptured: list[Child] = []
        while True:
            hopeless = self._start_missing()
            if (reason := self.session.reason_to_stop() or hopeless or self._give_up_dead()) is not None:
                return reason
            if (failed := int(self.counters.learner_failed_checkpoints[0])) > failed_saves:
                failed_saves = failed
                logger.warning("a checkpoint could not be written; learning goes on, see %s", self.run_dir / "logs")
            for child in self.models:
                graphs = self._graphs.get(child.kind)
                if child not in uncaptured and graphs is not None and graphs[0] == Graphs.FAILED:
                    uncaptured.append(child)
                    logger.warning("the %s process does without CUDA graphs: %s says why", child.name, child.log)
            self.session.answer_warnings()
            self.session.evaluate(self._wake)
            if self.session.tick_due():
                self.session.tick(self.pids(), self._waits())
            time.sleep(WATCH_INTERVAL_S)

    def _waits(self) -> tuple[Wait, ...]:
        """What is waited for: the processes that have not begun with their work."""
        waits = []
        counters = self.counters
        said = {Kind.INFERENCE: counters.inference_start, Kind.LEARNER: counters.learner_start}
        for child in self.models:
            if child.kind not in said or self._last_beat(child) is not None:
                continue
            ready, sizes = counters.inference_prepared.tolist()
            detail = f"{ready} of {sizes} sizes" if child.kind is Kind.INFERENCE and ready < sizes else ""
            waits.append(wait_of(child, said[child.kind], LOADING_S, QUICK_FAILURES, detail))
        return (*waits, *self.crew.waits(self.config.heartbeat_timeout_s, QUICK_FAILURES))

    def _wake(self, lane: int) -> None:
        events.notify(self.wake[lane])

    # ---- starting

    def _start_missing(self) -> str | None:
        """Start who is not there; returns why the run must end, if it must."""
        for child in self.models:
            if child.popen is None:
                self._start(child)
        return self.crew.start_missing()

    def _start(self, child: Child) -> None:
        """Start a model process, which gets its end of the channel through a descriptor: it holds a secret key."""
        child.begin()
        run, program, threads = self.session.run, self.programs[child.kind], self.config.learner.threads
        job: dict[str, Any] = {"transition_ready_fd": self.transition_ready}
        fds, end = [self.transition_ready], self._channel.publisher
        if child.kind is Kind.LEARNER:
            job |= {"horizon": run.horizon, "prompts": run.spec.prompts}
        elif child.kind is Kind.INFERENCE:
            job = {"spec": run.spec, "observation_ready_fd": self.observation_ready, "wake_fds": self.wake}
            fds, end = [self.observation_ready, *self.wake], self._channel.subscriber
            threads = self.config.inference.threads
        else:  # it computes nothing
            threads = 1
            if child.kind is Kind.DOWNLINK:
                end = self._channel.subscriber
        channel_fd = write_secret(end)
        job |= {
            "arena": self.arena.describe(),
            "run_dir": str(self.run_dir),
            "channel_fd": channel_fd,
            **program.settings,
        }
        try:
            fds = [self.arena.fd, channel_fd, *fds, *program.fds]
            child.popen = processes.start(program.module, job, fds, child.log, cpu_threads(threads))
        finally:
            os.close(channel_fd)

    # ---- replacing

    def _give_up_dead(self) -> str | None:
        """Kill who hangs, and count who has ended as missing; returns why the run must end, if it must."""
        self._vigil.look()
        for child in self.children:
            if (popen := child.popen) is None:
                continue
            how = self._kill_if_silent(child, popen)
            if (code := popen.poll()) is None:
                continue
            if code == processes.FATAL:
                return ending.failure(processes.last_line(child.log, child.log_start))
            how = self.crew.problem_of(child) or how
            message = f"{program('doctor')} looks for the reason"
            if not how and code >= 0:
                message = processes.last_line(child.log, child.log_start)
            how = how or processes.how_ended(code)
            lived = time.monotonic() - child.started
            quick = lived < QUICK_S or not self._got_somewhere(child)
            child.quick_failures = child.quick_failures + 1 if quick else 0
            if child.quick_failures >= QUICK_FAILURES:
                return ending.failure(
                    f"{child.name} ended {QUICK_FAILURES} times soon after its start ({how}): {message} "
                    f"(all of its output is in {child.log})"
                )
            logger.warning("%s ended (%s) after %.0f s; starting it again, see %s", child.name, how, lived, child.log)
            child.restarts += 1
            child.popen = None
        return None

    def _kill_if_silent(self, child: Child, popen: processes.Process) -> str:
        """Kill a process that gives no sign of life; returns what is the matter with it, empty if nothing is."""
        beat, patience_s = self._last_beat(child), self.config.heartbeat_timeout_s
        if beat is None:
            beat = child.started
            if child in self.models:
                patience_s = LOADING_S
            if child.kind is Kind.INFERENCE:
                beat = max(beat, int(self.counters.inference_loading_ns[0]) * 1e-9)
        silent_s = self._vigil.silent_s(beat)
        if silent_s <= patience_s:
            return ""
        processes.kill_all([popen])
        return f"no sign of life for {silent_s:.0f} s"

    def _last_beat(self, child: Child) -> float | None:
        """When this incarnation last gave a sign of life, by time.monotonic; None before the first."""
        beat = int(self._heartbeats[child.kind][child.number]) * 1e-9
        return beat if beat > child.started else None

    def _got_somewhere(self, child: Child) -> bool:
        """Whether this incarnation did what it is for; of a model process a sign of life is enough."""
        if child in self.models:
            return self._last_beat(child) is not None
        return self.crew.got_somewhere(child)

    # ---- stopping

    def _stop_children(self) -> None:
        """End the environment workers, then the others, so that the last checkpoint holds all transitions."""
        if self.session.missing_directory() is not None:  # there is no place for one
            processes.kill_all(running(self.models))
        self.crew.start_no_more()
        told, patience_s = time.monotonic(), self.crew.end_s
        self._vigil = Vigil(MODELS_STOP_S)  # patience is shorter from here on
        self._tell_to_stop(Stop.WORKERS)
        while not self.crew.wait(0.2):
            self._vigil.look()
            if self._vigil.silent_s(told) > patience_s:
                break
        self.crew.kill()
        self._tell_to_stop(Stop.EVERYONE)
        self._wait_models()
        if (learner := self.learner) is not None and self._died_at_the_end(learner):
            left = "wrote the last checkpoint" if learner.kind is Kind.LEARNER else "had sent all rows"
            logger.warning("%s ended before it %s; another one is started for that", learner.name, left)
            learner.restarts += 1
            self._start(learner)
            self._wait_models()

    def _died_at_the_end(self, learner: Child) -> bool:
        """Whether the learner is gone without the last checkpoint, and a successor can be expected to write it."""
        code = None if learner.popen is None else learner.popen.returncode
        hopeless = learner.quick_failures >= QUICK_FAILURES or self.session.missing_directory() is not None
        return code not in (0, processes.FATAL) and not hopeless

    def _wait_models(self) -> None:
        """Wait until inference and learner have ended; kill who takes too long."""
        models = running(self.models)
        told, learner = time.monotonic(), self.learner
        while not processes.wait_all(models, time.monotonic() + 0.2):
            self._vigil.look()
            since, patience_s = told, MODELS_STOP_S
            if learner is not None and learner.popen is not None and learner.popen.poll() is None:
                # It may take long over the last checkpoint, or still be starting, but not in silence.
                since, patience_s = max(told, self._last_beat(learner) or 0.0), CHECKPOINT_SILENCE_S
            if self._vigil.silent_s(since) > patience_s:
                break
        processes.kill_all(models)

    def _tell_to_stop(self, who: Stop) -> None:
        self.counters.stop = who
        for fd in (self.observation_ready, self.transition_ready, *self.wake):
            events.notify(fd)


def running(children: Iterable[Child]) -> list[processes.Process]:
    """The processes that there are."""
    return [child.popen for child in children if child.popen is not None]
