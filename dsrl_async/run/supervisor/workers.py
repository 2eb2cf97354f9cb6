"""Starting the environment workers of a run, and the template that they are forked from."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Any

from dsrl_async.host import processes
from dsrl_async.host.machine import available_cpus
from dsrl_async.run.evaluation.files import evaluation_root
from dsrl_async.run.supervisor.child import Child, Kind
from dsrl_async.run.supervisor.session import Session
from dsrl_async.run.supervisor.starting import wait_of, wait_of_workers
from dsrl_async.run.worker.template import Template
from dsrl_async.shm.assignments import Assignments
from dsrl_async.shm.counters import EVALUATION_LANES, Counters
from dsrl_async.shm.slots import Slots
from dsrl_async.telemetry.monitor import Wait

logger = logging.getLogger(__name__)

STARTING_WORKERS = 2  # so many at once at least, and one for each core: more would only slow each other down
WORKERS_STOP_S = 3.0  # how long a clean end may take before SIGKILL
WORKER_STOP_S = 0.05  # and for each environment worker, where there are more of them than cores
ANSWER_WAIT_S = 0.05  # how long the supervisor waits for a fork before it looks after the other processes


class Workers:
    """The environment workers of a run, one for each lane, and their template.

    A worker without a process is missing; the template is asked for those that are, one by one.

    Args:
        session: the run that they belong to.
        wake_fds: for each lane, what its worker waits on.
        notify_fds: on which the workers announce observations.
        program: what a worker runs.
    """

    def __init__(
        self, session: Session, wake_fds: Sequence[int], notify_fds: Sequence[int], program: processes.Program
    ) -> None:
        logs = session.run_dir / "logs"
        self.template = Child(Kind.TEMPLATE, logs)
        config = session.config
        self.by_lane = [Child(Kind.WORKER, logs, lane) for lane in range(config.actors)]
        self.by_lane += [Child(Kind.EVALUATION, logs, number) for number in range(config.evaluation.lanes)]
        self._starts = {Kind.WORKER: session.counters.actor_start}
        self._assignments: Assignments | None = None
        if config.evaluation.lanes:
            evaluation = Counters(session.arena, EVALUATION_LANES)
            self._assignments = Assignments(session.arena, evaluation)
            self._starts[Kind.EVALUATION] = evaluation.actor_start
        self._session, self._wake_fds, self._notify_fds, self._program = session, wake_fds, notify_fds, program
        self._slots, self._episodes = Slots(session.arena), session.counters.actor_episodes
        self._episodes_before = self._episodes.copy()  # of each lane, when its worker's incarnation began
        self._forker: Template | None = None  # our side of the template
        self._asked: Child | None = None  # the worker that the template was asked for
        self._limit = max(STARTING_WORKERS, available_cpus())

    @property
    def members(self) -> list[Child]:
        return [self.template, *self.by_lane]

    children = members

    def start_missing(self) -> None:
        """Start the template, or as many of the missing workers as may come up at once, if it is there to fork them.

        All share the cores, so nobody is kept waiting by this; the first ones decide while the last ones start, one
        that hangs is found out after the same time however many there are, and the memory that a start takes beyond
        what it leaves is taken a few times over, not N times.
        """
        if self.template.popen is None:
            self._start_template()
        template = self._forker
        assert template is not None
        try:
            while template.prepared and (self._asked is not None or self._ask(template)):
                if not self._take_answer(template, ANSWER_WAIT_S):
                    return
        except RuntimeError as error:  # the template has to be replaced
            logger.warning("%s", error)
            processes.kill_all([template.popen])
            self._asked = None

    def _start_template(self) -> None:
        self.end_template()
        session, child = self._session, self.template
        child.begin()
        self._forker = Template(
            session.arena,
            session.config.seed,
            session.config.env.model_dump(),
            self._wake_fds,
            self._notify_fds,
            child.log,
            child.incarnation,
            evaluation=evaluation_job(session),
            program=self._program,
            step_discount=session.config.sac.step_discount,
            agent_cameras=session.config.sac.cameras,
        )
        child.popen = self._forker.popen

    def _ask(self, template: Template) -> bool:
        """Ask for the worker of a lane without one; False if there is no such lane, or enough are coming up."""
        missing = next(((lane, worker) for lane, worker in enumerate(self.by_lane) if worker.popen is None), None)
        if missing is None or sum(map(self._coming_up, self.by_lane)) >= self._limit:
            return False
        lane, worker = missing
        worker.begin()
        if worker.kind is Kind.WORKER:
            self._episodes_before[lane] = self._episodes[lane]
        template.ask(lane, worker.incarnation, worker.log, worker.name)
        self._asked = worker
        return True

    def _coming_up(self, worker: Child) -> bool:
        """Whether it was started and has not asked for its first action chunk yet, or for an episode to evaluate."""
        if worker.popen is None:
            return False
        if worker.kind is Kind.EVALUATION:
            return not self._takes_episodes(worker)
        return self._slots.incarnation(worker.number) != worker.incarnation

    def waits(self, patience_s: float, tries: int) -> list[Wait]:
        """What is waited for: the template, and the workers that are not ready.

        `patience_s` is how long one may be silent, and `tries` how often it may fail in a row.
        """
        template, counters = self._forker, self._session.counters
        waits: list[Wait | None] = []
        if template is not None and not template.prepared:
            waits.append(wait_of(self.template, counters.template_start, patience_s, tries))
        for kind, start in self._starts.items():
            workers = [worker for worker in self.by_lane if worker.kind is kind]
            coming = [worker for worker in workers if self._coming_up(worker)]
            waits.append(wait_of_workers(workers, coming, start, self.template.started, patience_s, tries))
        return [wait for wait in waits if wait is not None]

    def _takes_episodes(self, worker: Child) -> bool:
        return self._assignments is not None and int(self._assignments.taker[worker.number]) == worker.incarnation

    def _take_answer(self, template: Template, wait_s: float = 0.0, last: bool = False) -> bool:
        """Whether the worker that was asked for is there."""
        assert self._asked is not None
        popen = template.answer(wait_s, last)
        if popen is None:
            return False
        self._asked.popen, self._asked = popen, None
        return True

    def end_template(self) -> None:
        """End it if it was started; the workers live on."""
        if (template := self._forker) is None:
            return
        if self._asked is not None:  # it may have started the worker before it died
            with contextlib.suppress(RuntimeError):
                self._take_answer(template, last=True)
            self._asked = None
        template.close()

    def start_no_more(self) -> None:
        self.end_template()

    @property
    def end_s(self) -> float:
        return WORKERS_STOP_S + WORKER_STOP_S * len(self._running())

    def wait(self, seconds: float) -> bool:
        return processes.wait_all(self._running(), time.monotonic() + seconds)

    def kill(self) -> None:
        processes.kill_all(self._running())

    def _running(self) -> list[processes.Process]:
        return [worker.popen for worker in self.by_lane if worker.popen is not None]

    def problem_of(self, child: Child) -> str | None:
        """Why the template is of no use any more, if that is so."""
        return self._forker.problem if child is self.template and self._forker is not None else None

    def got_somewhere(self, child: Child) -> bool:
        """Whether a worker has ended an episode since it was started, or waits for one to evaluate, or the template can
        fork workers."""
        if child.kind is Kind.EVALUATION:
            return self._takes_episodes(child)
        if child.kind is Kind.WORKER:
            return bool(self._episodes[child.number] > self._episodes_before[child.number])
        template = self._forker
        return template is not None and template.prepared and (template.forked > 0 or template.problem is None)


def evaluation_job(session: Session) -> dict[str, Any] | None:
    """What the workers of the evaluation have to know, see `Template`; None if there is none."""
    config = session.config
    if not config.evaluation.lanes:
        return None
    films = str(evaluation_root(session.run_dir).absolute()) if config.evaluation.films else None
    return {
        "from_lane": config.actors,
        "preview": True,
        "video_dir": films,
        "rate_hz": session.run.environment.rate_hz,
        "begin_with": None,
    }
