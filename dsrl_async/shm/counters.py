"""What every process counts and times, in shared memory: a few stores per decision, read by the supervisor.

Counts and times only grow, and each element has one writer. The names are also those of metrics and of checkpoints;
`actor` in them means an environment worker and its lane, not the policy network.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from enum import IntEnum
from typing import Annotated, get_type_hints

import numpy as np

from dsrl_async.shm import order
from dsrl_async.shm.arena import Arena, Fields

ACTOR_PHASES = ("physics", "render", "reset", "replay_write", "wait_action")
INFERENCE_PHASES = ("wait_request", "wait_batch", "wait_learner", "gather", "compute", "scatter", "weights")
LEARNER_PHASES = ("wait_data", "wait_ratio", "sample", "update", "publish", "checkpoint")
EPISODE_LOG = 64  # finished episodes that are kept per lane until the supervisor has read them
SUCCESS_EPISODES = 100  # number of last episodes that the success rate is a mean of
HISTORY_POINTS = 48  # upper limit on the points of its history
LEARNER_METRICS = 16  # room for the metrics of the last update

EVALUATION_LANES = "evaluation/"  # before the names of its lanes' counters
LANES = -1  # in the shape of a counter: the number of lanes
GROUPS = -2  # of groups; 0 where the run has none, or is one
Count = Annotated[np.ndarray, "int64", 1]
LaneCounts = Annotated[np.ndarray, "int64", LANES]
GroupCounts = Annotated[np.ndarray, "int64", GROUPS]
StartStep = Annotated[np.ndarray, "int64", 2]
"""What a process does in its start, a value of `Start`, and since when; what an earlier incarnation said is older than
its successor."""


class Stop(IntEnum):
    """Who is to end now."""

    RUNNING = 0
    WORKERS = 1
    """The environment workers; the others go on, so that the last checkpoint holds all transitions."""
    EVERYONE = 2


class Graphs(IntEnum):
    """How the policy or the learner runs on a GPU."""

    NONE = 0
    """On the CPU, or it is not known yet."""
    CAPTURED = 1
    """CUDA graphs are replayed."""
    OFF = 2
    """The settings say: without graphs."""
    FAILED = 3
    """It runs without graphs, because their capture failed."""


class Uploads(IntEnum):
    """How observations get to a GPU, the best way last."""

    NONE = 0
    """The policy is on the CPU, or it is not known yet."""
    PAGEABLE = 1
    """By a copy per row that the host waits for."""
    PAGE_LOCKED = 2
    """By a copy per row that it does not wait for."""
    GATHERED = 3
    """By one kernel."""


class NoiseMode(IntEnum):
    """How the noise of an observation's action chunk is chosen, and by which weights."""

    WARM_UP = 0
    """Standard normal, laid out over the action slots as an agent's noise is."""
    STOCHASTIC = 1
    """A sample of the newest actor's distribution."""
    DETERMINISTIC = 2
    """The mode of the newest actor's distribution."""
    BASE = 3
    """Standard normal and independent in every action slot, as the frozen policy was trained."""
    SNAPSHOT_STOCHASTIC = 4
    """As `STOCHASTIC`, of the actor as it was when the evaluation began that is going on."""
    SNAPSHOT_DETERMINISTIC = 5


class Start(IntEnum):
    """What a process does on its way to its work, which it says itself as it begins with it."""

    BEGUN = 0
    """Python starts, and imports."""
    LOADING = 1
    """Inference loads the policy; the learner makes or restores the agent; the template imports what the environment
    needs; a worker makes its environment."""
    PREPARING = 2
    """Inference makes the policy ready for its batch sizes; the learner captures its updates; the template makes an
    environment; a worker is in its first reset."""


