"""The table of what can be drawn, kept up bit by bit, is what a look at the whole ring gives."""

from __future__ import annotations

import time

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from dsrl_async.run.learner.sampling import Drawable, InPlace
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.replay import ReplayRing, replay_fields

LANES = 3
IMAGE, STATE, NOISE = np.zeros((64, 64, 3), np.uint8), np.zeros(1, np.float32), np.zeros(1, np.float32)


def make_ring(rows: int) -> ReplayRing:
    return ReplayRing(Arena.create(replay_fields(LANES, rows, state_dim=1, noise_width=1)))


def append(ring: ReplayRing, lane: int) -> None:
    ring.append(lane, NOISE, 0.0, 1, False, 0, IMAGE, STATE)


def whole(ring: ReplayRing) -> list[tuple[int, int]]:
    """Lanes and row numbers of all that can be drawn, in order."""
    low, high = ring.windows()
    return [
        (lane, number)
        for lane in range(ring.lanes)
        for number in range(low[lane], high[lane])
        if ring.rows["complete"][lane, number % ring.rows_per_lane]
    ]


def listed(source: InPlace) -> list[tuple[int, int]]:
    lanes, numbers = source.table.find(torch.arange(source.refresh()))
    return list(zip(lanes.tolist(), numbers.tolist(), strict=True))


def resumed(ring: ReplayRing, lanes: int) -> ReplayRing:
    """The ring of a run that goes on from a checkpoint."""
    fields = replay_fields(lanes, ring.rows_per_lane, state_dim=1, noise_width=1)
    other = ReplayRing(Arena.create(fields))
    other.import_lanes([ring.export_lane(lane) for lane in range(ring.lanes)])
    return other


@settings(deadline=None, max_examples=50)
@given(data=st.data(), rows=st.integers(3, 9))
def test_after_any_history_it_is_what_the_ring_holds(data: DataObject, rows: int) -> None:
    """Episodes begin and go on in any order, lanes go round between two looks, once or many times, workers die between
    two decisions or inside one, and runs are resumed with as many lanes or fewer."""
    ring = make_ring(rows)
    source = InPlace(ring)
    for _ in range(data.draw(st.integers(1, 30))):
        lane = data.draw(st.integers(0, ring.lanes - 1))
        match data.draw(st.sampled_from(["begin", "append", "append", "many", "die", "look", "look", "resume"])):
            case "append" if ring.head[lane]:
                append(ring, lane)
            case "many" if ring.head[lane]:
                for _ in range(data.draw(st.integers(rows, 3 * rows))):
                    append(ring, lane)
            case "die" if ring.head[lane]:  # inside `append`, before it advances the head; the successor begins anew
                ring.rows["complete"][lane, (ring.head[lane] - 1) % rows] = True
                ring.begin_episode(lane, IMAGE, STATE)
            case "resume":
                ring = resumed(ring, data.draw(st.sampled_from([ring.lanes, max(1, ring.lanes - 1)])))
                source = InPlace(ring)
            case "look":
                assert listed(source) == whole(ring)
                assert int(source.size) == max(1, len(whole(ring)))
            case _:
                ring.begin_episode(lane, IMAGE, STATE)
    assert listed(source) == whole(ring)


@settings(deadline=None, max_examples=30)
@given(counts=st.lists(st.integers(0, 6), min_size=LANES, max_size=LANES).filter(any))
def test_every_position_is_one_decision_of_its_lane(counts: list[int]) -> None:
    """Lanes without decisions at either end and in between."""
    ring = make_ring(rows=12)
    for lane, count in enumerate(counts):
        ring.begin_episode(lane, IMAGE, STATE)
        for _ in range(count):
            append(ring, lane)
    expected = [(lane, number) for lane, count in enumerate(counts) for number in range(count)]
    assert listed(InPlace(ring)) == expected


def test_what_is_new_costs_the_same_whatever_the_capacity() -> None:
    """The best of many times; a table that is rebuilt takes a hundred times as long with a hundred times the rows."""

    def best_s(rows: int) -> float:
        drawable, complete = Drawable(2, rows), np.ones((2, rows), np.bool_)
        head = np.array([rows, rows])
        drawable.update(head, head + 1 - rows, complete)
        times = []
        for _ in range(50):
            head = head + 2
            begin = time.perf_counter()
            drawable.update(head, head + 1 - rows, complete)
            times.append(time.perf_counter() - begin)
        return min(times)

    best_s(100)
    assert best_s(500_000) < 5 * best_s(5_000)
