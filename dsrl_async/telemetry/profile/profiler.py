"""`--profile`: follows a run in the launched process and writes the bottleneck report and the trace.

It reads what the processes note in shared memory (`shm.counters`, `shm.spans`) and what the kernel and NVIDIA's library
know about them, and writes `report.txt`, `report.json`, `report.png` and `trace.json` to `run_dir/profile`. TensorBoard
gets values with every tick.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsrl_async.config.files import how_to_install
from dsrl_async.config.settings import Config
from dsrl_async.host.machine import available_cpus
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Uploads
from dsrl_async.shm.spans import STAGES
from dsrl_async.telemetry.monitor import RATE_WINDOW_S, Snapshot, activity, ratio, totals
from dsrl_async.telemetry.profile import report
from dsrl_async.telemetry.profile.bottleneck import (
    ALL_SETTINGS,
    SERIAL,
    Diagnosis,
    ProcessProfile,
    RunProfile,
    diagnose,
)
from dsrl_async.telemetry.profile.hardware import CpuTime, CpuWatch, Gpu, Gpus
from dsrl_async.telemetry.profile.trace import LONGEST_S, chrome_trace
from dsrl_async.telemetry.usage import Pids

logger = logging.getLogger(__name__)


class Moment(NamedTuple):
    """The quantities that only grow, at one time, and what the GPUs are doing then."""

    time: float
    """time.monotonic"""
    totals: Snapshot
    """See `monitor.totals`."""
    stages: dict[str, np.ndarray]
    """inference, learner -> seconds by stage."""
    cpu: dict[str, CpuTime]
    cores: tuple[float, ...]
    cpu_time: float
    """When `cpu` and `cores` were measured."""
    gpus: tuple[Gpu, ...]
    gpu_busy_s: tuple[float, ...]
    """Each GPU's utilisation times the length of the tick, summed over the ticks."""


