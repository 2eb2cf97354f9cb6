"""Turns the shared counters into the loggers' curves, `metrics.jsonl`, the run's summary and a `View` to show.

The supervisor does this about once a second on a snapshot of the counters, so the hot path knows nothing of it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsrl_async.config.load import get_key, leaf_fields
from dsrl_async.config.settings import Config
from dsrl_async.host.files import open_to_append
from dsrl_async.shm.counters import (
    ACTOR_PHASES,
    HISTORY_POINTS,
    INFERENCE_PHASES,
    LEARNER_PHASES,
    SUCCESS_EPISODES,
    Counters,
    Graphs,
)
from dsrl_async.shm.episodes import FinishedEpisode, Snapshot, finished_episodes
from dsrl_async.telemetry.curves import last_step
from dsrl_async.telemetry.loggers import Facts, Logger, open_loggers
from dsrl_async.telemetry.usage import Pids, ProcessUsage

logger = logging.getLogger(__name__)

RATE_WINDOW_S = 10.0  # recent rates are means over this time, so that one slow chunk does not make them jump

PER_ACTOR = ("actor_decisions", "actor_env_steps", "actor_policy_lag", "actor_phase_s")
PER_PROCESS = (
    "inference_batches",
    "inference_rows",
    "inference_padded_rows",
    "inference_queue_wait_s",
    "inference_phase_s",
    "learner_updates",
    "learner_phase_s",
)


@dataclass(frozen=True)
class Activity:
    """What happened between two moments. A mean is 0 where there was nothing to average.

    `policy_lag` is in gradient updates, `batch_fill` is observations per padded row, and `queue_wait_ms` is the time
    from an observation's request to its gathering. `phases` gives each phase's share of wall time by kind of process,
    averaged over the environment workers; the rest up to 1 is spent outside any phase. A phase counts when it ends.
    """

    env_steps_per_s: float
    decisions_per_s: float
    updates_per_s: float
    policy_lag: float
    batch_size: float
    batch_fill: float
    queue_wait_ms: float
    phases: dict[str, dict[str, float]]


@dataclass(frozen=True)
class EvaluationView:
    """What is known of a run's evaluations at one tick; a figure is None before there is one."""

    episodes: int  # of each evaluation
    played: int | None  # of the one that is going on
    success_rate: float | None  # of the last one
    decisions: int | None  # at its beginning
    best_success_rate: float | None
    best_decisions: int | None


@dataclass(frozen=True)
class Wait:
    """What the run waits for while one process, or those of a kind, cannot work yet."""

    who: str
    doing: str
    """Changes with each step of a start."""
    seconds: float
    """How long it has done that."""
    detail: str = ""
    """Changes oftener, such as how many workers are ready."""

    def __str__(self) -> str:
        more = f", {self.detail}" if self.detail else ""
        return f"{self.who}: {self.doing}{more}, {self.seconds:.0f} s"


@dataclass(frozen=True)
class GroupView:
    """What is known of a group at one tick."""

    incarnation: int
    decisions: int
    """Of all incarnations, as far as their rows have arrived."""
    decisions_per_s: float
    waiting: float
    """Share of the time in which its inference process waits for the learner."""
    unstored: int
    """Rows that the learner's side has not stored yet, by the group's last report."""
    silent_s: float | None
    """How long nothing was heard of it; None before the first time."""
    where: str
    """In words; empty while it is not placed."""


