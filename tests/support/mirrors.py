"""Rings whose lanes are filled at random, and whether other lanes mirror them bit for bit."""

from __future__ import annotations

import os
import weakref
from typing import Any

import numpy as np

from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters, counter_fields
from dsrl_async.shm.replay import OBSERVED, ActionRow, ReplayRing, Seen, replay_fields

NOISE, STATE_DIM, TASKS = 4, 3, 100
ACTIONS = ActionRow(chunk=2, action_dim=3, cameras=2, image_size=8)


KINDS: dict[str, dict[str, Any]] = {"sac": {}, "tasks": {"of_tasks": True}, "na": {"of_actions": ACTIONS}}
"""Kinds of rows -> how their ring differs."""


def make_arena(lanes: int, rows_per_lane: int, kind: str = "sac", groups: int = 0) -> Arena:
    fields = replay_fields(lanes, rows_per_lane, STATE_DIM, NOISE, 1, **KINDS[kind])
    arena = Arena.create({**fields, **counter_fields(lanes, groups=groups)})
    weakref.finalize(arena, os.close, arena.fd)  # a test makes hundreds
    return arena


class Player:
    """Plays in a lane as an environment worker does: random observations, noise and outcomes, and their counts."""

    def __init__(self, arena: Arena, lane: int, seed: int) -> None:
        self.ring, self.counters, self.lane = ReplayRing(arena), Counters(arena), lane
        self.rng, self.length, self.sum = np.random.default_rng(seed), 0, 0.0
        self.ended = 0  # episodes

    def play(self, rows: int) -> None:
        """Start so many rows."""
        while rows:
            rows -= 1
            if self.length == 0:
                self.begin()
            else:
                self.decide()

    def begin(self) -> None:
        """Begin an episode, also in the midst of another, as the successor of a worker that died does."""
        self.counters.actor_started_episodes[self.lane] += 1
        self.ring.begin_episode(self.lane, *self._observation())
        self.length, self.sum = 1, 0.0

    def decide(self) -> None:
        counters, lane, rng = self.counters, self.lane, self.rng
        reward, steps, ends = float(np.float32(rng.normal())), int(rng.integers(1, 6)), rng.random() < 0.2
        image, state, seen = self._observation()
        self.ring.append(
            lane,
            noise=rng.normal(size=(ACTIONS.actions if self.ring.of_actions else NOISE)).astype(np.float32),
            reward=reward,
            steps=steps,
            terminal=ends and bool(rng.integers(2)),
            policy_version=int(rng.integers(0, 50)),
            next_image=image,
            next_state=state,
            next_seen=seen,
        )
        self.sum += reward
        counters.actor_env_steps[lane] += steps
        counters.actor_decisions[lane] += 1
        self.length += 1
        if ends:
            counters.end_episode(lane, self.sum, self.length, bool(rng.integers(2)))
            self.length, self.ended = 0, self.ended + 1

    def _observation(self) -> tuple[np.ndarray, np.ndarray, Seen | None]:
        rng, seen, pictures = self.rng, None, None
        if self.ring.of_actions:
            pictures = rng.integers(0, 256, self.ring.rows["policy_images"].shape[2:], np.uint8)
        if self.ring.keeps_seen:
            seen = Seen(pictures, int(rng.integers(TASKS)))
        image = rng.integers(0, 256, self.ring.rows["image"].shape[2:], np.uint8)
        return image, rng.normal(size=STATE_DIM).astype(np.float32), seen


def assert_mirrored(origin: ReplayRing, lane: int, mirror: ReplayRing, other: int, base: int = 0) -> None:
    """Lane `other` of the mirror has, from row `base` on, all rows of the origin's lane, as far as both rings reach."""
    head = int(origin.head[lane])
    assert int(mirror.head[other]) - base == head
    numbers = np.arange(max(0, head - min(origin.rows_per_lane, mirror.rows_per_lane)), head)
    here, there = numbers % origin.rows_per_lane, (base + numbers) % mirror.rows_per_lane
    complete = origin.rows["complete"][lane, here]
    assert (mirror.rows["complete"][other, there] == complete).all()
    for name, rows in origin.rows.items():
        of_row = np.ones(len(numbers), bool) if name in OBSERVED else complete
        mine, theirs = rows[lane, here][of_row], mirror.rows[name][other, there][of_row]
        assert mine.tobytes() == theirs.tobytes(), name