class Profiler:
    """Call `tick` about once a second, and `write` at the end and whenever a report is wanted."""

    def __init__(
        self, config: Config, run_dir: Path, arena: Arena, start: Snapshot, policy_settings: Set[str] = ALL_SETTINGS
    ) -> None:
        self.config, self.directory, self._policy_settings = config, run_dir / "profile", policy_settings
        self._arena = arena
        self._start = start
        self._cpu, self._gpus, self._cpus = CpuWatch(), Gpus(), available_cpus()
        self._progress = 0
        self._base = self._now = self._moment(start, None)
        self._recent = deque([self._base])
        self._samples: deque[tuple[int, str, dict[str, float]]] = deque()
        self._memory_mb: dict[str, float] = {}

    def tick(self, counters: Snapshot, pids: Pids) -> dict[str, float]:
        """Take in a snapshot of the counters and the processes. Returns values for TensorBoard."""
        self._cpu.measure({SERIAL: pids["supervisor"]} if self.config.serial else pids)
        self._now = self._moment(counters, self._now)
        if (progress := self._progress_of(counters)) > self._progress:  # earlier seconds would blur the picture
            self._progress, self._base = progress, self._now
        self._recent.append(self._now)
        while self._recent[1].time <= self._now.time - RATE_WINDOW_S and len(self._recent) > 2:
            self._recent.popleft()
        profile = self.profile(self._recent[0])
        self._sample(profile)
        return report.scalars(profile)

    def _moment(self, counters: Snapshot, before: Moment | None) -> Moment:
        now, gpus, cpu = time.monotonic(), tuple(self._gpus.read()), self._cpu
        stages = {kind: self._arena[f"stage/{kind}_s"].copy() for kind in STAGES}
        gpu_busy_s = (0.0,) * len(gpus)
        if before is not None:
            lasted = now - before.time
            gpu_busy_s = tuple(
                busy + (gpu.utilization or 0.0) * lasted for busy, gpu in zip(before.gpu_busy_s, gpus, strict=True)
            )
        return Moment(now, totals(counters), stages, cpu.kinds, cpu.cores, cpu.measured, gpus, gpu_busy_s)

    def _progress_of(self, counters: Snapshot) -> int:
        """0 while the run starts, 1 once every environment has had a decision, 2 once the learner has learned too."""
        if np.any(counters["actor_decisions"] == self._start["actor_decisions"]):
            return 0
        return 1 + int(counters["learner_updates"][0] > self._start["learner_updates"][0])

    def _sample(self, profile: RunProfile) -> None:
        now_ns = round(self._now.time * 1e9)
        cores = {kind: process.cores for kind, process in profile.system_processes.items()}
        self._samples.append((now_ns, "cores used", {**cores, "other programs": profile.cores_of_others}))
        for index, gpu in enumerate(profile.gpus):
            if gpu.utilization is not None:
                self._samples.append((now_ns, f"GPU {index} busy", {"share": gpu.utilization}))
        while self._samples[0][0] < now_ns - LONGEST_S * 1e9:
            self._samples.popleft()

    def profile(self, since: Moment) -> RunProfile:
        """The profile from `since` to the last tick."""
        now, config = self._now, self.config
        seconds, watched = now.time - since.time, now.cpu_time - since.cpu_time
        actors = 1 if config.serial else config.actors
        done = activity(since.totals, now.totals, seconds, actors, self.config.groups)
        on_gpu = {kind: bool(self._arena[f"stage/{kind}_on_gpu"][0]) for kind in STAGES}
        stages = {
            kind: {
                name: min(1.0, ratio(now.stages[kind][index] - since.stages[kind][index], seconds))
                for index, name in enumerate(names)
            }
            for kind, names in STAGES.items()
        }
        phases = {
            "actor": done.phases["actor"],
            "inference": with_stages(done.phases["inference"], stages["inference"], on_gpu["inference"]),
            "learner": with_update(done.phases["learner"], stages["learner"]),
        }
        processes = {}
        for kind in (*phases, SERIAL if config.serial else "supervisor"):
            cpu = now.cpu.get(kind, CpuTime()).since(since.cpu.get(kind, CpuTime()))
            processes[kind] = ProcessProfile(
                count=actors if kind == "actor" else 1,
                phases=phases.get(kind, {}),
                cores=max(0.0, ratio(cpu.running, watched)),
                queued=min(1.0, ratio(cpu.queued, cpu.watched)),
                memory_mb=self._memory_mb.get({"actor": "actor_mean", SERIAL: "supervisor"}.get(kind, kind), 0.0),
            )
        return RunProfile(
            seconds=seconds,
            warmed_up=self._progress == 2,
            decisions=int(now.totals["actor_decisions"] - since.totals["actor_decisions"]),
            env_steps=int(now.totals["actor_env_steps"] - since.totals["actor_env_steps"]),
            updates=int(now.totals["learner_updates"] - since.totals["learner_updates"]),
            batch_size=done.batch_size,
            batch_fill=done.batch_fill,
            queue_wait_ms=done.queue_wait_ms,
            processes=processes,
            core_shares=tuple(
                min(1.0, max(0.0, ratio(end - begin, watched)))
                for begin, end in zip(since.cores, now.cores, strict=True)
            ),
            cpus=self._cpus,
            on_gpu=on_gpu,
            gpus=tuple(
                gpu if gpu.utilization is None else gpu._replace(utilization=ratio(end - begin, seconds))
                for gpu, begin, end in zip(now.gpus, since.gpu_busy_s, now.gpu_busy_s, strict=True)
            ),
            uploads=Uploads(int(self._arena["inference/uploads"][0])).name.lower(),
        )

    def write(self, memory_mb: dict[str, float]) -> tuple[Diagnosis, tuple[bytes, int, int] | None]:
        """Write the report up to the last tick and the trace, and log the report.

        `memory_mb` is as in `monitor.View`. Returns the diagnosis and the picture (PNG, width, height), which is None
        without matplotlib. The run goes on if the files cannot be written.
        """
        self._memory_mb = memory_mb
        profile = self.profile(self._base)
        diagnosis = diagnose(profile, self.config, self._policy_settings)
        drawn = None
        words = report.text(profile, diagnosis)
        logger.info("profile:\n%s", words)
        try:
            self.directory.mkdir(exist_ok=True)
            (self.directory / "report.txt").write_text(words)
            (self.directory / "report.json").write_text(json.dumps(report.as_json(profile, diagnosis), indent=2) + "\n")
            trace = chrome_trace(self._arena, round(self._now.time * 1e9), self._samples)
            (self.directory / "trace.json").write_text(json.dumps(trace))
            drawn = report.picture(profile, diagnosis)
            (self.directory / "report.png").write_bytes(drawn[0])
        except OSError as error:
            logger.warning("the profile could not be written: %s", error)
        except ImportError:
            logger.info("no picture of the profile: it needs matplotlib (%s)", how_to_install("plot"))
        return diagnosis, drawn


def with_stages(phases: dict[str, float], stages: dict[str, float], on_gpu: bool) -> dict[str, float]:
    """The inference process's shares with the stages in place of `compute`.

    What remains of `compute` is the host's own part. On a GPU the copies to the device overlap with the host's
    gathering and end during `compute`, which waits for everything. On the CPU gathering is the copy.
    """
    rest = max(0.0, phases["compute"] - sum(share for name, share in stages.items() if name != "host_to_device"))
    if not on_gpu:
        stages = {name: stages[name] for name in ("prefix", "denoise")}
    merged: dict[str, float] = {}
    for name, share in phases.items():
        merged |= {**stages, "compute": rest} if name == "compute" else {name: share}
    return merged


def with_update(phases: dict[str, float], stages: dict[str, float]) -> dict[str, float]:
    """The learner's shares, with the device's time for updates where the host only enqueued them.

    The host waits for the device in `publish`, but that time belongs to the updates.
    """
    hidden = max(0.0, stages["update"] - phases["update"])
    return phases | {"update": phases["update"] + hidden, "publish": max(0.0, phases["publish"] - hidden)}
