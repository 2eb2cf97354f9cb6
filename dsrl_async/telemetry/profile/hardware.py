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

KINDS = ("GPU-", "MIG-")
"""How the UUIDs of GPUs and of their parts begin."""


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
    utilization: float | None
    """Share of time in which a kernel ran: over the last moments when read, over the whole stretch in a report. None
    where there is no telling, as for a part of a GPU (MIG)."""
    memory_used: int
    """Bytes that all programs use; 0 where there is no telling, as is `memory_total`."""
    memory_total: int


class Gpus:
    """The NVIDIA GPUs that CUDA programs of this process see, in their order; none without the driver or without
    `nvidia-ml-py` (extra `cuda`).

    This has not run on a GPU yet.
    """

    def __init__(self) -> None:
        self._library: Any = None
        self._devices: list[tuple[Any, str]] = []  # handles and names
        with contextlib.suppress(Exception):  # not installed, no driver or no permission: the run goes on without
            import pynvml

            pynvml.nvmlInit()
            self._devices = [(handle, _text(pynvml.nvmlDeviceGetName(handle))) for handle in visible_devices(pynvml)]
            self._library = pynvml

    def read(self) -> list[Gpu]:
        return [Gpu(name, self._utilization(handle), *self._memory(handle)) for handle, name in self._devices]

    # What a device does not support, or a lost one does not answer, must not cost the other figure.

    def _utilization(self, handle: Any) -> float | None:
        try:
            return int(self._library.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
        except self._library.NVMLError:
            return None

    def _memory(self, handle: Any) -> tuple[int, int]:
        try:
            memory = self._library.nvmlDeviceGetMemoryInfo(handle)
        except self._library.NVMLError:
            return 0, 0
        return int(memory.used), int(memory.total)


def visible_devices(library: Any) -> list[Any]:
    """Handles of the devices that `CUDA_VISIBLE_DEVICES` names, in its order; NVML itself knows nothing of it.

    It lists numbers, or beginnings of the UUIDs `GPU-...` of GPUs and `MIG-...` of their parts; without it there are
    all GPUs. As in CUDA, an entry that names none, or several, ends the list, and one that comes twice voids it. NVML
    numbers GPUs by their place on the bus; CUDA does so with `CUDA_DEVICE_ORDER=PCI_BUS_ID`, and by default puts the
    fastest first, where they differ.
    """
    gpus = [library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return gpus
    entries = [entry.strip() for entry in chosen.split(",")]
    devices, names = gpus, [str(index) for index in range(len(gpus))]
    if entries[0].startswith(KINDS):
        devices = [*gpus, *(part for gpu in gpus for part in _parts(library, gpu))]
        names = [_text(library.nvmlDeviceGetUUID(device)) for device in devices]
    positions: list[int] = []
    for entry in entries:
        begins = entry.startswith(KINDS)
        found = [i for i, name in enumerate(names) if name == entry or (begins and name.startswith(entry))]
        if len(found) != 1:
            break
        if found[0] in positions:
            return []
        positions += found
    return [devices[position] for position in positions]


def _parts(library: Any, gpu: Any) -> Iterator[Any]:
    """Handles of the parts that a GPU is divided into (MIG)."""
    try:
        count = library.nvmlDeviceGetMaxMigDeviceCount(gpu)
    except library.NVMLError:  # it cannot be divided
        return
    for index in range(count):
        with contextlib.suppress(library.NVMLError):  # there are fewer
            yield library.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index)


def _text(value: str | bytes) -> str:
    """Older versions of the library answer with bytes."""
    return value.decode() if isinstance(value, bytes) else value
