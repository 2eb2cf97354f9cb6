"""CPU and memory of the run's processes by kind. Measuring takes at most 1 % of a core."""

from __future__ import annotations

import time
from collections import defaultdict

import psutil

MEMORY_INTERVAL_S = 10.0
MEMORY_WORKERS = 8  # environment workers are alike: the mean of a few stands for all
MEASURING_SHARE = 0.01  # upper limit on the share of time spent on measuring


def kind_of(name: str) -> str:
    """The kind of a process: `actor` for `actor-007`, otherwise the name itself."""
    return name.partition("-")[0]


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
        self._handles: dict[str, psutil.Process] = {}
        self._next_cpu = self._next_memory = self._memory_rested = float("-inf")

    def measure(self, pids: dict[str, int], now: float) -> None:
        """Measure the processes name -> pid, as far as that is due at time `now` (seconds)."""
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

    def _open(self, pids: dict[str, int]) -> None:
        handles = {}
        self.processes = defaultdict(int)
        for name, pid in pids.items():
            self.processes[kind_of(name)] += 1
            handle = self._handles.get(name)
            try:
                handles[name] = handle if handle is not None and handle.pid == pid else psutil.Process(pid)
            except psutil.Error:
                continue
        self._handles = handles

    def _measure_cpu(self) -> None:
        self.cpu_percent = dict.fromkeys(self.processes, 0.0)
        for name, handle in self._handles.items():
            try:
                self.cpu_percent[kind_of(name)] += handle.cpu_percent()
            except psutil.Error:
                continue

    def _measure_memory(self) -> None:
        uss: defaultdict[str, list[float]] = defaultdict(list)
        for name, handle in self._handles.items():
            kind = kind_of(name)
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
