"""The replay ring: what is sampled was written, whole, whatever the writer does meanwhile, also when it is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsrl_async.config.settings import SacConfig
from dsrl_async.run.learner import sampling
from dsrl_async.run.learner.sampling import InPlace, Mirror, Source, draw, empty_batch
from dsrl_async.sac.agent import RandomNumbers
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.replay import ReplayRing, replay_fields


def make_ring(lanes: int = 2, rows: int = 16) -> ReplayRing:
    return ReplayRing(Arena.create(replay_fields(lanes, rows, state_dim=8, noise_width=4)))


def write_episode(ring: ReplayRing, lane: int, first: int, decisions: int, terminal: bool = True) -> None:
    """Write an episode whose rows can be recognised: all fields of its decision i tell the number first + i."""

    def observation(number: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full((64, 64, 3), number % 251, np.uint8), np.full(8, number, np.float32)

    ring.begin_episode(lane, *observation(first))
    for index in range(decisions):
        number = first + index
        next_image, next_state = observation(number + 1)
        ring.append(
            lane,
            noise=np.full(4, number, np.float32),
            reward=float(number),
            steps=5,
            terminal=terminal and index == decisions - 1,
            policy_version=number,
            next_image=next_image,
            next_state=next_state,
        )


class Transitions(NamedTuple):
    """A batch of B decisions, as arrays."""

    image: np.ndarray  # uint8 [B, 64, 64, 3]
    state: np.ndarray  # float32 [B, 8]
    noise: np.ndarray  # float32 [B, 4]
    reward: np.ndarray  # float32 [B]
    terminal: np.ndarray  # bool [B]
    next_image: np.ndarray  # uint8 [B, 64, 64, 3]
    next_state: np.ndarray  # float32 [B, 8]


def sample(source: ReplayRing | Source, rng: np.random.Generator, size: int) -> Transitions | None:
    """A batch drawn as the learner does; None if there is nothing to draw, or what was drawn has been overwritten."""
    source = InPlace(source) if isinstance(source, ReplayRing) else source
    return draw_from(source, rng, size) if source.refresh() else None


def draw_from(source: Source, rng: np.random.Generator, size: int) -> Transitions | None:
    batch, positions = empty_batch(source.columns, size), torch.zeros(size, dtype=torch.int64)
    empty = torch.empty(0)
    random = RandomNumbers(torch.from_numpy(rng.random(size)), augmentation=empty, normal=empty)
    draw(source, random, SacConfig(gamma=0.5), positions, batch)
    if source.overtaken(positions):
        return None
    (image, next_image), (state, next_state) = batch.images.numpy().reshape(2, size, 64, 64, 3), batch.states.chunk(2)
    alive = batch.discount.numpy() == 0.5**5
    assert (alive | (batch.discount.numpy() == 0)).all()
    return Transitions(
        image, state.numpy(), batch.noise.numpy(), batch.reward.numpy(), ~alive, next_image, next_state.numpy()
    )


def check(batch: Transitions) -> None:
    """Every field of a row tells the same number, and the next observation is the following one."""
    number = batch.reward
    assert (batch.noise == number[:, None]).all()
    assert (batch.state == number[:, None]).all()
    assert (batch.image == (number % 251).astype(np.uint8)[:, None, None, None]).all()
    assert (batch.next_state == number[:, None] + 1).all()
    assert (batch.next_image == ((number + 1) % 251).astype(np.uint8)[:, None, None, None]).all()


def test_nothing_to_sample_before_the_first_outcome() -> None:
    ring = make_ring()
    rng = np.random.default_rng(0)
    assert sample(ring, rng, 4) is None
    write_episode(ring, 0, first=10, decisions=0)
    assert sample(ring, rng, 4) is None
    assert ring.size() == 0


def test_every_decision_can_be_drawn_and_no_closing_row() -> None:
    ring = make_ring()
    write_episode(ring, 0, first=10, decisions=3)
    write_episode(ring, 0, first=20, decisions=2, terminal=False)
    write_episode(ring, 1, first=30, decisions=4)
    batch = sample(ring, np.random.default_rng(0), 500)
    assert batch is not None
    check(batch)
    assert set(batch.reward.astype(int)) == {10, 11, 12, 20, 21, 30, 31, 32, 33}
    assert set(batch.reward[batch.terminal].astype(int)) == {12, 33}
    assert ring.size() == 9


def test_sampling_is_uniform_over_decisions_of_unequal_lanes() -> None:
    ring = make_ring(lanes=2, rows=64)
    write_episode(ring, 0, first=0, decisions=2)
    write_episode(ring, 1, first=100, decisions=38)
    batch = sample(ring, np.random.default_rng(1), 40_000)
    assert batch is not None
    counts = np.array([np.count_nonzero(batch.reward == n) for n in [0, 1, *range(100, 138)]])
    assert counts.sum() == 40_000
    assert (np.abs(counts - 1000) < 160).all()  # five standard deviations


@settings(deadline=None, max_examples=60)
@given(
    episodes=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=25),
    rows=st.integers(4, 12),
    seed=st.integers(0, 1000),
)
def test_any_history_samples_only_recent_whole_decisions(episodes: list[tuple[int, int]], rows: int, seed: int) -> None:
    ring = make_ring(lanes=3, rows=rows)
    kept: dict[int, list[int | None]] = {0: [], 1: [], 2: []}  # rows by lane, None for closing ones
    for index, (lane, decisions) in enumerate(episodes):
        write_episode(ring, lane, first=index * 100, decisions=decisions)
        kept[lane] += [*range(index * 100, index * 100 + decisions), None]
    # The oldest row of a full lane may be under the writer's pen.
    expected = {n for lane in kept.values() for n in lane[max(0, len(lane) + 1 - rows) : -1] if n is not None}
    assert ring.size() == len(expected)
    batch = sample(ring, np.random.default_rng(seed), 64)
    if not expected:
        assert batch is None
        return
    assert batch is not None
    check(batch)
    assert set(batch.reward.astype(int)) <= expected


def test_pending_row_of_a_killed_actor_is_never_sampled() -> None:
    ring = make_ring(lanes=1)
    write_episode(ring, 0, first=10, decisions=2)
    # The actor died inside `append`, after the outcome and before `head` moved on.
    pending = (int(ring.head[0]) - 1) % ring.rows_per_lane
    ring.rows["reward"][0, pending] = 999
    ring.rows["complete"][0, pending] = True
    write_episode(ring, 0, first=20, decisions=2)
    batch = sample(ring, np.random.default_rng(0), 200)
    assert batch is not None
    check(batch)
    assert set(batch.reward.astype(int)) == {10, 11, 20, 21}


@settings(deadline=None, max_examples=30)
@given(
    decisions=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    rows=st.integers(4, 40),
    new_rows=st.integers(4, 40),
)
def test_export_and_import_keep_the_newest_decisions(decisions: list[int], rows: int, new_rows: int) -> None:
    ring = make_ring(lanes=1, rows=rows)
    for index, count in enumerate(decisions):
        write_episode(ring, 0, first=index * 100, decisions=count)
    restored = make_ring(lanes=1, rows=new_rows)
    restored.import_rows(0, ring.export_lane(0))
    write_episode(restored, 0, first=5000, decisions=1)

    def numbers(of: ReplayRing) -> set[int]:
        batch = sample(of, np.random.default_rng(0), 400)
        if batch is None:
            return set()
        check(batch)
        return set(batch.reward.astype(int))

    before, after = numbers(ring), numbers(restored)
    assert after <= before | {5000}
    if new_rows >= rows + 3:
        assert after == before | {5000}


@settings(deadline=None, max_examples=40)
@given(
    decisions=st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=4),
    lanes=st.integers(1, 5),
)
def test_any_number_of_lanes_takes_over_all_decisions_if_there_is_room(decisions: list[list[int]], lanes: int) -> None:
    ring = make_ring(lanes=len(decisions), rows=64)
    expected = set()
    for lane, episodes in enumerate(decisions):
        for index, count in enumerate(episodes):
            first = (lane * 10 + index) * 100
            write_episode(ring, lane, first, count)
            expected |= set(range(first, first + count))
    roomy, tight = make_ring(lanes=lanes, rows=400), make_ring(lanes=lanes, rows=8)
    exported = [ring.export_lane(lane) for lane in range(len(decisions))]
    for restored in (roomy, tight):
        restored.import_lanes(exported)
        batch = sample(restored, np.random.default_rng(0), 2000)
        found = set() if batch is None else set(batch.reward.astype(int))
        if batch is not None:
            check(batch)
        assert found <= expected
        if restored is roomy:
            assert found == expected


WRITER = """
import json, sys, time
import numpy as np
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.replay import ReplayRing
ring = ReplayRing(Arena.attach(json.loads(sys.argv[1])))
number = int(sys.argv[2])
def observation(n):
    return np.full((64, 64, 3), n % 251, np.uint8), np.full(8, n, np.float32)
