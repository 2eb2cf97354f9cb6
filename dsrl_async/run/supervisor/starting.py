"""What is waited for while processes start: what each says that it does, how long it has done so, and since when."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from dsrl_async.run.supervisor.child import Child, Kind
from dsrl_async.shm import order
from dsrl_async.shm.counters import Start
from dsrl_async.telemetry.monitor import Wait

DOING = {
    Kind.INFERENCE: ("importing PyTorch", "loading the policy", "compiling or capturing the policy"),
    Kind.LEARNER: ("importing PyTorch", "making the agent", "capturing the updates"),
    Kind.TEMPLATE: ("starting Python", "importing the environment", "making the environment, compiling its scene"),
    Kind.WORKER: ("starting", "making the environment", "first reset"),
    Kind.EVALUATION: ("starting", "making the environment", "first reset"),
}
"""What a kind of process does in the steps of its start, see `Start`."""
PLURALS = {Kind.WORKER: "workers", Kind.EVALUATION: "evaluation"}
WORTH_SAYING = 1 / 4
"""From this share of its patience on, the supervisor says when it will take a process for dead."""


def step_of(child: Child, said: np.ndarray) -> tuple[Start, float]:
    """What this incarnation does, by the `StartStep` that it wrote, and since when by time.monotonic."""
    step = Start(int(said[0]))
    order.barrier()
    since = int(said[1]) * 1e-9
    return (step, since) if since > child.started else (Start.BEGUN, child.started)


def wait_of(child: Child, said: np.ndarray, patience_s: float, tries: int, detail: str = "") -> Wait:
    """What is waited for while a process starts that is no worker.

    `patience_s` is how long it may be silent, and `tries` how often it may fail in a row.
    """
    step, since = step_of(child, said)
    doing, seconds = DOING[child.kind][step], time.monotonic() - since
    details = [detail, f"try {child.quick_failures + 1} of {tries}" if child.quick_failures else ""]
    details.append(patience(seconds, patience_s))
    return Wait(child.kind.value, doing, seconds, ", ".join(filter(None, details)))


def wait_of_workers(
    workers: Sequence[Child], coming: Sequence[Child], said: np.ndarray, begun: float, patience_s: float, tries: int
) -> Wait | None:
    """What is waited for while some of the workers of a kind are not ready; None if all are.

    `coming` are those that have a process and are not ready, and `begun` is since when there are none that could be.
    What is said is what the one does that has taken longest.
    """
    missing = [worker for worker in workers if worker.popen is None]
    if not missing and not coming:
        return None
    kind = workers[0].kind
    ready = f"{len(workers) - len(missing) - len(coming)} of {len(workers)} ready"
    failures = max(worker.quick_failures for worker in workers)
    details = [ready, f"try {failures + 1} of {tries}" if failures else ""]
    doing, since = "waiting for the template", begun
    if coming:
        first = min(coming, key=lambda worker: worker.started)
        step, since = step_of(first, said[first.number])
        doing = DOING[kind][step]
        details.append(patience(time.monotonic() - since, patience_s))
    return Wait(PLURALS[kind], doing, time.monotonic() - since, ", ".join(filter(None, details)))


def patience(seconds: float, patience_s: float) -> str:
    """How long a process may be silent before it is taken for dead, if that is worth saying."""
    return f"{patience_s:g} s are allowed" if seconds >= WORTH_SAYING * patience_s else ""
