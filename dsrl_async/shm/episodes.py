"""Episodes that have ended, as the lanes log them, and what a checkpoint keeps of them.

The supervisor takes each episode into its figures once. What it has taken in, and what is still to come, goes through a
checkpoint, so that a resumed run's success rate goes on where it was.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dsrl_async.shm.counters import EPISODE_LOG, SUCCESS_EPISODES, Counters

Snapshot = dict[str, np.ndarray]
"""What `Counters.snapshot` returns."""


class FinishedEpisode(NamedTuple):
    episode_return: float
    """Sum of its decisions' rewards."""
    length: int
    """Executed environment steps."""
    success: int
    """1 if it succeeded, else 0."""


def finished_episodes(snapshot: Snapshot, seen: np.ndarray) -> list[FinishedEpisode]:
    """Episodes finished since the lanes' counts were `seen`, int64 [lanes]; the oldest come first, lanes take turns.

    A lane's log keeps EPISODE_LOG episodes; those overwritten before they were read are lost.
    """
    count = snapshot["actor_episodes"]
    new = np.minimum(count - seen, EPISODE_LOG)
    episodes = []
    for age in range(int(new.max(initial=0)), 0, -1):
        lanes = np.flatnonzero(new >= age)
        at = lanes, (count[lanes] - age) % EPISODE_LOG
        columns = (snapshot[f"actor_episode_{name}"][at].tolist() for name in ("return", "len", "success"))
        episodes += [FinishedEpisode(*values) for values in zip(*columns, strict=True)]
    return episodes


def last_episode(counters: Counters, lane: int) -> FinishedEpisode:
    """The last episode that a lane has ended; it has ended one."""
    entry = (counters.ended_episodes(lane) - 1) % EPISODE_LOG
    columns = (getattr(counters, f"actor_episode_{name}")[lane, entry].item() for name in ("return", "len", "success"))
    return FinishedEpisode(*columns)


def export_episodes(snapshot: Snapshot) -> dict[str, Any]:
    """What a checkpoint keeps, ready for JSON: the success window and its history, and the episodes yet to be seen."""
    return {
        "successes": [int(outcome) - 1 for outcome in snapshot["control_outcomes"] if outcome],
        "history": snapshot["control_history"].tolist(),
        "history_length": int(snapshot["control_history_length"][0]),
        "unseen": [list(map(float, e)) for e in finished_episodes(snapshot, snapshot["control_episodes_seen"])],
    }


def last_successes(kept: dict[str, Any] | None) -> list[int]:
    """The success window once all episodes are seen, of what `export_episodes` returned; empty for None."""
    if kept is None:
        return []
    window = [*kept["successes"], *(int(success) for _, _, success in kept["unseen"])]
    return window[-SUCCESS_EPISODES:]


def import_episodes(counters: Counters, kept: dict[str, Any] | None) -> None:
    """Take over what `export_episodes` returned; with None all episodes so far count as seen, and none is remembered.

    `counters.actor_episodes` is there already, for any number of lanes. The unseen episodes are spread over the lanes'
    logs so that they are read in their order.
    """
    lanes = len(counters.actor_episodes)
    counters.control_episodes_seen[:] = counters.actor_episodes
    if kept is None:
        return
    successes = kept["successes"][-SUCCESS_EPISODES:]
    counters.control_outcomes[: len(successes)] = np.array(successes, np.int8) + 1
    counters.control_history[:] = kept["history"]
    counters.control_history_length[0] = kept["history_length"]
    unseen = kept["unseen"][-EPISODE_LOG * lanes :]
    for index, (episode_return, length, success) in enumerate(unseen):
        age, lane = divmod(len(unseen) - 1 - index, lanes)
        lane = lanes - 1 - lane
        entry = (int(counters.actor_episodes[lane]) - 1 - age) % EPISODE_LOG
        counters.actor_episode_return[lane, entry] = episode_return
        counters.actor_episode_len[lane, entry] = length
        counters.actor_episode_success[lane, entry] = success
        counters.control_episodes_seen[lane] -= 1