ring.begin_episode(0, *observation(number))
while True:
    for _ in range(7):
        image, state = observation(number + 1)
        ring.append(0, np.full(4, number, np.float32), float(number), 5, False, number, image, state)
        number += 1
    number += 10
    ring.begin_episode(0, *observation(number))
    time.sleep(1e-4)  # else it goes round the lane faster than any reader can copy it
"""


def mirror(ring: ReplayRing) -> Mirror:
    return Mirror(ring, torch.device("cpu"))


@pytest.mark.parametrize(("make_source", "rows"), [(InPlace, 400), (mirror, 60)])
def test_reader_races_a_writer_that_is_killed_and_replaced(
    make_source: Callable[[ReplayRing], Source], rows: int
) -> None:
    """A small lane is overwritten hundreds of times a second while it is read: no torn row may come out."""
    arena = Arena.create(replay_fields(1, rows, state_dim=8, noise_width=4))
    ring = ReplayRing(arena)
    source = make_source(ring)
    rng = np.random.default_rng(0)
    sampled, seen = 0, set()
    for incarnation in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, json.dumps(arena.describe()), str(incarnation * 1_000_000)],
            pass_fds=[arena.fd],
        )
        start_head = int(ring.head[0])
        while int(ring.head[0]) == start_head:  # until it is up
            assert writer.poll() is None
            time.sleep(0.01)
        begin = time.monotonic()
        # for a second, and on until something of this writer was drawn: it may overtake the reader for long
        while (raced_s := time.monotonic() - begin) < 1.0 or (incarnation not in seen and raced_s < 30.0):
            batch = sample(source, rng, 8)
            if batch is not None:
                check(batch)
                sampled += 8
                seen |= {int(reward) // 1_000_000 for reward in batch.reward}
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        batch = sample(source, rng, 64)
        assert batch is not None
        check(batch)
    assert sampled > 500
    assert seen == {0, 1, 2, 3}


def test_a_row_that_lost_its_successor_while_that_was_copied_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 4 is in the mirror; its successor, pending until now, is overwritten before it is copied again."""
    ring = make_ring(lanes=1, rows=8)
    copy = mirror(ring)
    write_episode(ring, 0, first=0, decisions=5)
    assert copy.refresh() == 5
    write_episode(ring, 0, first=100, decisions=1)
    honest = copy._copy

    def overtaken(lanes: np.ndarray, numbers: np.ndarray) -> None:
        assert numbers[0] == 5  # the row behind row 4
        write_episode(ring, 0, first=200, decisions=5)  # rows 8 to 13
        honest(lanes, numbers)

    monkeypatch.setattr(copy, "_copy", overtaken)
    copy.refresh()
    for seed in range(20):
        if copy._drawable.size:
            batch = draw_from(copy, np.random.default_rng(seed), 20)
            assert batch is not None
            check(batch)


