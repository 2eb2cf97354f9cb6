"""A pool of environment workers: one for each lane, forked from one template, and ended together.

Evaluation, the doctor and the benchmark of environments use it. A run does not: its supervisor starts a few workers at
a time and replaces each one that dies.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsrl_async.config.settings import Config
from dsrl_async.host import processes
from dsrl_async.host.processes import Process, Program
from dsrl_async.host.vigil import Vigil
from dsrl_async.run.worker.template import WORKER, Template, TemplateError
from dsrl_async.shm import events
from dsrl_async.shm.arena import Arena, Fields
from dsrl_async.shm.counters import Counters
from dsrl_async.shm.slots import Slots

POLL_S = 0.02


class WorkerLost(RuntimeError):
    """A process was killed or hangs, and cannot have said why; the error is one sentence."""


class WorkerPool:
    """`config.actors` environment workers with their template, their shared memory and their logs.

        with WorkerPool(config, fields) as pool:  # the template begins to prepare what the workers share
            pool.await_template()
            pool.fork_workers()
            ...                                   # `check` looks after the workers
            pool.await_end()

    Leaving the `with`, in whatever way, ends the processes and frees memory, descriptors and logs.

    Args:
        config: its `actors`, `seed` and `env` make the workers; one that is silent for `heartbeat_timeout_s` hangs.
        fields: the arrays of the shared memory.
        evaluation: makes the workers play the episodes that they are given, see `Template`.
        program: what a worker runs.
        start_limit_s: upper limit on the seconds until the template is ready, and from then until the workers are.
        meanwhile: is called now and then while the pool waits; it may raise.

    The methods raise RuntimeError with one sentence if a process ends or takes too long, `WorkerLost` if it was killed
    or hangs.

    Attributes:
        arena: the shared memory.
        observation_ready: the event that a worker sets when it has an observation, or has ended an episode.
        wake_fds: for each lane, the event on which its worker waits.
        logs: the directory of the logs, `template.log` and `actor-000.log` and so on.
        workers: the workers that were forked so far, by lane.
    """

    def __init__(
        self,
        config: Config,
        fields: Fields,
        *,
        evaluation: Mapping[str, Any] | None = None,
        program: Program = WORKER,
        start_limit_s: float = math.inf,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        self._config, self._fields, self._evaluation, self._program = config, fields, evaluation, program
        self._start_limit_s, self._meanwhile = start_limit_s, meanwhile
        self._vigil = Vigil(config.heartbeat_timeout_s)
        self.workers: list[Process] = []

    def __enter__(self) -> WorkerPool:
        config = self._config
        with contextlib.ExitStack() as stack:  # which takes back what was made if something cannot be
            self.logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self.arena = stack.enter_context(contextlib.closing(Arena.create(self._fields)))
            self._counters = Counters(self.arena)
            self.observation_ready, *self.wake_fds = (_event(stack) for _ in range(1 + config.actors))
            stack.callback(processes.kill_all, self.workers)
            self._started_ns = time.monotonic_ns()
            self._template = Template(
                self.arena,
                config.seed,
                config.env.model_dump(),
                self.wake_fds,
                [self.observation_ready],
                self.logs / "template.log",
                evaluation=self._evaluation,
                program=self._program,
                step_discount=config.sac.step_discount,
                agent_cameras=config.sac.cameras,
            )
            stack.callback(self._template.close)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._resources.close()

    @property
    def pids(self) -> list[int]:
        """The process numbers of the template and of the workers, in this order."""
        return [self._template.popen.pid, *(worker.pid for worker in self.workers)]

    def await_template(self) -> None:
        """Wait until the template can fork workers."""
        deadline = time.monotonic() + self._start_limit_s
        while not self._template.prepared:
            self._check_template()
            self._pause(deadline, "the environment workers' template")

    def fork_workers(self) -> None:
        """Fork the worker of each lane, without waiting for what it does then."""
        for lane in range(self._config.actors):
            try:
                self.workers.append(self._template.fork(lane, 1, self._log(lane), self._check_template))
            except TemplateError as error:
                raise RuntimeError(f"{error}: {processes.last_line(self.logs / 'template.log')}") from error
        self._started_ns = time.monotonic_ns()

    def await_observations(self) -> None:
        """Wait until every worker has asked for its first action chunk."""
        deadline = time.monotonic() + self._start_limit_s
        slots = Slots(self.arena)
        while not slots.request_id.all():
            self._meanwhile()
            for lane in range(len(self.workers)):
                self.check(lane)
            self._pause(deadline, "an environment worker")

    def check(self, lane: int) -> None:
        """Raise RuntimeError if the worker of a lane has ended or hangs."""
        heard_ns = max(self._started_ns, int(self._counters.actor_heartbeat_ns[lane]))
        self._check_alive(f"environment process {lane}", self.workers[lane], heard_ns, self._log(lane))

    def end_template(self) -> None:
        """End the template, which frees what only it has in memory; the workers live on."""
        self._template.close()

    def await_end(self) -> None:
        """Wait, not for long, until the workers have ended by themselves: they close their environments."""
        processes.wait_all(self.workers, time.monotonic() + processes.REAP_S)

    def _check_template(self) -> None:
        self._meanwhile()
        heard_ns = max(self._started_ns, int(self._counters.template_heartbeat_ns[0]))
        log = self.logs / "template.log"
        self._check_alive("the environment workers' template", self._template.popen, heard_ns, log)

    def _check_alive(self, name: str, process: Process, heard_ns: int, log: Path) -> None:
        self._vigil.look()
        check_alive(name, process, self._vigil.silent_s(heard_ns * 1e-9), self._config.heartbeat_timeout_s, log)

    def _pause(self, deadline: float, what: str) -> None:
        """Wait a little; raise RuntimeError, which says what was awaited, if the `deadline` has passed."""
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} was not ready within {self._start_limit_s:g} s")
        events.wait(self.observation_ready, POLL_S)

    def _log(self, lane: int) -> Path:
        return self.logs / f"actor-{lane:03d}.log"


def check_alive(name: str, process: Process, silent_s: float, patience_s: float, log: Path) -> None:
    """Raise RuntimeError if a process has ended, or hangs: it has been silent for longer than `patience_s`."""
    if (code := process.poll()) is not None:
        if code < 0:
            raise WorkerLost(f"{name} ended ({processes.how_ended(code)})")
        raise RuntimeError(f"{name} ended ({processes.how_ended(code)}): {processes.last_line(log)}")
    if silent_s > patience_s:
        raise WorkerLost(f"{name} has given no sign of life for {silent_s:.0f} s")


def _event(stack: contextlib.ExitStack) -> int:
    fd = events.create()
    stack.callback(os.close, fd)
    return fd
