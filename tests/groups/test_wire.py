"""What travels between a group and the learner's machine: rows bit for bit, and nothing that is garbled."""

from __future__ import annotations

import os
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mirrors import KINDS, TASKS, Player, assert_mirrored, make_arena

from dsrl_async import __version__
from dsrl_async.groups import wire
from dsrl_async.groups.wire import BadMessage, Complaints, Hello, State, check_rows, collect, replay, row_type
from dsrl_async.run.channel import write_secret
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters
from dsrl_async.shm.replay import ReplayRing, replay_fields

EXAMPLES = int(os.environ.get("DSRL_FUZZ_EXAMPLES", "50"))


def carry(origin: ReplayRing, counters: Counters, mirror: ReplayRing, lane: int, other: int, sent: int) -> int:
    """Bring the rows from number `sent` on from a lane to another one; returns the next number."""
    dtype, numbers = row_type(origin), np.arange(sent, int(origin.head[lane]))
    if len(numbers):
        rows = collect(origin, np.full(len(numbers), lane), numbers, counters.actor_started_episodes, dtype)
        for row in check_rows(rows.tobytes(), row_type(mirror), origin.lanes, TASKS):
            assert row["lane"] == lane
            replay(mirror, other, row)
    return sent + len(numbers)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(
    portions=st.lists(st.integers(0, 12), max_size=12),
    sizes=st.tuples(st.integers(16, 40), st.integers(4, 40)),
    base=st.integers(0, 9),
    seed=st.integers(0, 999),
)
def test_a_lane_arrives_bit_for_bit(
    kind: str, portions: list[int], sizes: tuple[int, int], base: int, seed: int
) -> None:
    of_group, of_learner = make_arena(2, sizes[0], kind), make_arena(3, sizes[1], kind)
    origin, mirror, player = ReplayRing(of_group), ReplayRing(of_learner), Player(of_group, 1, seed)
    Player(of_learner, 2, seed + 1).play(base)  # what is there already, of an earlier incarnation
    sent = 0
    for portion in portions:
        player.play(portion)
        if portion % 5 == 4:
            player.begin()  # the worker died
        sent = carry(origin, player.counters, mirror, 1, 2, sent)
        assert_mirrored(origin, 1, mirror, 2, base)


def test_every_column_travels_and_the_layout_is_the_rings() -> None:
    for kind in KINDS:
        ring = ReplayRing(make_arena(2, 8, kind))
        dtype = row_type(ring)
        assert set(ring.rows) - {"complete"} < set(dtype.names or ())
        assert dtype.itemsize == sum(dtype[name].itemsize for name in dtype.names or ())  # packed
    layouts = {
        wire.layout_of(row_type(ReplayRing(arena)))
        for arena in (make_arena(2, 8), make_arena(4, 16), make_arena(2, 8, kind="na"))
    }
    assert len(layouts) == 2  # whatever the lanes and their length
    fields = replay_fields(1, 2, state_dim=8, noise_width=32)
    row = row_type(ReplayRing(Arena.create(fields)))
    assert row.itemsize == 64 * 64 * 3 + 8 * 4 + 32 * 4 + 3 * 8 + 3 * 4 + 2


def test_a_row_that_is_overwritten_before_it_is_collected_is_no_row() -> None:
    arena = make_arena(1, 8)
    ring, player = ReplayRing(arena), Player(arena, 0, 0)
    player.play(20)
    lanes, started = np.zeros(1, np.int64), player.counters.actor_started_episodes
    # Of row 13 the outcome of row 12 travels, which is overwritten next.
    collect(ring, lanes, np.array([14]), started, row_type(ring))
    for number in (13, 12, 3):
        with pytest.raises(AssertionError, match="overwritten"):
            collect(ring, lanes, np.array([number]), started, row_type(ring))


# ---- garbled frames


@pytest.fixture(scope="module")
def frame() -> bytes:
    arena = make_arena(2, 16, kind="na")
    Player(arena, 0, 1).play(7)
    counters, ring = Counters(arena), ReplayRing(arena)
    return collect(ring, np.zeros(7, np.int64), np.arange(7), counters.actor_started_episodes, row_type(ring)).tobytes()


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_garbled_frames_are_refused_or_are_rows_that_a_ring_takes(frame: bytes, data: st.DataObject) -> None:
    ring = ReplayRing(make_arena(2, 16, kind="na"))
    dtype = row_type(ring)
    match data.draw(st.sampled_from(["bits", "cut", "longer", "anything", "field"])):
        case "bits":
            changed = bytearray(frame)
            for bit in data.draw(st.lists(st.integers(0, 8 * len(frame) - 1), min_size=1, max_size=20)):
                changed[bit // 8] ^= 1 << bit % 8
            garbled = bytes(changed)
        case "cut":
            garbled = frame[: data.draw(st.integers(0, len(frame) - 1))]
        case "longer":
            garbled = frame + data.draw(st.binary(min_size=1, max_size=50))
        case "anything":
            garbled = data.draw(st.binary(max_size=3 * dtype.itemsize))
        case _:
            rows = np.frombuffer(frame, dtype).copy()
            names = [name for name in dtype.names or () if name not in ("image", "policy_images")]
            name = data.draw(st.sampled_from(names))
            row = rows[data.draw(st.integers(0, 6)) :][:1]
            raw = row[name].tobytes()
            row[name] = np.frombuffer(
                data.draw(st.binary(min_size=len(raw), max_size=len(raw))), row[name].dtype
            ).reshape(row[name].shape)
            garbled = rows.tobytes()
    try:
        rows = check_rows(garbled, dtype, 2, TASKS)
    except BadMessage:
        return
    ring.begin_episode(
        0, ring.rows["image"][0, 0], ring.rows["state"][0, 0], wire.Seen(ring.rows["policy_images"][0, 0], 0)
    )
    for row in rows:
        assert row["lane"] < 2
        replay(ring, 0, row)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lane", 2),
        ("number", -1),
        ("number", 2**62 + 1),
        ("started_episodes", -1),
        ("started_episodes", 2**62 + 1),
        ("steps", -1),
        ("policy_version", -1),
        ("policy_version", 2**62 + 1),
        ("task_index", -1),
        ("task_index", TASKS),
    ],
)
def test_a_number_that_cannot_be_is_refused(frame: bytes, name: str, value: int) -> None:
    ring = ReplayRing(make_arena(2, 16, kind="na"))
    rows = np.frombuffer(frame, row_type(ring)).copy()
    check_rows(rows.tobytes(), rows.dtype, 2, TASKS)
    rows[name][3] = value
    with pytest.raises(BadMessage, match=f"7 rows, of which one cannot be: its {name}$"):
        check_rows(rows.tobytes(), rows.dtype, 2, TASKS)


