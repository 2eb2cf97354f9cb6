"""What a run with `profile` has in shared memory beside the counters: device times, and each process's last spans.

A span is one passage through a phase or a stage. Every track is a ring with one writer that never waits: the newest
spans of all processes are there to be read at any time, also those of a process that has died.
"""

from __future__ import annotations

import time
from types import ModuleType

import numpy as np

from dsrl_async.shm import order
from dsrl_async.shm.arena import Arena, Fields
from dsrl_async.shm.counters import ACTOR_PHASES, INFERENCE_PHASES, LEARNER_PHASES, Phase, Phases

STAGES = {"inference": ("host_to_device", "prefix", "denoise", "device_to_host"), "learner": ("update",)}
"""Stages are timed by the device's clock, phases by the host's: on CUDA the host has gone on by then."""
TRACKS = {
    "actor": ACTOR_PHASES,
    "inference": INFERENCE_PHASES,
    "inference_stage": STAGES["inference"],
    "learner": LEARNER_PHASES,
    "learner_stage": STAGES["learner"],
}
"""Track -> names of its spans; every lane has an `actor` track, the other processes have one of each of theirs."""
STEPS = {
    "actor": "actor/decisions",
    "inference": "inference/batches",
    "inference_stage": "inference/batches",
    "learner": "learner/updates",
    "learner_stage": "learner/updates",
}
"""Track -> the counter that numbers the steps of its process."""
ACTOR_SPANS, MODEL_SPANS = 1024, 4096
"""Spans that are kept of a lane, about 200 decisions, and of each track of the other processes."""


def span_fields(lanes: int) -> Fields:
    fields: Fields = {}
    for track in TRACKS:
        rings, length = (lanes, ACTOR_SPANS) if track == "actor" else (1, MODEL_SPANS)
        fields[f"span/{track}"] = ((rings, length, 4), "int64")  # index of the name, start ns, end ns, step
        fields[f"span/{track}_count"] = ((rings,), "int64")
    for kind, stages in STAGES.items():
        fields[f"stage/{kind}_s"] = ((len(stages),), "float64")
        fields[f"stage/{kind}_on_gpu"] = ((1,), "int64")
    return fields


def profiled(arena: Arena) -> bool:
    return "span/actor" in arena.fields


class Spans:
    """Writes one track; times are those of `time.monotonic_ns`, which all processes share."""

    def __init__(self, arena: Arena, track: str, ring: int = 0) -> None:
        self._rows = arena[f"span/{track}"][ring]
        self._count = arena[f"span/{track}_count"][ring : ring + 1]
        self._steps = arena[STEPS[track]][ring : ring + 1]

    def add(self, name: int, start_ns: int, end_ns: int) -> None:
        """Note a span of the step that is being done."""
        count = int(self._count[0])
        order.barrier()  # who sees something of a span that overwrites an older one also sees the count before it
        self._rows[count % len(self._rows)] = name, start_ns, end_ns, self._steps[0]
        order.barrier()
        self._count[0] = count + 1


def newest_spans(arena: Arena, track: str, ring: int = 0) -> np.ndarray:
    """int64 [n, 4], oldest first: index of the name, start and end in ns, step. Whole ones only."""
    rows, count = arena[f"span/{track}"][ring], arena[f"span/{track}_count"]
    before = int(count[ring])
    order.barrier()
    copy = rows.copy()
    order.barrier()
    overwritten = int(count[ring]) + 1 - len(rows)  # the writer may be half through the one after its count
    return copy[np.arange(max(0, overwritten), before) % len(rows)]


def phases_of(arena: Arena, kind: str, lane: int = 0, ranges: ModuleType | None = None) -> Phases:
    """The phases of a process; with `profile` also its spans, and, given `torch.cuda.nvtx`, NVTX ranges."""
    sums = arena[f"{kind}/phase_s"]
    sums = sums[lane] if kind == "actor" else sums
    if not profiled(arena):
        return Phases(TRACKS[kind], sums)
    return TracedPhases(TRACKS[kind], sums, Spans(arena, kind, lane), ranges)


class TracedPhases(Phases):
    """Phases whose passages are noted as spans."""

    def __init__(
        self, names: tuple[str, ...], sums: np.ndarray, spans: Spans, ranges: ModuleType | None = None
    ) -> None:
        self._phases = {name: _TracedPhase(name, sums, index, spans, ranges) for index, name in enumerate(names)}


class _TracedPhase(Phase):
    __slots__ = ("_name", "_ranges", "_spans", "_start_ns")

    def __init__(self, name: str, sums: np.ndarray, index: int, spans: Spans, ranges: ModuleType | None) -> None:
        super().__init__(sums, index)
        self._name, self._spans, self._ranges, self._start_ns = name, spans, ranges, 0

    def __enter__(self) -> None:
        if self._ranges is not None:
            self._ranges.range_push(self._name)
        self._start_ns = time.monotonic_ns()

    def __exit__(self, *error: object) -> None:
        end_ns = time.monotonic_ns()
        self._sums[self._index] += (end_ns - self._start_ns) * 1e-9
        self._spans.add(self._index, self._start_ns, end_ns)
        if self._ranges is not None:
            self._ranges.range_pop()
