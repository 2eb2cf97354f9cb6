"""Times what the device does while the host only enqueues it: with CUDA events on a GPU, the host's clock on the CPU.

**The events have not run on a GPU yet.**
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

import numpy as np
import torch

from dsrl_async.shm.arena import Arena
from dsrl_async.shm.spans import STAGES, Spans, TracedPhases, profiled

Stage = Callable[[str], AbstractContextManager[None]]
"""`with stage("denoise"): ...` adds to the time of a stage, one of `STAGES["inference"]` or `STAGES["learner"]`."""

HOST_STAGES = ("prefix", "denoise")
"""Stages that are timed on the CPU, which has no transfers, and where the learner's stage is its phase."""
ANCHOR_INTERVAL_S = 10.0
"""How often the device's clock is compared with the host's, which has to wait for the device. In between, an event's
distance in float32 milliseconds is exact to about a microsecond."""

_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


def no_stage(name: str) -> AbstractContextManager[None]:
    """Time nothing."""
    return _NOTHING


def ranges_of(device: torch.device) -> ModuleType | None:
    """The module that marks NVTX ranges, if NVIDIA's profilers could see them."""
    return torch.cuda.nvtx if device.type == "cuda" else None


def stages_of(arena: Arena, kind: str, device: torch.device) -> Stage:
    """What times the stages of the inference process or of the learner, in the stream that does the work; without
    `profile` it is `no_stage`."""
    if not profiled(arena):
        return no_stage
    names, sums, spans = STAGES[kind], arena[f"stage/{kind}_s"], Spans(arena, f"{kind}_stage")
    arena[f"stage/{kind}_on_gpu"][0] = device.type == "cuda"
    if device.type == "cuda":
        return DeviceStages(names, sums, spans, lambda: torch.cuda.Event(enable_timing=True))
    phases = TracedPhases(names, sums, spans)
    return lambda name: phases(name) if name in HOST_STAGES else _NOTHING


class DeviceStages:
    """Times stages by two events each in the device's stream.

    Only an anchor waits for the device now and then. The time of a stage is read when its events have happened and a
    later stage begins.
    """

    def __init__(
        self, names: tuple[str, ...], sums: np.ndarray, spans: Spans, make_event: Callable[[], torch.cuda.Event]
    ) -> None:
        self._names, self._sums, self._spans, self._make_event = names, sums, spans, make_event
        self._pending: deque[tuple[int, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._anchor: torch.cuda.Event | None = None
        self._anchor_ns = 0

    @contextlib.contextmanager
    def __call__(self, name: str):  # type: ignore[no-untyped-def]
        self._collect()
        begin, end = self._make_event(), self._make_event()
        begin.record()
        yield
        end.record()
        self._pending.append((self._names.index(name), begin, end))

    def _collect(self) -> None:
        """Read the times of the stages that have ended."""
        if self._anchor is None:
            self._set_anchor()
        while self._pending and self._pending[0][2].query():
            name, begin, end = self._pending.popleft()
            assert self._anchor is not None
            start_ns = self._anchor_ns + round(1e6 * self._anchor.elapsed_time(begin))
            end_ns = start_ns + round(1e6 * begin.elapsed_time(end))
            self._sums[name] += (end_ns - start_ns) * 1e-9
            self._spans.add(name, start_ns, end_ns)
        if time.monotonic_ns() - self._anchor_ns > ANCHOR_INTERVAL_S * 1e9 and not self._pending:
            self._set_anchor()

    def _set_anchor(self) -> None:
        event = self._make_event()
        event.record()
        event.synchronize()
        self._anchor, self._anchor_ns = event, time.monotonic_ns()