class Counters:
    """Views of the counters, each annotated with its dtype and shape: `counters.actor_decisions[lane] += 1`."""

    control_stop: Count
    """A value of `Stop`; see `stop`."""
    control_saves: Count
    """How many checkpoints the learner was asked for."""
    control_wall_s: Annotated[np.ndarray, "float64", 1]
    """Seconds that this run has taken so far, over all resumes."""
    control_episodes_seen: LaneCounts
    """Episodes that the supervisor has taken into its figures; they and the next three go through checkpoints."""
    control_outcomes: Annotated[np.ndarray, "int8", SUCCESS_EPISODES]
    """How the last of them ended, the oldest first: 2 for a success, 1 for none, and 0 behind them."""
    control_history: Annotated[np.ndarray, "float64", HISTORY_POINTS]
    """Success rates so far, as `telemetry.monitor.History` keeps them."""
    control_history_length: Count
    """How many values it has been given."""
    control_warmup_end: Count
    """The number of decisions at which updates begin again, of a run that went on without its replay buffer; else 0."""
    control_passed_decisions: Count
    """Decisions before that, beside those of the first warm-up, for which the replay ratio asks no updates."""

    control_granted: Count
    """Decisions that a group's inference process may have handed out; negative before the learner's machine has said
    it, and 0 in a run that is no group."""
    control_warmup: Count
    """How many of those are warm-up."""

    control_snapshots: Count
    """How many snapshots of its agent the learner was asked for, each at the beginning of an evaluation."""
    control_evaluation_decisions: Count
    """The decisions at the beginning of the newest evaluation, by which its directory is named."""
    control_evaluation_mode: Count
    """The `NoiseMode` of its rows."""
    control_evaluation: Count
    """How many evaluations this launch has begun to play."""

    template_heartbeat_ns: Count
    """When the template last gave a sign of life, as all heartbeats by `time.monotonic_ns`."""
    template_prepared: Count
    """The incarnation that is ready to fork environment workers."""
    template_start: StartStep

    actor_decisions: LaneCounts
    """Decisions that were executed to their end."""
    actor_env_steps: LaneCounts
    actor_episodes: LaneCounts
    """Episodes that have ended; see `end_episode`."""
    actor_started_episodes: LaneCounts
    actor_successes: LaneCounts
    actor_policy_lag: LaneCounts
    """Age of the policy that took a decision, in gradient updates when it ended; summed over the decisions."""
    actor_heartbeat_ns: LaneCounts
    actor_start: Annotated[np.ndarray, "int64", LANES, 2]
    """For each lane as `StartStep`."""
    actor_phase_s: Annotated[np.ndarray, "float64", LANES, len(ACTOR_PHASES)]
    """Seconds in each of `ACTOR_PHASES`."""
    actor_episode_return: Annotated[np.ndarray, "float64", LANES, EPISODE_LOG]
    """Sum of an episode's rewards; episode n of a lane is at n % EPISODE_LOG, here and in the next two."""
    actor_episode_len: Annotated[np.ndarray, "int64", LANES, EPISODE_LOG]
    """Environment steps of the episode."""
    actor_episode_success: Annotated[np.ndarray, "int64", LANES, EPISODE_LOG]
    """1 for an episode that succeeded."""

    inference_batches: Count
    inference_rows: Count
    """Observations that were answered."""
    inference_padded_rows: Count
    """Rows of the batches, with those that only fill them up."""
    inference_queue_wait_s: Annotated[np.ndarray, "float64", 1]
    """Seconds from a request to the start of its batch, summed over the observations."""
    inference_policy_version: Count
    """The gradient updates behind the weights in use."""
    inference_graphs: Count
    """A value of `Graphs`."""
    inference_loading_ns: Count
    """When the process last got on with loading, compiling or capturing the policy; its heartbeat begins after that."""
    inference_evaluation: Count
    """The value of `control_evaluation` whose rows are answered; negative if its snapshot cannot be used."""
    inference_prepared: Annotated[np.ndarray, "int64", 2]
    """For how many pairs of batch size and prompt length the policy is ready, and how many there are."""
    inference_uploads: Count
    """A value of `Uploads`."""
    inference_heartbeat_ns: Count
    inference_start: StartStep
    inference_phase_s: Annotated[np.ndarray, "float64", len(INFERENCE_PHASES)]
    """Seconds in each of `INFERENCE_PHASES`."""

    downlink_heartbeat_ns: Count
    group_started: GroupCounts
    """The incarnation of each group that the supervisor has started last; the downlink hears no other one. All further
    counters of groups are the downlink's (`groups.downlink`)."""
    group_incarnation: GroupCounts
    """The one whose rows are stored, and that the next two are of."""
    group_base_head: LaneCounts
    """The ring's `head` of each lane when that incarnation began: its row n is the ring's row `base + n`."""
    group_base_decisions: GroupCounts
    """The sum of `actor_decisions` over the group's lanes then."""
    group_intent: Annotated[np.ndarray, "int64", LANES, 4]
    """What a lane's counters are once the row is stored that is being stored: `head`, `actor_decisions`,
    `actor_env_steps`, `actor_policy_lag`."""
    group_heard_ns: GroupCounts
    """When something came from the group."""
    group_arrived: GroupCounts
    """Rows that were stored."""
    group_repeated: GroupCounts
    """Rows that had been stored before."""
    group_early: GroupCounts
    """Rows after one that is missing."""
    group_granted: GroupCounts
    """Decisions that this incarnation may have handed out, by the replay ratio."""
    group_unstored: GroupCounts
    """Rows that wait in the group, by its last report; so is all that follows."""
    group_inference_batches: GroupCounts
    group_inference_rows: GroupCounts
    group_inference_padded_rows: GroupCounts
    group_inference_queue_wait_s: Annotated[np.ndarray, "float64", GROUPS]
    group_inference_phase_s: Annotated[np.ndarray, "float64", GROUPS, len(INFERENCE_PHASES)]
    group_inference_policy_version: GroupCounts
    group_inference_graphs: GroupCounts
    group_inference_uploads: GroupCounts
    group_inference_prepared: Annotated[np.ndarray, "int64", GROUPS, 2]
    group_inference_start: Annotated[np.ndarray, "int64", GROUPS, 2]
    group_inference_heartbeat_ns: GroupCounts

    learner_updates: Count
    """Gradient updates."""
    learner_replay_size: Count
    """Decisions in the replay ring that can be sampled, as of the supervisor's last look."""
    learner_saves: Count
    """The value of `control_saves` that it has seen to."""
    learner_snapshots: Count
    """The value of `control_snapshots` that it has seen to."""
    learner_failed_checkpoints: Count
    learner_lost_updates: Count
    """Updates by a learner that died which are not in the agent any more."""
    learner_graphs: Count
    """A value of `Graphs`."""
    learner_heartbeat_ns: Count
    learner_start: StartStep
    learner_phase_s: Annotated[np.ndarray, "float64", len(LEARNER_PHASES)]
    """Seconds in each of `LEARNER_PHASES`."""
    learner_metrics: Annotated[np.ndarray, "float32", LEARNER_METRICS]
    """Metrics of the last update, in the order of `sac.metric_names`; see `note_metrics`."""
    learner_metrics_update: Count
    """The update that they belong to; 0 before the first."""

    def __init__(self, arena: Arena, of: str = "") -> None:
        """With EVALUATION_LANES, those by lane are of the evaluation's lanes; the others are the same."""
        lanes = {name: of for name, (_, *shape) in _LAYOUTS.items() if LANES in shape}
        vars(self).update({name: arena[lanes.get(name, "") + _field(name)] for name in _LAYOUTS})

    @property
    def stop(self) -> Stop:
        """Who is to end now. (Comparing `control_stop` itself with a `Stop` would take numpy 10 microseconds.)"""
        who = Stop(int(self.control_stop[0]))
        order.barrier()
        return who

    @stop.setter
    def stop(self, who: Stop) -> None:
        order.barrier()
        self.control_stop[0] = who

    def decisions(self) -> int:
        return int(self.actor_decisions.sum())

    def note_start(self, step: Start, of: np.ndarray) -> None:
        """Say that this process begins with a step of its start; `of` is its `StartStep`."""
        of[1] = time.monotonic_ns()
        order.barrier()
        of[0] = step

    def end_episode(self, lane: int, episode_return: float, length: int, success: bool) -> None:
        """Note the outcome of a lane's episode, then count it."""
        entry = int(self.actor_episodes[lane]) % EPISODE_LOG
        self.actor_episode_return[lane, entry] = episode_return
        self.actor_episode_len[lane, entry] = length
        self.actor_episode_success[lane, entry] = success
        self.actor_successes[lane] += success
        order.barrier()
        self.actor_episodes[lane] += 1

    def ended_episodes(self, lane: int) -> int:
        """How many episodes a lane has ended; what came of the last `EPISODE_LOG` of them can be read."""
        ended = int(self.actor_episodes[lane])
        order.barrier()
        return ended

    def note_metrics(self, metrics: np.ndarray, update: int) -> None:
        """Note the metrics of an update, float32 with up to `LEARNER_METRICS` values, then its number."""
        self.learner_metrics[: len(metrics)] = metrics
        order.barrier()
        self.learner_metrics_update[0] = update

    def ask_snapshot(self, decisions: int) -> int:
        """Ask the learner for its agent, for an evaluation that begins at so many decisions; returns the number of the
        question."""
        self.control_evaluation_decisions[0] = decisions
        order.barrier()
        self.control_snapshots[0] += 1
        return int(self.control_snapshots[0])

    def asked_snapshot(self, seen: int) -> tuple[int, int] | None:
        """The number of the newest question and the decisions of its evaluation, if it is not the one `seen` last."""
        if (asked := int(self.control_snapshots[0])) == seen:
            return None
        order.barrier()
        return asked, int(self.control_evaluation_decisions[0])

    def answer_snapshot(self, asked: int) -> None:
        """Say that the agent is written, or cannot be."""
        order.barrier()
        self.learner_snapshots[0] = asked

    def snapshot_answered(self, asked: int) -> bool:
        answered = int(self.learner_snapshots[0]) >= asked
        order.barrier()
        return answered

    def begin_evaluation(self, decisions: int, mode: NoiseMode) -> int:
        """Have the rows of the evaluation of that name answered from now on; returns its number in this launch."""
        self.control_evaluation_decisions[0] = decisions
        self.control_evaluation_mode[0] = mode
        order.barrier()
        self.control_evaluation[0] += 1
        return int(self.control_evaluation[0])

    def begun_evaluation(self, seen: int) -> tuple[int, int, NoiseMode] | None:
        """The number, decisions and mode of the newest evaluation, if it is not the one `seen` last."""
        if (begun := int(self.control_evaluation[0])) == seen:
            return None
        order.barrier()
        return begun, int(self.control_evaluation_decisions[0]), NoiseMode(int(self.control_evaluation_mode[0]))

    def snapshot(self) -> dict[str, np.ndarray]:
        """A private copy of everything, name -> array."""
        numbers = {name: vars(self)[name].copy() for name in PUBLISHING}
        order.barrier()
        return {name: numbers[name] if name in numbers else array.copy() for name, array in vars(self).items()}


