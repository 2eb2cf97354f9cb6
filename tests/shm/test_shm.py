"""Shared memory: layout, slots, wake-ups, counters."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsrl_async.shm import events
from dsrl_async.shm.arena import ALIGNMENT, Arena, layout
from dsrl_async.shm.counters import ACTOR_PHASES, Counters, Stop, counter_fields
from dsrl_async.shm.slots import Slots

DTYPES = ["uint8", "bool", "int32", "int64", "float32", "float64"]


@given(st.lists(st.tuples(st.lists(st.integers(0, 7), max_size=4), st.sampled_from(DTYPES)), min_size=1, max_size=12))
def test_arrays_are_aligned_disjoint_and_inside(shapes: list) -> None:
    fields = {f"array{index}": (tuple(shape), dtype) for index, (shape, dtype) in enumerate(shapes)}
    offsets, size = layout(fields)
    end = 0
    for name, (shape, dtype) in fields.items():
        assert offsets[name] % ALIGNMENT == 0
        assert offsets[name] >= end
        end = offsets[name] + int(np.prod(shape)) * np.dtype(dtype).itemsize
    assert end <= size


def test_child_process_sees_what_is_written_and_the_other_way_round() -> None:
    arena = Arena.create({"a": ((3,), "int64"), "b": ((2, 2), "float32")})
    arena["a"][:] = [1, 2, 3]
    code = (
        "import json, sys; from dsrl_async.shm.arena import Arena; "
        "arena = Arena.attach(json.loads(sys.argv[1])); arena['b'][1, 1] = arena['a'].sum()"
    )
    import json

    subprocess.run(
        [sys.executable, "-c", code, json.dumps(arena.describe())], pass_fds=[arena.fd], check=True, timeout=60
    )
    assert arena["b"][1, 1] == 6


def test_memory_has_no_name_and_goes_with_its_last_user() -> None:
    before = set(os.listdir("/dev/shm"))
    arena = Arena.create({"a": ((1000,), "uint8")})
    assert set(os.listdir("/dev/shm")) == before
    fd = arena.fd
    arena.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_attaching_with_a_larger_layout_is_refused() -> None:
    arena = Arena.create({"a": ((10,), "uint8")})
    with pytest.raises(ValueError, match="this layout needs"):
        Arena(arena.fd, {"a": ((1000,), "uint8")})


def test_event_wakes_waits_and_is_cleared() -> None:
    fd = events.create()
    start = time.monotonic()
    assert not events.wait(fd, 0.05)
    assert time.monotonic() - start >= 0.04
    events.notify(fd)
    events.notify(fd)
    assert events.wait(fd, 5.0)
    assert not events.wait(fd, 0.0)
    events.close([fd])


def request(slots: Slots, lane: int, value: int, incarnation: int = 1, count: int = 1) -> int:
    slots.state[lane] = value
    return slots.request(lane, incarnation, count)


def test_requests_are_ready_in_order_of_arrival_until_answered(memory: Arena) -> None:
    slots = Slots(memory)
    assert len(slots.ready()) == 0
    second = request(slots, 1, 7)
    time.sleep(0.001)
    first = request(slots, 0, 8)
    assert slots.ready().tolist() == [1, 0]
    actions = np.full((1, 10, 7), 0.5, np.float32)
    noise = np.ones((1, 32), np.float32)
    answered = slots.answer(np.array([1]), np.array([second]), actions, noise, policy_version=3)
    assert answered.tolist() == [1]
    assert slots.answered(1, second)
    assert not slots.answered(0, first)
    assert slots.ready().tolist() == [0]
    assert slots.policy_version[1] == 3
    assert (slots.action_chunk[1] == 0.5).all()


def test_answer_for_a_dead_incarnation_is_dropped(memory: Arena) -> None:
    slots = Slots(memory)
    old = request(slots, 0, 1, incarnation=1, count=9)
    new = request(slots, 0, 2, incarnation=2, count=1)
    assert old != new
    answered = slots.answer(
        np.array([0]), np.array([old]), np.ones((1, 10, 7), np.float32), np.ones((1, 32), np.float32), 1
    )
    assert len(answered) == 0
    assert (slots.action_chunk[0] == 0).all()
    assert slots.ready().tolist() == [0]


def test_incarnation_is_that_of_the_last_request(memory: Arena) -> None:
    slots = Slots(memory)
    assert [slots.incarnation(lane) for lane in (0, 1)] == [0, 0]
    request(slots, 0, 1, incarnation=1, count=2**32 - 1)
    request(slots, 1, 1, incarnation=2**20, count=1)
    assert [slots.incarnation(lane) for lane in (0, 1)] == [1, 2**20]
    request(slots, 0, 1, incarnation=2, count=1)
    assert slots.incarnation(0) == 2


def test_the_others_of_a_batch_get_their_own_answers_when_one_has_died(memory: Arena) -> None:
    slots = Slots(memory)
    old, wanted = request(slots, 0, 1, incarnation=1), request(slots, 1, 2)
    new = request(slots, 0, 3, incarnation=2)
    actions = np.stack([np.full((10, 7), value, np.float32) for value in (1, 2)])
    noise = np.stack([np.full(32, value, np.float32) for value in (1, 2)])
    assert slots.answer(np.array([0, 1]), np.array([old, wanted]), actions, noise, 5).tolist() == [1]
    assert not slots.answered(0, new)
    assert slots.answered(1, wanted)
    assert (slots.action_chunk[0] == 0).all()
    assert (slots.action_chunk[1] == 2).all()
    assert (slots.noise[1] == 2).all()
    assert slots.policy_version.tolist() == [0, 5]


def test_counters_have_no_shared_elements_and_snapshots_are_copies(memory: Arena) -> None:
    counters = Counters(memory)
    counters.actor_decisions[:] = [3, 4]
    snapshot = counters.snapshot()
    counters.actor_decisions[0] = 100
    assert counters.decisions() == 104
    assert snapshot["actor_decisions"].tolist() == [3, 4]
    assert len(snapshot) == len(counter_fields(2))


def test_counters_have_the_dtype_and_the_shape_that_they_are_annotated_with() -> None:
    arena = Arena.create(counter_fields(3))
    counters = Counters(arena)
    assert counters.actor_env_steps is arena["actor/env_steps"]
    layouts = {name: (array.shape, array.dtype.name) for name, array in counters.snapshot().items()}
    assert layouts["actor_env_steps"] == ((3,), "int64")
    assert layouts["actor_phase_s"] == ((3, len(ACTOR_PHASES)), "float64")
    assert layouts["learner_updates"] == ((1,), "int64")
    assert layouts["learner_metrics"] == ((16,), "float32")
    with pytest.raises(AttributeError):
        counters.actor_decision  # type: ignore[attr-defined]  # noqa: B018


def test_stop_is_told_to_all_who_share_the_memory(memory: Arena) -> None:
    mine, theirs = Counters(memory), Counters(memory)
    assert theirs.stop is Stop.RUNNING
    for who in (Stop.WORKERS, Stop.EVERYONE):
        mine.stop = who
        assert theirs.stop is who
        assert theirs.control_stop[0] == who.value
