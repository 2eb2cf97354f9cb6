"""A run without processes: counters that a test moves by hand, and the monitor that follows them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsrl_async.config.load import validate
from dsrl_async.shm.counters import EPISODE_LOG, Counters, counter_fields
from dsrl_async.telemetry.monitor import RunMonitor, View
from dsrl_async.telemetry.usage import Pids

METRIC_NAMES = (
    "train/sac/critic_loss",
    "train/critic/grad_norm",
    "train/sac/actor_loss",
    "train/actor/entropy",
    "train/actor/grad_norm",
    "train/sac/alpha_loss",
    "train/sac/alpha",
)


class FakeRun:
    """Counters that a test moves by hand, and the monitor that follows them on a clock that a test sets."""

    def __init__(self, run_dir: Path, actors: int = 2, resumed_wall_s: float = 0.0, **settings: Any) -> None:
        run_dir.mkdir(exist_ok=True)
        self.config = validate({"actors": actors, "replay": {"warmup_decisions": 400}, **settings})
        fields = counter_fields(actors, groups=settings.get("groups", 0)).items()
        self.counters = {name.replace("/", "_"): np.zeros(shape, dtype) for name, (shape, dtype) in fields}
        self.shared = cast(Counters, SimpleNamespace(**self.counters))
        self.now = self.begin = 100.0
        self.run_dir, self.resumed_wall_s = run_dir, resumed_wall_s
        self.texts: dict[str, str] = {}

    def start(self, unseen: bool = False) -> FakeRun:
        """Begin; the episodes that the counters have already count as seen, unless a checkpoint said which are not."""
        if not unseen:
            self.counters["control_episodes_seen"][:] = self.counters["actor_episodes"]
        self.monitor = RunMonitor(
            self.config,
            self.run_dir,
            self.snapshot(),
            METRIC_NAMES,
            self.resumed_wall_s,
            lambda: self.now,
            self.texts,
        )
        return self

    def snapshot(self) -> dict[str, np.ndarray]:
        return {name: array.copy() for name, array in self.counters.items()}

    def tick(self, seconds: float = 1.0, pids: Pids | None = None) -> View:
        self.now += seconds
        self.counters["control_wall_s"][0] = self.resumed_wall_s + self.now - self.begin
        view = self.monitor.tick(self.snapshot(), pids or {"supervisor": [os.getpid()]})
        self.monitor.keep(self.shared)
        return view

    def finish_episode(self, lane: int, episode_return: float, length: int, success: bool) -> None:
        counters, entry = self.counters, self.counters["actor_episodes"][lane] % EPISODE_LOG
        counters["actor_episode_return"][lane, entry] = episode_return
        counters["actor_episode_len"][lane, entry] = length
        counters["actor_episode_success"][lane, entry] = success
        counters["actor_episodes"][lane] += 1

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    def scalars(self) -> dict[str, list[tuple[int, float]]]:
        self.monitor.close()
        events = EventAccumulator(str(self.run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
