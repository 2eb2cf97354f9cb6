"""The launched process of an asynchronous run: owns the memory; starts, watches, replaces and stops the others."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Mapping
from typing import Any

from dsrl_async.host import processes
from dsrl_async.host.machine import available_cpus, cpu_threads
from dsrl_async.run.preflight.policy import policy_directory
from dsrl_async.run.supervisor.child import Child
from dsrl_async.run.supervisor.session import Session
from dsrl_async.run.worker.template import WORKER, Template
from dsrl_async.shm import events
from dsrl_async.shm.counters import Stop
from dsrl_async.shm.slots import Slots

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.05
QUICK_S = 15.0  # a process that dies younger than this, or before it got anywhere, died of starting
QUICK_FAILURES = 3  # so many in a row of the same process end the run
START_S = 1800.0  # until a model process's first sign of life: loading and compiling a policy takes minutes
STARTING_ACTORS = 2  # so many at once at least, and one for each core: more would only slow each other down
ACTORS_STOP_S, MODELS_STOP_S = 3.0, 5.0  # how long a clean end may take before SIGKILL
ACTOR_STOP_S = 0.05  # and for each actor, where there are more of them than cores
CHECKPOINT_SILENCE_S = 20.0  # the learner may take long over a last checkpoint, but not in silence
PROGRAMS = {
    "inference": processes.Program("dsrl_async.run.inference.server"),
    "learner": processes.Program("dsrl_async.run.learner.learner"),
    "actor": WORKER,
}


class Supervisor:
    """The processes of one asynchronous run. They read their configuration from the run directory.

    Benchmarks give other `programs` for the kinds of processes; without one for the learner there is none.
    """

    def __init__(self, session: Session, programs: Mapping[str, processes.Program] = PROGRAMS) -> None:
        self.programs = programs
        self.session, self.config, self.run_dir = session, session.config, session.run_dir
        self.arena, self.counters = session.arena, session.counters
        self.observation_ready, self.transition_ready = events.create(), events.create()
        self.wake = [events.create() for _ in range(self.config.actors)]
        self.weights_address = f"ipc://@dsrl_async-{os.getpid()}-{secrets.token_hex(4)}"
        self.children: dict[str, Child] = {}
        self.slots = Slots(self.arena)
        self.waiting = [f"actor-{number:03d}" for number in range(self.config.actors)]  # to be started, maybe again
        self.template: Template | None = None
        self.asked: Child | None = None  # an actor that the template is to start
        self.starting = max(STARTING_ACTORS, available_cpus())
        self.restarts = {"actor": 0, "inference": 0, "learner": 0, "template": 0}

    # ---- starting

    def _next(self, name: str) -> Child:
        """The first process of a name, or the next one's successor; it is to be started."""
        log = self.run_dir / "logs" / f"{name}.log"
        child = Child(name, log, time.monotonic(), log.stat().st_size if log.is_file() else 0)
        if (old := self.children.get(name)) is not None:
            child.incarnation, child.quick_failures = old.incarnation + 1, old.quick_failures
        if child.is_actor:
            child.episodes = self._episodes(child)
        return child

    def _start(self, name: str) -> None:
        """Start the template, the inference process or the learner, or its successor."""
        child = self._next(name)
        child.popen = self._start_template(child) if name == "template" else self._start_model(child)
        self.children[name] = child

    def _start_model(self, child: Child) -> processes.Process:
        job: dict[str, Any] = {
            "arena": self.arena.describe(),
            "run_dir": str(self.run_dir),
            "weights_address": self.weights_address,
        }
        if child.name == "inference":
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
        program = self.programs[child.name]
        return processes.start(program.module, {**job, **program.settings}, fds, child.log, threads)

    def _start_template(self, child: Child) -> processes.Process:
        self._end_template()
        self.template = Template(
            self.arena,
            self.config.seed,
            self.config.env.model_dump(),
            self.wake,
            [self.observation_ready, self.transition_ready],
            child.log,
            child.incarnation,
            program=self.programs["actor"],
        )
        return self.template.popen

    def _start_actors(self) -> None:
        """Start as many of the waiting actors as may come up at once, if the template is there to fork them.

        All share the cores, so no one is kept waiting by this; the first ones decide while the last ones start, one
        that hangs is found out after the same time however many there are, and the memory that a start takes beyond
        what it leaves is taken a few times over, not N times.
        """
        template = self.template
        while self.waiting and template is not None and template.prepared:
            try:
                if self.asked is None:
                    running = (child for name, child in self.children.items() if name not in self.waiting)
                    if sum(map(self._coming_up, running)) >= self.starting:
                        return
                    child = self._next(self.waiting[0])
                    template.ask(child.number, child.incarnation, child.log)
                    self.asked = child
                if not self._take_answer(template, WATCH_INTERVAL_S):
                    return
            except RuntimeError as error:
                logger.warning("%s", error)
                processes.kill_all([template.popen])
                self.asked = None
                return  # `_replace_dead` starts it again

    def _take_answer(self, template: Template, wait_s: float = 0.0, last: bool = False) -> bool:
        """Whether the actor that was asked for is there; if so, it is one of the children."""
        assert self.asked is not None
        popen = template.answer(wait_s, last)
        if popen is None:
            return False
        child, self.asked = self.asked, None
        child.popen = popen
        self.children[child.name] = child
        self.waiting.remove(child.name)
        return True

    def _end_template(self) -> None:
        if self.template is not None:
            if self.asked is not None:  # it may have started the actor before it died
                with contextlib.suppress(RuntimeError):
                    self._take_answer(self.template, last=True)
                self.asked = None
            self.template.close()

    def _coming_up(self, child: Child) -> bool:
        """Whether an actor has not asked for its first action chunk yet."""
        return child.is_actor and self.slots.incarnation(child.number) != child.incarnation

    # ---- watching

    def run(self) -> dict[str, Any]:
        """Run until a limit, a signal or a failure; returns the summary when no child is left."""
        try:
            for name in ("inference", "learner", "template"):
                if name in self.programs or name == "template":
                    self._start(name)
            reason = self._watch()
        except Exception as error:
            logger.exception("error in the supervisor")
            reason = f"failed: {type(error).__name__} in the supervisor: {error}"
        logger.info("stopping: %s", reason)
        pids = self._pids()
        if not self._stop_children():
            learner = self.children.get("learner")
            lost = processes.last_line(learner.log, learner.log_start) if learner else "the learner was never started"
            reason = f"failed: no checkpoint was written at the end ({reason}): {lost}"
            logger.error(reason)
        events.close([self.observation_ready, self.transition_ready, *self.wake])
        lost_updates = int(self.counters.learner_lost_updates[0])
        return {**self.session.finish(reason, pids), "restarts": self.restarts, "lost_updates": lost_updates}

    def _watch(self) -> str:
        """Returns why the run ends."""
        failed_saves = 0
        while (reason := self.session.reason_to_stop() or self._replace_dead()) is None:
            self._start_actors()
            if (failed := int(self.counters.learner_failed_checkpoints[0])) > failed_saves:
                failed_saves = failed
                logger.warning("a checkpoint could not be written; learning goes on, see %s", self.run_dir / "logs")
            if self.session.tick_due():
                self.session.tick(self._pids())
            time.sleep(WATCH_INTERVAL_S)
        return reason

    def _pids(self) -> dict[str, int]:
        return {name: child.popen.pid for name, child in self.children.items() if name not in self.waiting}

    def _last_beat(self, child: Child) -> float | None:
        """When this incarnation last gave a sign of life, time.monotonic; None: not yet."""
        if child.is_actor:
            beat_ns = self.counters.actor_heartbeat_ns[child.number]
        else:
            beat_ns = getattr(self.counters, f"{child.name}_heartbeat_ns")[0]
        beat = int(beat_ns) * 1e-9
        return beat if beat > child.started else None

    def _replace_dead(self) -> str | None:
        """Start a successor for every process that died or hangs; returns why the run must end, if it must."""
        for name, child in list(self.children.items()):
            if name in self.waiting:  # it has ended already
                continue
            beat, now = self._last_beat(child), time.monotonic()
            silent_s = now - (beat or child.started)
            how = ""
            loading = beat is None and name in ("inference", "learner")
            if silent_s > (START_S if loading else self.config.heartbeat_timeout_s):
                how = f"no sign of life for {silent_s:.0f} s"
                processes.kill_all([child.popen])
            code = child.popen.poll()
            if code is None:
                continue
            if name == "template" and self.template is not None and self.template.problem is not None:
                how = self.template.problem
            message = "python -m dsrl_async.doctor looks for the reason"
            if not how and code >= 0:
                message = processes.last_line(child.log, child.log_start)
            how = how or processes.how_ended(code)
            lived = now - child.started
            quick = lived < QUICK_S or not self._got_somewhere(child)
            child.quick_failures = child.quick_failures + 1 if quick else 0
            if child.quick_failures >= QUICK_FAILURES:
                return (
                    f"failed: {name} ended {QUICK_FAILURES} times soon after its start ({how}): {message} "
                    f"(all of its output is in {child.log})"
                )
            logger.warning("%s ended (%s) after %.0f s; starting it again, see %s", name, how, lived, child.log)
            self.restarts[name.split("-")[0]] += 1
            if child.is_actor:
                self.waiting.insert(0, name)
            else:
                self._start(name)
        return None

    def _episodes(self, actor: Child) -> int:
        return int(self.counters.actor_episodes[actor.number])

    def _got_somewhere(self, child: Child) -> bool:
        """Whether it did what it is for: an actor has ended an episode, the template can fork some, another process has
        given a sign of life."""
        if child.is_actor:
            return self._episodes(child) > child.episodes
        if child.name == "template":
            template = self.template
            return template is not None and template.prepared and (template.forked > 0 or template.problem is None)
        return self._last_beat(child) is not None

    # ---- stopping

    def _stop_children(self) -> bool:
        """End the actors, then the others, so that the last checkpoint holds all transitions; False if it failed."""
        self._end_template()
        children = self.children.values()
        actors = [child.popen for child in children if child.is_actor]
        models = [child.popen for child in children if child.name in ("inference", "learner")]
        self._stop(Stop.WORKERS)
        if not processes.wait_all(actors, time.monotonic() + ACTORS_STOP_S + ACTOR_STOP_S * len(actors)):
            processes.kill_all(actors)
        self._stop(Stop.EVERYONE)
        stopped = time.monotonic()
        while not processes.wait_all(models, time.monotonic() + 0.2):
            learner = self.children.get("learner")
            alive = learner is not None and learner.popen.poll() is None
            # A learner may take long over the last checkpoint, or still be starting, but not in silence.
            silent_s = time.monotonic() - max(stopped, (learner and self._last_beat(learner)) or 0.0)
            if silent_s > (CHECKPOINT_SILENCE_S if alive else MODELS_STOP_S):
                break
        processes.kill_all(models)
        if "learner" not in self.programs:
            return True
        return "learner" in self.children and self.children["learner"].popen.returncode == 0

    def _stop(self, who: Stop) -> None:
        self.counters.stop = who
        for fd in (self.observation_ready, self.transition_ready, *self.wake):
            events.notify(fd)
