"""What a group counts, for the learner's machine: once a second in a report, and back when a successor begins.

Decisions, environment steps and policy lag are no part of reports: they are counted where rows arrive. All counts are
absolute. A group begins with those of the learner's machine (`counters_for`, `begin_with`), so that no episode is
played twice and nothing is counted twice, and over there they only grow.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from dsrl_async.groups.wire import LARGEST, BadMessage
from dsrl_async.shm import order
from dsrl_async.shm.counters import EPISODE_LOG, Counters
from dsrl_async.shm.replay import ReplayRing

LANE_SUMS = ("actor_started_episodes", "actor_phase_s")
EPISODE_COLUMNS = ("actor_episode_return", "actor_episode_len", "actor_episode_success")
EPISODES = ("actor_successes", "actor_episodes", *EPISODE_COLUMNS)
LANE_TIMES = ("actor_heartbeat_ns",)
INFERENCE_SUMS = tuple(
    f"inference_{name}" for name in ("batches", "rows", "padded_rows", "queue_wait_s", "phase_s", "prepared")
)
INFERENCE_STATES = ("inference_policy_version", "inference_graphs", "inference_uploads")
INFERENCE_TIMES = ("inference_heartbeat_ns",)
CARRIED = (
    *("actor_decisions", "actor_env_steps", "actor_policy_lag", "actor_episodes", "actor_successes"),
    *LANE_SUMS,
)
CARRIED_SUMS = INFERENCE_SUMS[:-1]
"""`inference_prepared` is of a process and not of a group."""
LONGEST_S = 1e12


def lanes_of(group: int, groups: int, lanes: int) -> slice:
    """The lanes of a group: one after the other, as many for each."""
    size = lanes // groups
    return slice(group * size, (group + 1) * size)


def counters_for(counters: Counters, group: int, groups: int) -> dict[str, Any]:
    """What a new incarnation of a group begins with, ready for JSON. Its predecessor must not be heard any more."""
    lanes = lanes_of(group, groups, len(counters.actor_decisions))
    plain = {name: getattr(counters, name)[lanes].tolist() for name in CARRIED}
    return plain | {name: getattr(counters, f"group_{name}")[[group]].tolist() for name in CARRIED_SUMS}


def begin_with(counters: Counters, plain: dict[str, Any]) -> None:
    """Take over what `counters_for` returned, before any process of the group starts."""
    for name in CARRIED:
        getattr(counters, name)[:] = plain[name]
    for name in CARRIED_SUMS:
        own = getattr(counters, name)
        own[:] = np.reshape(plain[name], own.shape)
    counters.control_episodes_seen[:] = counters.actor_episodes


def report_type(counters: Counters, lanes: int) -> np.dtype:
    """A report of a group with so many lanes. Times are ages in nanoseconds, -1 for none."""
    columns: list[tuple[str, str, tuple[int, ...]]] = [("number", "<i8", ()), ("unstored", "<i8", ())]
    for name in (*LANE_SUMS, *EPISODES, *LANE_TIMES):
        array = getattr(counters, name)
        columns.append((name, array.dtype.str, (lanes, *array.shape[1:])))
    for name in (*INFERENCE_SUMS, *INFERENCE_STATES, *INFERENCE_TIMES, "inference_start"):
        array = getattr(counters, name)
        columns.append((name, array.dtype.str, array.shape))
    return np.dtype(columns)


def make(counters: Counters, ring: ReplayRing, stored: np.ndarray, number: int) -> bytes:
    """The report of a group at this moment; `stored` says how many rows of each lane are, int64 [lanes]."""
    report, now = np.zeros((), report_type(counters, ring.lanes)), time.monotonic_ns()
    report["number"], report["unstored"] = number, (ring.heads() - stored).sum()
    # What is written before a count is read after it.
    report["actor_episodes"] = counters.actor_episodes
    order.barrier()
    for name in report.dtype.names or ():
        if name in ("number", "unstored", "actor_episodes"):
            continue
        value = getattr(counters, name)
        if name in (*LANE_TIMES, *INFERENCE_TIMES):
            value = np.where(value > 0, now - value, -1)
        report[name] = value
    step, since = counters.inference_start.tolist()
    report["inference_start"] = step, now - since if since else -1
    return report.tobytes()


def take(counters: Counters, group: int, lanes: slice, frame: bytes, dtype: np.dtype) -> int:
    """Take in a report; returns its number. Raises BadMessage; nothing is taken in then."""
    if len(frame) != dtype.itemsize:
        raise BadMessage("report", f"has {len(frame)} bytes, which are no report of {dtype.itemsize}")
    report = np.frombuffer(frame, dtype)[0]
    for name in dtype.names or ():
        values = report[name]
        if name != "actor_episode_return" and not (values.min() >= -1 and values.max() <= LARGEST):  # NaN is not
            raise BadMessage("report", f"has an impossible {name}")
    now = time.monotonic_ns()
    for name in LANE_SUMS:
        own = getattr(counters, name)[lanes]
        np.maximum(own, report[name], out=own)
    for offset in np.flatnonzero(report["actor_episodes"] > counters.actor_episodes[lanes]).tolist():
        _take_episodes(counters, lanes.start + offset, report, offset)
    for name in LANE_TIMES:
        getattr(counters, name)[lanes] = np.where(report[name] >= 0, now - report[name], 0)
    for name in INFERENCE_SUMS:
        own = getattr(counters, f"group_{name}")[group]
        np.copyto(getattr(counters, f"group_{name}")[group : group + 1], np.maximum(own, report[name]))
    counters.group_inference_prepared[group] = report["inference_prepared"]
    for name in INFERENCE_STATES:
        getattr(counters, f"group_{name}")[group] = report[name][0]
    age = int(report["inference_heartbeat_ns"][0])
    counters.group_inference_heartbeat_ns[group] = now - age if age >= 0 else 0
    step, age = report["inference_start"].tolist()
    counters.group_inference_start[group] = step, now - age if age >= 0 else 0
    counters.group_unstored[group] = report["unstored"]
    _sum_up(counters)
    return int(report["number"])


def _take_episodes(counters: Counters, lane: int, report: np.void, offset: int) -> None:
    """Take in the episodes of a lane that have ended since the last report, their outcomes before their count."""
    ended, own = int(report["actor_episodes"][offset]), int(counters.actor_episodes[lane])
    entries = np.arange(max(own, ended - EPISODE_LOG), ended) % EPISODE_LOG
    for name in EPISODE_COLUMNS:
        getattr(counters, name)[lane, entries] = report[name][offset, entries]
    counters.actor_successes[lane] = max(int(counters.actor_successes[lane]), int(report["actor_successes"][offset]))
    order.barrier()
    counters.actor_episodes[lane] = ended


def _sum_up(counters: Counters) -> None:
    """Write the figures of all groups together under the names that a run on one machine has them by."""
    for name in INFERENCE_SUMS:
        getattr(counters, name)[:] = np.atleast_1d(getattr(counters, f"group_{name}").sum(axis=0))
    begun = counters.group_inference_heartbeat_ns > 0
    if begun.any():
        counters.inference_policy_version[0] = counters.group_inference_policy_version[begun].min()
        counters.inference_graphs[0] = counters.group_inference_graphs[begun].max()
        counters.inference_uploads[0] = counters.group_inference_uploads[begun].min()
        counters.inference_heartbeat_ns[0] = counters.group_inference_heartbeat_ns.max()