@dataclass(frozen=True)
class View:
    """The state of the run at one tick. Counts and `wall_s` include a resumed run's earlier sessions."""

    wall_s: float
    remaining_s: float | None  # None if no limit is set or the pace is unknown
    progress: float | None  # share of the nearest limit, 0 to 1
    env_steps: int
    decisions: int
    updates: int
    episodes: int
    success_rate: float | None  # share of successes among the last `success_episodes`
    success_episodes: int
    success_history: tuple[float, ...]  # evenly spaced
    recent: Activity  # the last RATE_WINDOW_S
    overall: Activity  # this launch
    replay_ratio: float  # updates per decision after the warm-up, 0 before
    replay_size: int
    replay_utilization: float
    cpu_percent: dict[str, float]  # kind of process -> percent of one core
    memory_mb: dict[str, float]  # private, of supervisor, inference, learner, template, actor_mean; 0 if not running
    processes: dict[str, int]
    metrics: dict[str, float]  # the agent's latest; empty before the first update
    policies_ready: int  # batch sizes and prompt lengths that the policy is loaded for
    policies: int  # how many there are; 0 before that is known
    cuda_graphs: dict[str, str]  # policy or learner -> a name of `Graphs`, in lower case
    evaluation: EvaluationView | None = None  # None without evaluation
    waits: tuple[Wait, ...] = ()  # what starts; empty once all processes work
    groups: tuple[GroupView, ...] = ()  # empty in a run without
    warming_up: tuple[int, int] | None = None  # decisions of the warm-up so far, and how many it has; None after it


