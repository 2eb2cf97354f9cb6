"""What every process counts and times, in shared memory: a few stores per decision, read by the supervisor.

All counters only grow. Each element has one writer. An actor here is an environment, with its lane; where a process has
several, its heartbeat and its waits are noted in the first one's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np

from dsrl_async.shm.arena import Arena, Fields

ACTOR_PHASES = ("physics", "render", "reset", "replay_write", "wait_action")
INFERENCE_PHASES = ("wait_request", "wait_batch", "wait_learner", "gather", "compute", "scatter", "weights")
LEARNER_PHASES = ("wait_data", "wait_ratio", "sample", "update", "publish", "checkpoint")
EPISODE_LOG = 64  # finished episodes kept per actor until the supervisor has read them
LEARNER_METRICS = 16  # room for the metrics of the last update


def counter_fields(actors: int) -> Fields:
    per_actor, scalar = (actors,), (1,)
    return {
        "control/stop": (scalar, "int64"),  # 1: actors finish, 2: everyone
        "control/wall_s": (scalar, "float64"),  # of this run so far, over all resumes
        "template/heartbeat_ns": (scalar, "int64"),
        "template/prepared": (scalar, "int64"),  # the incarnation that is ready to fork actors
        "actor/decisions": (per_actor, "int64"),
        "actor/env_steps": (per_actor, "int64"),
        "actor/episodes": (per_actor, "int64"),
        "actor/started_episodes": (per_actor, "int64"),
        "actor/successes": (per_actor, "int64"),
        "actor/policy_lag": (per_actor, "int64"),  # sum over decisions, in gradient updates
        "actor/heartbeat_ns": (per_actor, "int64"),
        "actor/phase_s": ((actors, len(ACTOR_PHASES)), "float64"),
        "actor/episode_return": ((actors, EPISODE_LOG), "float64"),
        "actor/episode_len": ((actors, EPISODE_LOG), "int64"),
        "actor/episode_success": ((actors, EPISODE_LOG), "int64"),
        "inference/batches": (scalar, "int64"),
        "inference/rows": (scalar, "int64"),  # observations answered
        "inference/padded_rows": (scalar, "int64"),  # sum of bucket sizes
        "inference/queue_wait_s": (scalar, "float64"),  # sum over observations, request to gather
        "inference/policy_version": (scalar, "int64"),
        "inference/heartbeat_ns": (scalar, "int64"),
        "inference/phase_s": ((len(INFERENCE_PHASES),), "float64"),
        "learner/updates": (scalar, "int64"),
        "learner/replay_size": (scalar, "int64"),
        "learner/failed_checkpoints": (scalar, "int64"),
        "learner/lost_updates": (scalar, "int64"),  # done by a learner that died, and not in the agent any more
        "learner/heartbeat_ns": (scalar, "int64"),
        "learner/phase_s": ((len(LEARNER_PHASES),), "float64"),
        "learner/metrics": ((LEARNER_METRICS,), "float32"),  # in the order of sac.METRIC_NAMES
        "learner/metrics_update": (scalar, "int64"),  # the update they belong to, 0: none yet
    }


class Counters(SimpleNamespace):
    """Attribute access to the counters: `counters.actor_decisions[lane] += 1`, `counters.learner_updates[0]`."""

    def __init__(self, arena: Arena) -> None:
        names = counter_fields(1)
        super().__init__(**{name.replace("/", "_"): arena[name] for name in names})

    def decisions(self) -> int:
        return int(self.actor_decisions.sum())

    def snapshot(self) -> dict[str, np.ndarray]:
        """A private copy of everything, name -> array."""
        return {name: array.copy() for name, array in vars(self).items()}


class Phases:
    """Adds wall time to a row of phase sums: `with phases("render"): ...` (seconds)."""

    def __init__(self, names: tuple[str, ...], sums: np.ndarray) -> None:
        self._phases: Mapping[str, Phase] = {name: Phase(sums, index) for index, name in enumerate(names)}

    def __call__(self, name: str) -> Phase:
        return self._phases[name]


class Phase:
    """One phase. Not a generator, as `contextmanager` makes them, because actors enter five for every decision."""

    __slots__ = ("_index", "_start", "_sums")

    def __init__(self, sums: np.ndarray, index: int) -> None:
        self._sums, self._index, self._start = sums, index, 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._sums[self._index] += time.perf_counter() - self._start
