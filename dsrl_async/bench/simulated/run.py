"""A run of the real processes and memory with simulated environments and a simulated device, watched from outside."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dsrl_async.bench.simulated.device import RECORDS
from dsrl_async.bench.simulated.environment import CHUNK, HORIZON, SPEC
from dsrl_async.config.load import to_yaml, validate
from dsrl_async.config.settings import Config
from dsrl_async.host.cpu_time import Usage, thread_usage, usage
from dsrl_async.host.files import write_text
from dsrl_async.host.processes import Program, raise_descriptor_limit
from dsrl_async.host.signals import SIGNALS, WARNINGS, StopRequest
from dsrl_async.plan.simulation import EnvironmentTimes
from dsrl_async.run.preflight import check_run
from dsrl_async.run.supervisor.child import Kind
from dsrl_async.run.supervisor.session import Session
from dsrl_async.run.supervisor.supervisor import Supervisor
from dsrl_async.shm.counters import INFERENCE_PHASES
from dsrl_async.telemetry.console import NoDisplay
from dsrl_async.telemetry.usage import MEMORY_WORKERS

WARMUP_DECISIONS = 16
LANE_ROWS = 64  # replay rows of a lane: the ring is small, so that all its memory is soon in use
FAR_AHEAD = 2**32  # gradient updates, so that no environment waits for the learner, which does not exist
ENDLESS_EPISODES = 10_000
"""Episodes of each worker of an evaluation: more than it can play."""
MEASURED = "measured"
START_LIMIT_S = 600.0


@dataclass(frozen=True)
class Simulation:
    """Settings of a simulated run."""

    workers: int
    times: EnvironmentTimes
    service_s: Mapping[int, float]
    """Batch size -> seconds that the device takes. These are the run's batch sizes."""
    batch_wait_ms: float = 0.0
    lock_step: bool = False
    gather: bool = True
    """Whether images are copied into the batch."""
    evaluators: int = 0
    """Number of further workers, whose evaluation goes on all the time."""
    record: bool = True
    """Whether the times at which each request is made and answered are noted."""


@dataclass(frozen=True)
class Measurement:
    """What happened during `seconds` in which all workers were at work."""

    seconds: float
    decisions: int
    batches: int
    rows: int
    """Number of observations answered."""
    padded_rows: int
    phase_s: dict[str, float]
    """Seconds by phase of the inference process."""
    queue_wait_s: np.ndarray
    """Time from a request to the start of its batch, float64 [decisions]; empty if not recorded."""
    latency_s: np.ndarray
    """Time from a request to its answer, likewise."""
    supervisor: Usage
    inference: Usage
    workers: Usage
    start_s: float
    """Time from the first process to the first decision of the last worker."""
    stop_s: float
    """Time from the request to stop until no process was left."""
    worker_memory: float
    """Mean private bytes of a worker."""
    killed: int
    """Number of processes that did not end by themselves."""
    left_over: int
    """Number of processes of the run that still exist."""

    @property
    def cpu_s(self) -> float:
        """CPU time of all processes."""
        return self.supervisor.running + self.inference.running + self.workers.running


def run_config(simulation: Simulation) -> Config:
    evaluation = {}
    if simulation.evaluators:  # the first evaluation, which does not end
        episodes = simulation.evaluators * ENDLESS_EPISODES
        evaluation = {"every_minutes": 1.0, "episodes": episodes, "actors": simulation.evaluators}
    settings = {
        "actors": simulation.workers,
        "env": {"chunk": CHUNK},
        "policy": {"action_horizon": HORIZON},
        "replay": {
            "capacity": simulation.workers * LANE_ROWS,
            "warmup_decisions": WARMUP_DECISIONS,
        },
        "sac": {"batch_size": WARMUP_DECISIONS},
        "evaluation": evaluation,
        "inference": {
            "buckets": sorted(simulation.service_s),
            "batch_wait_ms": simulation.batch_wait_ms,
            "threads": 1,
        },
    }
    return validate(settings)


def programs_of(simulation: Simulation, image_size: int) -> dict[Kind, Program]:
    """What the processes run instead of the usual."""
    device = {
        "service_s": dict(simulation.service_s),
        "gather": simulation.gather,
        "lock_step": simulation.lock_step,
        "record": simulation.record,
        "image_size": image_size,
    }
    times = {"times": asdict(simulation.times), "image_size": image_size}
    return {
        Kind.INFERENCE: Program("dsrl_async.bench.simulated.device", device),
        Kind.WORKER: Program("dsrl_async.bench.simulated.environment", times),
    }


class Watch(threading.Thread):
    """Measures in a thread of its own, as a subclass says, and ends the run."""

    def __init__(self, stop: StopRequest, warm_s: float, seconds: float) -> None:
        super().__init__(daemon=True)
        self.stop, self.warm_s, self.seconds = stop, warm_s, seconds
        self.main_thread = threading.get_native_id()
        self.moments: list[Any] = []
        """What was noted at the beginning and at the end."""
        self.stopped = 0.0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.measure()
        except Exception as error:
            self.error = error
        self.stopped = time.monotonic()
        self.stop.reason = self.stop.reason or MEASURED

    def measure(self) -> None:
        """Wait for all workers, and note what there is, twice."""
        raise NotImplementedError