class RunMonitor:
    """Follows a run. Call `tick` about every `config.log.interval_s`, and once at the end before `summary`.

    It gives the run's loggers their curves (x axis: env steps), and writes `run_dir/metrics.jsonl` (a line per tick),
    both with recent rates. `env/*` are means over the episodes that finished since the previous tick.

    A resumed run goes on with both, and with the success rate, as if it had never stopped: it begins with the episodes
    that had not been seen when its checkpoint was written. What TensorBoard was given after that is hidden by an event
    that says from which step on the run began anew; `curves.take_back` has done the same to `metrics.jsonl`.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        start: Snapshot,
        metric_names: tuple[str, ...],
        resumed_wall_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """`start` is the snapshot at launch; `metric_names` name the elements of `learner_metrics`; `texts` are
        shown beside the curves, by their titles. Raises ConfigError if a logger cannot be had."""
        self.config, self.metric_names, self.resumed_wall_s = config, metric_names, resumed_wall_s
        self._clock = clock
        self._drawn_step = last_step(run_dir)  # where a resumed run's curves have their last points
        self._lines = os.fdopen(open_to_append(run_dir / "metrics.jsonl"), "a", buffering=1)
        self._start = totals(start)
        self._first_step = int(self._start["actor_env_steps"])
        self._episodes_seen = start["control_episodes_seen"].copy()
        # What was written at this very step is as it was, unless there were episodes after it.
        unseen = bool((start["actor_episodes"] > self._episodes_seen).any())
        settings = {key: get_key(config, key) for key, _ in leaf_fields()}
        facts = Facts(settings, dict(texts or {}), self._first_step + (not unseen))
        self._loggers: dict[str, Logger] = open_loggers(config, run_dir, facts)
        self._start_time = clock()  # behind what takes long: the session's own clock starts with it
        self._ticks = deque([(self._start_time, self._start)])
        self._metrics_update = int(start["learner_metrics_update"][0])
        self._metrics: dict[str, float] = {}
        outcomes = start["control_outcomes"]
        self._successes = deque((outcomes[outcomes > 0] - 1).tolist(), maxlen=SUCCESS_EPISODES)
        self._first = list(self._successes)  # the episodes that this launch begins with, or its first ones
        self._resumed = bool(self._first)
        self._history = History(start["control_history"], int(start["control_history_length"][0]))
        self._usage = ProcessUsage()
        self._episodes = 0  # that ended in this launch
        self._failed: set[str] = set()
        self.evaluation: EvaluationView | None = None
        """What the next views say of evaluations."""
        self.waits: tuple[Wait, ...] = ()
        """What the next views say of processes that start."""
        self.where: Mapping[int, str] = {}
        """Where each group is, in words."""
        self._workers = 1 if config.serial else config.actors  # processes that the environments' phases add up over
        self._view = self._make_view(start, self._start_time)

    def tick(self, snapshot: Snapshot, pids: Pids, more: Mapping[str, float] | None = None) -> View:
        """Take in a snapshot of the counters and the processes.

        `more` holds further values for TensorBoard.
        """
        now = self._clock()
        self._ticks.append((now, totals(snapshot)))
        while self._ticks[1][0] <= now - RATE_WINDOW_S and len(self._ticks) > 2:
            self._ticks.popleft()
        episodes = finished_episodes(snapshot, self._episodes_seen)
        self._episodes_seen = snapshot["actor_episodes"].copy()
        self._successes.extend(episode.success for episode in episodes)
        if not self._resumed:
            self._first += [episode.success for episode in episodes][: SUCCESS_EPISODES - len(self._first)]
        self._episodes += len(episodes)
        if self._successes:
            self._history.add(sum(self._successes) / len(self._successes))
        new_metrics = self._read_metrics(snapshot)
        self._usage.measure(pids, now)
        self._view = self._make_view(snapshot, now)
        self._write(scalars(self._view), episode_scalars(episodes) | new_metrics, dict(more or {}))
        return self._view

    def summary(self) -> dict[str, Any]:
        """The run's main figures as of the last tick, ready for JSON.

        `wall_s`, counts and `success_rate` (of the last `success_episodes` episodes, 100 at most) include earlier
        sessions of a resumed run. Rates, means and phases are of this launch; where there is nothing to average, means
        are 0 and the success rate is None.
        """
        view, overall = self._view, self._view.overall
        names = ("wall_s", "env_steps", "decisions", "updates", "episodes", "success_rate", "success_episodes")
        rates = ("env_steps_per_s", "decisions_per_s", "updates_per_s")
        figures = {name: getattr(view, name) for name in names} | {name: getattr(overall, name) for name in rates}
        return json_safe(
            figures
            | {
                "replay_ratio": view.replay_ratio,
                "policy_lag_mean": overall.policy_lag,
                "batch_size_mean": overall.batch_size,
                "batch_fill": overall.batch_fill,
                "phases": overall.phases,
                "memory_mb": view.memory_mb,
                "cuda_graphs": view.cuda_graphs,
            }
        )

    def began(self) -> str:
        """In words what the success rate was at the beginning of this launch; empty as long as that is the same."""
        first = self._first
        if not first or self._episodes < (1 if self._resumed else 2 * len(first)):
            return ""
        rate = f"{sum(first) / len(first):.1%}"
        return f", {rate} when it was resumed" if self._resumed else f", {rate} of the first {len(first)}"

    def keep(self, counters: Counters) -> None:
        """Write what a resumed run needs of the episodes to the counters, so that the next checkpoint has it."""
        outcomes = np.zeros(SUCCESS_EPISODES, np.int8)
        outcomes[: len(self._successes)] = np.array(self._successes, np.int8) + 1
        counters.control_outcomes[:] = outcomes
        counters.control_history[: len(self._history.points)] = self._history.points
        counters.control_history_length[0] = self._history.length
        counters.control_episodes_seen[:] = self._episodes_seen

    def draw_evaluation(self, values: Mapping[str, float], env_steps: int) -> None:
        """Add the point of an evaluation that began after so many environment steps."""
        self._log(lambda place: place.scalars(values, env_steps))

    def write_image(self, tag: str, file: bytes, width: int, height: int, env_steps: int | None = None) -> None:
        """Add a picture, the contents of a PNG file or animated GIF, to the loggers, by default at this moment."""
        step = self._view.env_steps if env_steps is None else env_steps
        self._log(lambda place: place.image(tag, file, width, height, step))

    def close(self) -> None:
        """Flush and close the files. A second call does nothing."""
        while self._loggers:
            _, place = self._loggers.popitem()
            with contextlib.suppress(OSError):
                place.close()
        with contextlib.suppress(OSError):
            self._lines.close()

    def _log(self, what: Callable[[Logger], None]) -> None:
        """Have every logger do something. What cannot be written is no reason to end the run: a disk may be full."""
        for name, place in self._loggers.items():
            try:
                what(place)
            except OSError as error:
                self._complain("TensorBoard data" if name == "tensorboard" else name, error)

    def _complain(self, what: str, error: OSError) -> None:
        if what not in self._failed:
            logger.warning("%s has gaps from here on: %s", what, error)
        self._failed.add(what)

    def _read_metrics(self, snapshot: Snapshot) -> dict[str, float]:
        """The agent's metrics if they are new, except those that its first updates do not compute."""
        update = int(snapshot["learner_metrics_update"][0])
        if update == self._metrics_update:
            return {}
        self._metrics_update = update
        pairs = zip(self.metric_names, snapshot["learner_metrics"].tolist(), strict=False)
        early = update <= self.config.sac.train_actor_steps  # later on, a NaN is news and is written
        self._metrics = {name: value for name, value in pairs if not (early and math.isnan(value))}
        return self._metrics

    def _make_view(self, snapshot: Snapshot, now: float) -> View:
        config, (then, before), totals = self.config, self._ticks[0], self._ticks[-1][1]
        recent = activity(before, totals, now - then, self._workers, config.groups)
        decisions, updates = int(totals["actor_decisions"]), int(totals["learner_updates"])
        learned = decisions - config.replay.warmup_decisions - int(snapshot["control_passed_decisions"][0])
        replay_size = int(snapshot["learner_replay_size"][0])
        remaining_s, progress = self._remaining(now - self._start_time, decisions, recent.decisions_per_s)
        memory = self._usage.memory_mb
        return View(
            wall_s=self.resumed_wall_s + now - self._start_time,
            remaining_s=remaining_s,
            progress=progress,
            env_steps=int(totals["actor_env_steps"]),
            decisions=decisions,
            updates=updates,
            episodes=int(snapshot["actor_episodes"].sum()),
            success_rate=sum(self._successes) / len(self._successes) if self._successes else None,
            success_episodes=len(self._successes),
            success_history=tuple(self._history.points),
            recent=recent,
            overall=activity(self._start, totals, now - self._start_time, self._workers, config.groups),
            replay_ratio=updates / learned if learned > 0 else 0.0,
            replay_size=replay_size,
            replay_utilization=replay_size / config.replay.capacity,
            cpu_percent=dict(self._usage.cpu_percent),
            memory_mb={kind: memory.get(kind, 0.0) for kind in ("supervisor", "inference", "learner", "template")}
            | {"actor_mean": memory.get("actor", 0.0)}
            | ({"evaluation": memory.get("evaluation", 0.0)} if config.evaluation.lanes else {})
            | {kind: memory[kind] for kind in ("downlink", "uplink") if kind in memory},
            processes=dict(self._usage.processes),
            metrics=self._metrics,
            policies_ready=int(snapshot["inference_prepared"][0]),
            policies=int(snapshot["inference_prepared"][1]),
            cuda_graphs={
                name: Graphs(int(snapshot[f"{kind}_graphs"][0])).name.lower()
                for name, kind in (("policy", "inference"), ("learner", "learner"))
            },
            evaluation=self.evaluation,
            waits=self.waits,
            groups=self._group_views(snapshot, before, totals, now - then),
            warming_up=self._warming_up(decisions, int(snapshot["control_warmup_end"][0])),
        )

    def _group_views(
        self, snapshot: Snapshot, before: Snapshot, after: Snapshot, seconds: float
    ) -> tuple[GroupView, ...]:
        heard_s = self._clock() - snapshot["group_heard_ns"] * 1e-9
        decided = (after["group_decisions"] - before["group_decisions"]) / max(seconds, 1e-9)
        waited = (after["group_waited_s"] - before["group_waited_s"]) / max(seconds, 1e-9)
        return tuple(
            GroupView(
                incarnation=int(snapshot["group_started"][number]),
                decisions=int(after["group_decisions"][number]),
                decisions_per_s=float(decided[number]),
                waiting=float(np.clip(waited[number], 0.0, 1.0)),
                unstored=int(snapshot["group_unstored"][number]),
                silent_s=float(heard_s[number]) if snapshot["group_heard_ns"][number] else None,
                where=self.where.get(number, ""),
            )
            for number in range(len(heard_s))
        )

    def _warming_up(self, decisions: int, again_until: int) -> tuple[int, int] | None:
        """Where the run is in its warm-up, which ends at `again_until` decisions if it is not the first one."""
        length = self.config.replay.warmup_decisions
        end = max(length, again_until)
        return (decisions - end + length, length) if decisions < end else None

    def _remaining(self, elapsed: float, decisions: int, pace: float) -> tuple[float | None, float | None]:
        """Seconds left and share done of the limit that comes first. Minutes count from this launch."""
        left, done = [], []
        if self.config.max_minutes is not None:
            left.append(self.config.max_minutes * 60 - elapsed)
            done.append(elapsed / (self.config.max_minutes * 60))
        if self.config.max_decisions is not None:
            done.append(decisions / self.config.max_decisions)
            if pace > 0:
                left.append((self.config.max_decisions - decisions) / pace)
        return max(0.0, min(left)) if left else None, min(1.0, max(done)) if done else None

    def _write(self, values: dict[str, float], news: dict[str, float], more: dict[str, float]) -> None:
        view, now = self._view, time.time()
        if news or not 0 < view.env_steps == self._drawn_step:  # a resumed run that is still loading adds no points
            self._log(lambda place: place.scalars(values | news | more, view.env_steps))
            if view.env_steps == self._first_step:
                self._drawn_step = self._first_step
        line = {"time": now} | asdict(view) | asdict(view.recent)
        of_the_display = ("recent", "overall", "success_history", "waits", "warming_up")
        missing = [name for name in ("evaluation", "groups") if not getattr(view, name)]
        for name in (*of_the_display, *missing):
            del line[name]
        try:
            self._lines.write(json.dumps(json_safe(line)) + "\n")
        except OSError as error:
            self._complain("metrics.jsonl", error)


