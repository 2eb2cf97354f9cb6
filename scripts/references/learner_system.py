"""What both processes of compare_learner.py share: they answer requests to make updates with how long they took."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from dsrl_async.bench.conversation import answer_on_stdout

Updating = Callable[[], Callable[[], float]]
"""Makes one update to its end; what it returns gives the critic's loss from before it."""


def bind(threads: int) -> None:
    """Leave this process the first `threads` of its cores; JAX has no setting for its number of threads."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def serve(load: Callable[[dict[str, Any]], Updating]) -> None:
    """Answer requests `{"updates": n}` until stdin ends, with times in milliseconds and the critic's losses."""
    answer = answer_on_stdout()
    update = load(json.loads(sys.argv[1]))
    answer(ready=True)
    for line in sys.stdin:
        times, cpu_times, losses = [], [], []
        for _ in range(json.loads(line)["updates"]):
            cpu, begin = time.process_time(), time.perf_counter()
            loss = update()
            times.append(1e3 * (time.perf_counter() - begin))
            cpu_times.append(1e3 * (time.process_time() - cpu))
            losses.append(loss())
        answer(times=times, cpu_times=cpu_times, losses=losses)
