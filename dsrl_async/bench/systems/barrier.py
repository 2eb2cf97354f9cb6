"""The loop of an inference process in lock step, with one barrier per decision, as in vectorised environments."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dsrl_async.run.inference.server import InferenceServer, notifier
from dsrl_async.shm import events
from dsrl_async.shm.counters import Stop

IDLE_POLL_S = 1.0
REFUSED_POLL_S = 0.005  # when nothing may be answered because the run's last decision is being executed


def serve_in_lock_step(server: InferenceServer, job: dict[str, Any], learn: Callable[[], None] = lambda: None) -> None:
    """Until the run stops: when all lanes are ready, `learn`, answer all of them, and wake their workers together.

    Resets are inside the barrier, since a lane whose episode has ended resets before it is ready. `server` must wake
    nobody by itself.
    """
    counters, notify = server.counters, notifier(job["wake_fds"])
    while counters.stop < Stop.EVERYONE:
        counters.inference_heartbeat_ns[0] = time.monotonic_ns()
        ready = server.slots.ready()
        if len(ready) < server.config.actors:
            with server.phase("wait_request"):
                events.wait(job["observation_ready_fd"], IDLE_POLL_S)
            continue
        learn()
        answered = 0
        while count := server.serve_ready(ready[answered:]):
            answered += count
        notify(ready[:answered])
        if not answered:
            events.wait(job["observation_ready_fd"], REFUSED_POLL_S)