def ratio(numerator: Any, denominator: Any) -> float:
    """The quotient, or 0 where there is nothing to divide by."""
    return float(numerator / denominator) if denominator > 0 else 0.0


def activity(before: Snapshot, after: Snapshot, seconds: float, workers: int, groups: int = 1) -> Activity:
    """Rates and means between two `totals` that lie `seconds` apart, in which there are so many environment workers and
    inference processes."""
    change = {name: after[name] - before[name] for name in after}

    def shares(kind: str, names: tuple[str, ...], processes: int) -> dict[str, float]:
        sums = change[f"{kind}_phase_s"]
        # A phase that began before this stretch counts when it ends, so a share could come out above 1.
        return {name: min(1.0, ratio(sums[index], seconds * processes)) for index, name in enumerate(names)}

    return Activity(
        env_steps_per_s=ratio(change["actor_env_steps"], seconds),
        decisions_per_s=ratio(change["actor_decisions"], seconds),
        updates_per_s=ratio(change["learner_updates"], seconds),
        policy_lag=ratio(change["actor_policy_lag"], change["actor_decisions"]),
        batch_size=ratio(change["inference_rows"], change["inference_batches"]),
        batch_fill=ratio(change["inference_rows"], change["inference_padded_rows"]),
        queue_wait_ms=1e3 * ratio(change["inference_queue_wait_s"], change["inference_rows"]),
        phases={
            "actor": shares("actor", ACTOR_PHASES, workers),
            "inference": shares("inference", INFERENCE_PHASES, groups),
            "learner": shares("learner", LEARNER_PHASES, 1),
        },
    )