def run_watched(watch: Watch, session: Session, run: Callable[[], Mapping[str, Any]]) -> float:
    """Call `run`, which runs the session to its end, while `watch` measures it; returns when it ended, by
    time.monotonic.

    Raises:
        ValueError: a process failed.
        KeyboardInterrupt: the run was interrupted.
    """
    watch.start()
    summary, stop = run(), watch.stop
    ended = time.monotonic()
    stop.reason = stop.reason or MEASURED  # a run that has failed leaves nothing to watch
    watch.join()
    session.arena.close()
    if stop.reason != MEASURED:
        raise KeyboardInterrupt
    if watch.error is not None or len(watch.moments) < 2:
        raise ValueError(f"the simulated run failed: {watch.error or summary['exit_reason']}")
    return ended


class _Watch(Watch):
    """Measures until there were enough seconds and decisions."""

    def __init__(
        self, supervisor: Supervisor, stop: StopRequest, warm_s: float, seconds: float, decisions: int
    ) -> None:
        super().__init__(stop, warm_s, seconds)
        self.supervisor, self.decisions = supervisor, decisions
        self.begun = time.monotonic()
        self.start_s = self.memory = 0.0
        self.pids: dict[str, list[int]] = {}

    def measure(self) -> None:
        counters = self.supervisor.counters
        while counters.actor_decisions.min() == 0:
            if self.stop.reason or time.monotonic() - self.begun > START_LIMIT_S:
                return
            time.sleep(0.01)
        self.start_s = time.monotonic() - self.begun
        time.sleep(self.warm_s)
        self.pids = self.supervisor.pids()
        self._note()
        target = counters.decisions() + self.decisions
        until = time.monotonic() + self.seconds
        while time.monotonic() < until or counters.decisions() < target:
            if self.stop.reason:
                return
            time.sleep(min(0.1, max(0.001, until - time.monotonic())))
        self._note()
        workers = self.pids["actor"][:MEMORY_WORKERS]
        self.memory = float(np.mean([psutil.Process(pid).memory_full_info().uss for pid in workers]))

    def _note(self) -> None:
        self.moments.append(
            (
                time.monotonic(),
                self.supervisor.counters.snapshot(),
                thread_usage(os.getpid(), self.main_thread),
                usage(self.pids["inference"]),
                usage(self.pids["actor"]),
            )
        )


@contextmanager
def run_directory(config: Config) -> Iterator[tuple[Path, StopRequest]]:
    """A directory with what processes of a run expect there, and how it is stopped."""
    handlers = {number: signal.getsignal(number) for number in (*SIGNALS, *WARNINGS)}
    try:
        with tempfile.TemporaryDirectory(prefix="dsrl_async-") as directory:
            run_dir = Path(directory)
            (run_dir / "logs").mkdir()
            write_text(run_dir / "config.yaml", to_yaml(config))
            yield run_dir, StopRequest()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def measure(simulation: Simulation, warm_s: float, seconds: float, decisions: int = 0) -> Measurement:
    """Start the processes, measure for at least `seconds` and `decisions`, and end them.

    Raises:
        ValueError: a process failed.
        KeyboardInterrupt: the run was interrupted.
    """
    raise_descriptor_limit()
    config = run_config(simulation)
    with run_directory(config) as (run_dir, stop):
        session = Session(replace(check_run(config), spec=SPEC), run_dir, stop, NoDisplay())
        session.counters.learner_updates[0] = FAR_AHEAD
        programs = programs_of(simulation, SPEC.image_size)
        supervisor = Supervisor(session, programs)
        watch = _Watch(supervisor, stop, warm_s, seconds, decisions)
        ended = run_watched(watch, session, supervisor.run)
        (begin, before, *usages), (end, after, *later) = watch.moments
        records = np.load(run_dir / RECORDS) if simulation.record else np.empty((0, 3), np.int64)
    answered_s = records[:, 2] * 1e-9
    requested, started, answered = records[(answered_s >= begin) & (answered_s < end)].T * 1e-9
    change = {name: after[name] - before[name] for name in after}
    supervising, serving, acting = (now.since(then) for now, then in zip(later, usages, strict=True))
    return Measurement(
        seconds=end - begin,
        decisions=int(change["actor_decisions"].sum()),
        batches=int(change["inference_batches"][0]),
        rows=int(change["inference_rows"][0]),
        padded_rows=int(change["inference_padded_rows"][0]),
        phase_s=dict(zip(INFERENCE_PHASES, change["inference_phase_s"].tolist(), strict=True)),
        queue_wait_s=started - requested,
        latency_s=answered - requested,
        supervisor=supervising,
        inference=serving,
        workers=acting,
        start_s=watch.start_s,
        stop_s=ended - watch.stopped,
        worker_memory=watch.memory,
        killed=sum(child.popen is None or child.popen.returncode != 0 for child in supervisor.children),
        left_over=sum(psutil.pid_exists(pid) for of_kind in watch.pids.values() for pid in of_kind),
    )
