"""CPU and memory of the run's processes by kind. Measuring takes at most 1 % of a core."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import psutil

MEMORY_INTERVAL_S = 10.0
MEMORY_WORKERS = 8  # environment workers are alike: the mean of a few stands for all
MEASURING_SHARE = 0.01  # upper limit on the share of time spent on measuring


Pids = Mapping[str, Sequence[int]]
"""Kind of process (supervisor, inference, learner, template, actor) -> the process numbers of all of that kind."""


def template_bytes(template: psutil.Process) -> int:
    """The template's own memory and what it shares with its workers, without files and the run's shared memory."""
    memory = template.memory_info()
    return int(memory.rss - memory.shared)


class ProcessUsage:
    """What the run's processes use. A process that has ended counts as using nothing.

    Attributes:
        cpu_percent: kind -> percent of one core since the previous measurement, summed over its processes.
        memory_mb: kind -> mean private memory (USS, 10^6 bytes) of its processes when last seen alive. Shared memory,
            such as the replay ring and library code, is not counted, except that the template's figure includes what
            it shares with the workers forked from it.
        processes: kind -> number of processes.
    """

    def __init__(self) -> None:
        self.cpu_percent: dict[str, float] = {}
        self.memory_mb: dict[str, float] = {}
        self.processes: dict[str, int] = {}
        self._handles: dict[tuple[str, int], psutil.Process] = {}  # (kind, pid) -> handle
        self._next_cpu = self._next_memory = self._memory_rested = float("-inf")

    def measure(self, pids: Pids, now: float) -> None:
        """Measure the processes, as far as that is due at time `now` (seconds)."""
        if now >= self._next_cpu:
            start = time.perf_counter()
            self._open(pids)
            self._measure_cpu()
            self._next_cpu = now + (time.perf_counter() - start) / MEASURING_SHARE
        unknown = self.processes.keys() - self.memory_mb.keys()  # workers start after the others
        if now >= self._next_memory or (unknown and now >= self._memory_rested):
            start = time.perf_counter()
            self._measure_memory()
            self._memory_rested = now + (time.perf_counter() - start) / MEASURING_SHARE
            self._next_memory = max(now + MEMORY_INTERVAL_S, self._memory_rested)

    def _open(self, pids: Pids) -> None:
        self.processes = {kind: len(of_kind) for kind, of_kind in pids.items()}
        handles = {}
        for key in ((kind, pid) for kind, of_kind in pids.items() for pid in of_kind):
            with contextlib.suppress(psutil.Error):
                handles[key] = self._handles.get(key) or psutil.Process(key[1])
        self._handles = handles

    def _measure_cpu(self) -> None:
        self.cpu_percent = dict.fromkeys(self.processes, 0.0)
        for (kind, _), handle in self._handles.items():
            with contextlib.suppress(psutil.Error):
                self.cpu_percent[kind] += handle.cpu_percent()

    def _measure_memory(self) -> None:
        uss: defaultdict[str, list[float]] = defaultdict(list)
        for (kind, _), handle in self._handles.items():
            if len(uss[kind]) == MEMORY_WORKERS:
                continue
            try:
                if kind == "template":
                    uss[kind].append(template_bytes(handle) / 1e6)
                else:
                    uss[kind].append(handle.memory_full_info().uss / 1e6)
            except psutil.Error:
                continue
        alive = {kind: [value for value in values if value > 0] for kind, values in uss.items()}  # not zombies
        self.memory_mb |= {kind: sum(values) / len(values) for kind, values in alive.items() if values}