def totals(snapshot: Snapshot) -> Snapshot:
    """The counters that `activity` compares: sums over the lanes, and those of the other processes."""
    totals = {name: snapshot[name].sum(axis=0) for name in PER_ACTOR}
    groups = len(snapshot["group_started"])
    of_groups = np.split(snapshot["actor_decisions"], groups) if groups else []
    totals["group_decisions"] = np.array([lanes.sum() for lanes in of_groups], np.int64)
    totals["group_waited_s"] = snapshot["group_inference_phase_s"][:, INFERENCE_PHASES.index("wait_learner")].copy()
    return totals | {name: snapshot[name].squeeze() for name in PER_PROCESS}


def scalars(view: View) -> dict[str, float]:
    """The curves' values of a tick, without episodes and the agent's metrics. What has no data yet is not there."""
    recent, memory = view.recent, {kind: megabytes for kind, megabytes in view.memory_mb.items() if megabytes > 0}
    values: dict[str, float] = {
        "train/replay_buffer/size": view.replay_size,
        "train/replay_buffer/utilization": view.replay_utilization,
        "system/cpu_percent/total": sum(view.cpu_percent.values()),
        "system/memory_mb/total": sum(memory.values())
        + memory.get("actor_mean", 0.0) * (view.processes.get("actor", 1) - 1)
        + memory.get("evaluation", 0.0) * (view.processes.get("evaluation", 1) - 1),
    }
    if recent.decisions_per_s > 0 and view.updates > 0:
        values["async/policy_lag"] = recent.policy_lag
    if recent.batch_size > 0:
        for name in ("batch_size", "batch_fill", "queue_wait_ms"):
            values[f"async/{name}"] = getattr(recent, name)
    if view.updates > 0:
        values["async/replay_ratio"] = view.replay_ratio
    if view.success_rate is not None:
        values["async/success_rate"] = view.success_rate
    for number, group in enumerate(view.groups):
        figures = ("decisions_per_s", "waiting", "unstored", "silent_s", "incarnation")
        shown = {name: getattr(group, name) for name in figures}
        values |= {f"group/{number}/{name}": float(value) for name, value in shown.items() if value is not None}
    on_gpu = {name: state for name, state in view.cuda_graphs.items() if state != "none"}
    values |= {f"system/cuda_graphs/{name}": float(state == "captured") for name, state in on_gpu.items()}
    begun = {"env_steps_per_s": view.env_steps, "decisions_per_s": view.decisions, "updates_per_s": view.updates}
    for rate, count in begun.items():
        if count > 0:
            values[f"time/{rate}"] = getattr(recent, rate)
    for kind, phases in recent.phases.items():
        if any(phases.values()):
            values |= {f"time/{kind}/{phase}": share for phase, share in phases.items()}
    values |= {f"system/cpu_percent/{kind}": percent for kind, percent in view.cpu_percent.items()}
    return values | {f"system/memory_mb/{kind}": megabytes for kind, megabytes in memory.items()}