@settings(deadline=None, max_examples=60)
@given(
    history=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.booleans()), min_size=1, max_size=25),
    rows=st.integers(4, 12),
    chunk=st.integers(1, 7),
)
def test_a_mirror_gives_the_batches_of_the_ring(history: list[tuple[int, int, bool]], rows: int, chunk: int) -> None:
    """After any history, refreshed now and then: also when a lane went round more than once since the last time."""
    ring = make_ring(lanes=3, rows=rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "CHUNK_ROWS", chunk)
        copy = mirror(ring)
        for index, (lane, decisions, refreshed) in enumerate(history):
            write_episode(ring, lane, first=index * 100, decisions=decisions)
            if refreshed:
                copy.refresh()
        first, second = (sample(source, np.random.default_rng(0), 50) for source in (ring, copy))
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        check(second)
        assert all((a == b).all() for a, b in zip(first, second, strict=True))


def test_a_mirror_copies_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = make_ring(rows=64)
    write_episode(ring, 0, first=0, decisions=20)
    copy = mirror(ring)
    copied: list[int] = []
    honest = copy._copy

    def counted(lanes: np.ndarray, numbers: np.ndarray) -> None:
        copied.append(len(numbers))
        honest(lanes, numbers)

    monkeypatch.setattr(copy, "_copy", counted)
    copy.refresh()
    copy.refresh()
    write_episode(ring, 1, first=100, decisions=2)
    ring.append(0, np.full(4, 20, np.float32), 20.0, 5, False, 20, np.full((64, 64, 3), 21, np.uint8), np.full(8, 21))
    copy.refresh()
    # Everything; nothing; a new lane of three observations, and the row that was pending with the one behind it.
    assert copied == [21, 5]
    batch = sample(copy, np.random.default_rng(0), 300)
    assert batch is not None
    check(batch)
    assert set(batch.reward.astype(int)) == {*range(21), 100, 101}


def test_rows_that_were_overwritten_while_a_mirror_copied_them_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = make_ring(lanes=1, rows=8)
    write_episode(ring, 0, first=0, decisions=5)
    copy = mirror(ring)
    honest = np.take

    def slow_take(rows: np.ndarray, *arguments: Any, **options: Any) -> np.ndarray:
        if rows.ndim == 4 and ring.head[0] == 6:  # between looking at the ring and copying the images
            write_episode(ring, 0, first=50, decisions=3)
        return honest(rows, *arguments, **options)

    monkeypatch.setattr(np, "take", slow_take)
    copy.refresh()
    batch = draw_from(copy, np.random.default_rng(0), 100)
    assert batch is not None
    check(batch)
    assert set(batch.reward.astype(int)) == {3, 4}
    monkeypatch.undo()
    batch = sample(copy, np.random.default_rng(0), 100)
    assert batch is not None
    check(batch)
    assert set(batch.reward.astype(int)) == {3, 4, 50, 51, 52}


def test_a_batch_that_was_overwritten_in_place_is_noticed() -> None:
    ring = make_ring(lanes=1, rows=8)
    write_episode(ring, 0, first=0, decisions=5)
    source = InPlace(ring)
    source.refresh()
    everything = torch.arange(5)
    assert not source.overtaken(everything)
    write_episode(ring, 0, first=50, decisions=3)
    assert source.overtaken(everything)
    assert not source.overtaken(everything[3:])