@pytest.mark.parametrize("name", ["completes", "terminal"])
def test_a_flag_is_0_or_1(frame: bytes, name: str) -> None:
    ring = ReplayRing(make_arena(2, 16, kind="na"))
    rows = np.frombuffer(frame, row_type(ring)).copy()
    rows[name].view("u1")[2] = 2
    with pytest.raises(BadMessage):
        check_rows(rows.tobytes(), rows.dtype, 2, TASKS)
    rows = np.frombuffer(frame, row_type(ring)).copy()
    rows["completes"][0] = True  # the first row of a lane completes nothing
    with pytest.raises(BadMessage):
        check_rows(rows.tobytes(), rows.dtype, 2, TASKS)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.binary(max_size=200)
    | st.text(max_size=50).map(str.encode)
    | st.just(b'{"version": 1, "layout": "", "lanes": 2}')
)
def test_foreign_greetings_states_and_names_are_refused(frame: bytes) -> None:
    with pytest.raises(BadMessage):
        Hello.decode(frame)
    with pytest.raises(BadMessage):
        State.decode(frame, 40)
    if not wire.IDENTITY.fullmatch(frame):
        with pytest.raises(BadMessage):
            wire.sender(frame)


@pytest.mark.parametrize("plain", [b"[1]", b"[" * 5000, b'"x"', b"{}", b'{"version": "", "layout": "", "lanes": true}'])
def test_what_json_can_be_beside_a_greeting_is_refused(plain: bytes) -> None:
    with pytest.raises(BadMessage, match="is no greeting"):
        Hello.decode(plain)


@given(
    st.integers(0, 2**62),
    st.lists(st.integers(0, 2**62), min_size=1, max_size=9),
    st.integers(0, 9),
    st.integers(-(2**63), -1),
)
def test_a_state_arrives_as_it_was(number: int, stored: list[int], at: int, negative: int) -> None:
    state = State(number, 2, 3, 1, 5, np.array(stored))
    frame = state.encode()
    found = State.decode(frame, len(stored))
    assert found[:-1] == state[:-1]
    assert found.stored.tolist() == stored
    for bad, lanes in ((frame, len(stored) + 1), (frame[:-1], len(stored)), (frame + b"\0" * 8, len(stored))):
        with pytest.raises(BadMessage):
            State.decode(bad, lanes)
    numbers = np.frombuffer(frame, "<i8").copy()
    numbers[at % len(numbers)] = negative
    with pytest.raises(BadMessage):
        State.decode(numbers.tobytes(), len(stored))


def test_one_warning_of_each_kind(caplog: pytest.LogCaptureFixture) -> None:
    complaints = Complaints()
    for _ in range(3):
        for kind in get_args(wire.Kind):
            complaints.add(BadMessage(kind, f"is of the kind {kind}"))
    assert len(caplog.records) == len(get_args(wire.Kind))
    assert "it is dropped" in caplog.text


# ---- who may take part


def test_a_greeting_that_does_not_fit_is_refused_in_a_sentence() -> None:
    hello = Hello(__version__, "abc", 8)
    assert Hello.decode(hello.encode()) == hello
    assert wire.why_refused(3, hello, "abc", 8) is None
    for other, why in (
        (hello._replace(version="0.0.1"), "group 3 runs dsrl_async '0.0.1' and the learner's machine"),
        (hello._replace(lanes=4), "group 3 has 4 environments, and the learner's machine expects 8"),
        (hello._replace(layout="xyz"), "the rows of group 3 have another layout"),
    ):
        sentence = wire.why_refused(3, other, "abc", 8)
        assert sentence is not None
        assert sentence.startswith(why)
        assert len(sentence) < wire.LONGEST_SENTENCE
    long = wire.why_refused(3, hello._replace(version="9" * 10**6), "abc", 8)
    assert long is not None
    assert len(long) < wire.LONGEST_SENTENCE


def test_names_say_who_sends() -> None:
    assert wire.sender(wire.identity(3, 17)) == (3, 17)
    for name in (b"", b"3", b"3.", b"3.1.2", b"-3.1", b"\x0012345", "³.1".encode(), b"3.1\n", b"9" * 100 + b".1"):
        with pytest.raises(BadMessage, match="which is no group"):
            wire.sender(name)


def test_a_link_has_new_keys_and_reaches_a_child_by_a_descriptor() -> None:
    server, client = wire.make_link("ipc:///tmp/a", "ipc:///tmp/b")
    assert server.rows.secret not in (client.rows.secret, server.weights.secret)
    assert (client.rows.endpoint, client.weights.endpoint) == ("ipc:///tmp/a", "ipc:///tmp/b")
    assert wire.read_link(write_secret(client)) == client
    assert wire.Link.of_plain([list(client.rows), list(client.weights)]) == client