def episode_scalars(episodes: Iterable[FinishedEpisode]) -> dict[str, float]:
    """Means over episodes; empty without any. `env/reward` is an episode's return per env step."""
    rows = [(e.length, e.episode_return, e.episode_return / max(e.length, 1), e.success) for e in episodes]
    if not rows:
        return {}
    names = ("env/episode_len", "env/return", "env/reward", "env/success_once")
    return dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))


def gif_size(gif: bytes) -> tuple[int, int]:
    """Width and height in pixels that a GIF file says it has."""
    width, height = struct.unpack_from("<HH", gif, 6)
    return width, height


def json_safe(value: Any) -> Any:
    """Rounds floats to 4 decimals for reading; what JSON cannot express (NaN, infinities) becomes None."""
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


class History:
    """At most HISTORY_POINTS evenly spaced values of all that were added; the last one is always among them.

    `length` values were added already, of which `points` begins with those that are kept.
    """

    def __init__(self, points: Iterable[float] = (), length: int = 0) -> None:
        self.length = length
        self.points = list(points)[: -(-length // self._stride())]

    def _stride(self) -> int:
        """How many values a point stands for; it doubles whenever the points are full."""
        stride = 1
        while self.length >= HISTORY_POINTS * stride:
            stride *= 2
        return stride

    def add(self, value: float) -> None:
        if self.length % self._stride():
            self.points[-1] = value
        else:
            self.points.append(value)
        self.length += 1
        if len(self.points) == HISTORY_POINTS and self.length % self._stride() == 0:
            self.points = self.points[1::2]