PUBLISHING = ("actor_episodes", "learner_metrics_update", "control_snapshots", "control_evaluation")
"""Counters that are written after others, which they cover."""

_LAYOUTS = {name: hint.__metadata__ for name, hint in get_type_hints(Counters, include_extras=True).items()}


def _field(name: str) -> str:
    """`actor_env_steps` -> `actor/env_steps`, its name in the shared memory."""
    return name.replace("_", "/", 1)


def counter_fields(lanes: int, evaluation: int = 0, groups: int = 0) -> Fields:
    """The arrays of the counters for `lanes` environment workers of the training and so many of the evaluation, and for
    so many groups, whose learner this run has.

    What is of the evaluation is in arrays of its own, so that nobody takes it for training's.
    """

    fields: Fields = {}
    for name, (dtype, *shape) in _LAYOUTS.items():
        for prefix, size in (("", lanes), (EVALUATION_LANES, evaluation if LANES in shape else 0)):
            if size:
                sizes = {LANES: size, GROUPS: groups}
                fields[prefix + _field(name)] = (tuple(sizes.get(n, n) for n in shape), dtype)
    return fields


def counters_of(arena: Arena, lane: int) -> tuple[Counters, int]:
    """Where the worker of a lane counts: training's counters or, for the lanes behind, the evaluation's; and its row
    there."""
    training = Counters(arena)
    lanes = len(training.actor_decisions)
    return (training, lane) if lane < lanes else (Counters(arena, EVALUATION_LANES), lane - lanes)


class Phases:
    """Adds wall time to a row of phase sums: `with phases("render"): ...` (seconds)."""

    def __init__(self, names: tuple[str, ...], sums: np.ndarray) -> None:
        self._phases: Mapping[str, Phase] = {name: Phase(sums, index) for index, name in enumerate(names)}

    def __call__(self, name: str) -> Phase:
        return self._phases[name]


class Phase:
    """One phase. It is no generator, as `contextmanager` makes them: a worker enters five for every decision."""

    __slots__ = ("_index", "_start", "_sums")

    def __init__(self, sums: np.ndarray, index: int) -> None:
        self._sums, self._index, self._start = sums, index, 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._sums[self._index] += time.perf_counter() - self._start
