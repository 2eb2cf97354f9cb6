"""What a run gets from the machine: cores, waits for a core, and GPUs as NVIDIA's management library sees them."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil

from dsrl_async.host.cpu_time import thread_usage
from dsrl_async.telemetry.usage import MEASURING_SHARE, Pids

logger = logging.getLogger(__name__)


@dataclass
class CpuTime:
    """Seconds, summed over the processes of one kind while they were watched."""

    watched: float = 0.0
    running: float = 0.0
    """Time of all threads on a core."""
    queued: float = 0.0
    """Time for which the main thread was ready to run and had no core; 0 where the kernel does not count it."""

    def plus(self, watched: float, running: float, queued: float) -> CpuTime:
        return CpuTime(self.watched + watched, self.running + running, self.queued + queued)

    def since(self, before: CpuTime) -> CpuTime:
        return self.plus(-before.watched, -before.running, -before.queued)


class CpuWatch:
    """Adds up the CPU time of processes by kind. Measuring takes at most 1 % of a core.

    Attributes:
        kinds: kind -> `CpuTime`. It only grows; a measurement replaces the objects, so old ones can be kept.
        cores: busy seconds of each core that this process may use, whoever used it.
        measured: time.monotonic of the last measurement.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, CpuTime] = {}
        self._allowed = sorted(os.sched_getaffinity(0))
        self.cores: tuple[float, ...] = tuple(_busy_seconds(self._allowed))
        self.measured = time.monotonic()
        self._last: dict[tuple[str, int], tuple[float, float, float]] = {}  # (kind, pid) -> when, running, queued
        self._due = float("-inf")
        self._counts_waits = True

    def measure(self, pids: Pids) -> None:
        """Take in the processes. New ones and those that have ended add nothing."""
        begin = time.monotonic()
        if begin < self._due:
            return
        kinds: defaultdict[str, CpuTime] = defaultdict(CpuTime, self.kinds)
        now_last = {}
        for kind, pid in ((kind, pid) for kind, of_kind in pids.items() for pid in of_kind):
            try:
                times = psutil.Process(pid).cpu_times()  # includes threads that have ended
                running, queued = times.user + times.system, self._queued_seconds(pid)
            except (psutil.Error, OSError):  # the process has ended
                continue
            now_last[kind, pid] = times_now = time.monotonic(), running, queued
            if (before := self._last.get((kind, pid))) is not None:
                kinds[kind] = kinds[kind].plus(*(now - then for now, then in zip(times_now, before, strict=True)))
        self.kinds, self._last = dict(kinds), now_last
        self.cores = tuple(_busy_seconds(self._allowed))
        self.measured = time.monotonic()
        self._due = begin + (self.measured - begin) / MEASURING_SHARE

    def _queued_seconds(self, pid: int) -> float:
        try:
            return thread_usage(pid, pid).waiting
        except ValueError as error:
            if self._counts_waits:
                logger.warning("waits for a core are not in the profile: %s", error)
            self._counts_waits = False
            return 0.0


def _busy_seconds(allowed: Iterable[int]) -> Iterator[float]:
    """Busy seconds of each of the cores `allowed`; 0 for a core that is not listed, as in some containers."""
    cores = psutil.cpu_times(percpu=True)
    for core in allowed:
        times = cores[core] if core < len(cores) else None
        yield sum(times) - times.idle - times.iowait - times.guest - times.guest_nice if times else 0.0


class Gpu(NamedTuple):
    name: str
    utilization: float
    """Share of time in which a kernel ran: over the last moments when read, over the whole stretch in a report."""
    memory_used: int
    """Bytes that all programs use."""
    memory_total: int


class Gpus:
    """The machine's NVIDIA GPUs; none without the driver or without `nvidia-ml-py` (extra `cuda`).

    A GPU that stops answering counts as idle. This has not run on a GPU yet.
    """

    def __init__(self) -> None:
        self._library: Any = None
        self._handles: list[tuple[Any, str]] = []  # handles and names
        with contextlib.suppress(Exception):  # not installed, no driver or no permission: the run goes on without
            import pynvml

            pynvml.nvmlInit()
            handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            self._handles = [(handle, str(pynvml.nvmlDeviceGetName(handle))) for handle in handles]
            self._library = pynvml

    def read(self) -> list[Gpu]:
        library, gpus = self._library, []
        for handle, name in self._handles:
            try:
                memory = library.nvmlDeviceGetMemoryInfo(handle)
                busy = library.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                gpus.append(Gpu(name, busy, int(memory.used), int(memory.total)))
            except library.NVMLError:
                gpus.append(Gpu(name, 0.0, 0, 0))
        return gpus
