"""Weights over ZeroMQ: exact, newest only, kept for late joiners, refused when they do not fit."""

from __future__ import annotations

import inspect
import logging
import os
import shutil
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import zmq
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from dsrl_async.run import weights
from dsrl_async.run.channel import Ends, SocketDirectory, make_ends
from dsrl_async.run.weights import HEADER, LARGEST_WEIGHT, WeightPublisher, Weights, WeightSubscriber, decode, encode

UPDATES = 10**6
LAYOUT = 0xFEDC_BA98_7654_3210


@given(
    st_numpy.arrays(np.float32, st.integers(0, 50), elements=st.floats(-LARGEST_WEIGHT, LARGEST_WEIGHT, width=32)),
    st.integers(0, 2**62),
)
def test_frames_carry_every_bit(flat: np.ndarray, version: int) -> None:
    weights = decode(encode(version, LAYOUT, flat), LAYOUT, flat.size)
    assert weights.policy_version == version
    assert weights.flat.tobytes() == flat.tobytes()


@given(st.binary(max_size=80))
def test_foreign_bytes_are_refused(frame: bytes) -> None:
    with pytest.raises(ValueError, match="weight frame"):
        decode(frame, LAYOUT, 4)


def test_other_layout_size_or_cut_off_frames_are_refused() -> None:
    frame = encode(1, LAYOUT, np.ones(4, np.float32))
    for bad, layout, size in (
        (frame, LAYOUT + 1, 4),
        (frame, LAYOUT, 5),
        (frame[:-1], LAYOUT, 4),
        (frame[: HEADER.size], LAYOUT, 4),
    ):
        with pytest.raises(ValueError, match="weight frame"):
            decode(bad, layout, size)


@pytest.fixture
def ends() -> Iterator[Ends]:
    directory = SocketDirectory()
    yield make_ends(directory.endpoint)
    directory.close()


def wait_for(subscriber: WeightSubscriber, publisher: WeightPublisher, version: int) -> Weights:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        publisher.serve_late_joiners()
        weights = subscriber.newest(UPDATES)
        if weights is not None and weights.policy_version == version:
            return weights
        time.sleep(0.01)
    raise AssertionError(f"version {version} did not arrive")


def test_late_joiners_get_the_last_and_slow_readers_only_the_newest(ends: Ends) -> None:
    publisher = WeightPublisher(ends.publisher)
    publisher.publish(encode(1, LAYOUT, np.full(3, 1, np.float32)))
    early = WeightSubscriber(ends.subscriber, LAYOUT, 3)
    assert (wait_for(early, publisher, 1).flat == 1).all()
    late = WeightSubscriber(ends.subscriber, LAYOUT, 3)
    assert wait_for(late, publisher, 1).policy_version == 1
    wait_for(early, publisher, 1)  # it is sent to all when somebody joins
    for version in range(2, 60):
        publisher.publish(encode(version, LAYOUT, np.full(3, version, np.float32)))
    assert (wait_for(early, publisher, 59).flat == 59).all()
    assert early.newest(UPDATES) is None
    # The learner dies and is replaced: subscribers find the new one by themselves.
    publisher.close()
    successor = WeightPublisher(ends.publisher)
    successor.publish(encode(500, LAYOUT, np.full(3, 500, np.float32)))
    assert wait_for(early, successor, 500).policy_version == 500
    for socket in (early, late, successor):
        socket.close()


def test_a_socket_that_a_cleaner_has_removed_is_made_again(ends: Ends) -> None:
    publisher = WeightPublisher(ends.publisher)
    publisher.publish(encode(1, LAYOUT, np.full(3, 1, np.float32)))
    early = WeightSubscriber(ends.subscriber, LAYOUT, 3)
    wait_for(early, publisher, 1)
    shutil.rmtree(Path(ends.publisher.endpoint.removeprefix("ipc://")).parent)
    late = WeightSubscriber(ends.subscriber, LAYOUT, 3)
    wait_for(late, publisher, 1)
    wait_for(early, publisher, 1)
    for socket in (early, late, publisher):
        socket.close()


def test_those_who_are_connected_stay_so_where_the_socket_cannot_be_made_again(
    ends: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = WeightPublisher(ends.publisher)
    publisher.publish(encode(1, LAYOUT, np.full(3, 1, np.float32)))
    early = WeightSubscriber(ends.subscriber, LAYOUT, 3)
    wait_for(early, publisher, 1)
    directory = Path(ends.publisher.endpoint.removeprefix("ipc://")).parent
    shutil.rmtree(directory)
    directory.touch()
    for _ in range(3):
        publisher.serve_late_joiners()
    publisher.publish(encode(2, LAYOUT, np.full(3, 2, np.float32)))
    wait_for(early, publisher, 2)
    assert caplog.text.count("cannot be made again") == 1
    directory.unlink()
    wait_for(early, publisher, 2)  # made again, and sent to all who come back
    early.close()
    publisher.close()


# ---- whatever comes, the subscriber drops it or takes it; it never raises

SIZE, LAST = 5, 10
GOOD = np.array([0.5, -3.0, 1e-30, LARGEST_WEIGHT, 0.0], np.float32)
MOST_EXAMPLES = int(os.environ.get("DSRL_FUZZ_EXAMPLES", "100"))
FIELDS = {"magic": (0, 8), "layout": (8, 8), "version": (16, 8), "length": (24, 8), "checksum": (32, 8)}


def any_bytes(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


@st.composite
def frames(draw: st.DrawFn) -> tuple[bytes, bool]:
    """A frame, and whether it is to be taken."""
    bits = draw(st.lists(st.integers(0, 2**32 - 1), min_size=SIZE, max_size=SIZE))
    flat = draw(st.sampled_from([GOOD, np.array(bits, np.uint32).view(np.float32)]))
    special = draw(st.sampled_from([None, np.nan, np.inf, -np.inf, 3e38, -3e38, LARGEST_WEIGHT * 1.01]))
    if special is not None:
        flat = flat.copy()
        flat[draw(st.integers(0, SIZE - 1))] = special
    version = draw(st.integers(LAST, UPDATES) | st.integers(-(2**63), 2**63 - 1))
    finite = all(abs(value) <= LARGEST_WEIGHT for value in flat.tolist())
    frame, wanted = encode(version, LAYOUT, flat), finite and LAST <= version <= UPDATES
    match draw(st.sampled_from(["as it is", "bit", "field", "length", "network", "crafted", "mixed", "anything"])):
        case "bit":
            bit = draw(st.integers(0, 8 * len(frame) - 1))
            changed = bytearray(frame)
            changed[bit // 8] ^= 1 << bit % 8
            return bytes(changed), False
        case "field":
            at, size = FIELDS[draw(st.sampled_from(list(FIELDS)))]
            changed = bytearray(frame)
            changed[at : at + size] = draw(any_bytes(size))
            return bytes(changed), wanted and changed == frame
        case "length":
            end = draw(st.integers(0, len(frame) - 1))
            return draw(st.sampled_from([frame[:end], frame + draw(st.binary(min_size=1, max_size=64))])), False
        case "network":  # whole in itself
            layout, size = draw(st.sampled_from([(LAYOUT + 1, SIZE), (LAYOUT, SIZE - 1), (LAYOUT, SIZE + 1)]))
            return encode(LAST, layout, np.resize(GOOD, size)), False
        case "crafted":  # with the right checksum, but of another length than its header says
            values = np.resize(GOOD, draw(st.sampled_from([SIZE - 1, SIZE + 1]))).tobytes()
            says = draw(st.sampled_from([SIZE, len(values) // 4]))
            values = GOOD.tobytes() if says != SIZE else values
            checksum = weights._checksum(LAYOUT, LAST, says, values)
            return HEADER.pack(weights.MAGIC, LAYOUT, LAST, says, checksum) + values, False
        case "mixed":
            other = encode(version, LAYOUT, GOOD[::-1].copy())
            cut = draw(st.integers(1, len(frame) - 1))
            mixed = frame[:cut] + other[cut:]
            return mixed, (mixed == frame and wanted) or (mixed == other and LAST <= version <= UPDATES)
        case "anything":
            return draw(st.binary(max_size=2 * len(frame))), False
    return frame, wanted


class Delivers:
    """In the place of a subscriber's socket."""

    frame: bytes | None = None

    def recv(self, flags: int, copy: bool) -> Any:
        if self.frame is None:
            raise zmq.Again
        frame, self.frame = self.frame, None
        return SimpleNamespace(buffer=memoryview(frame))


def fuzz(module: Any, examples: int) -> tuple[int, Counter[str]]:
    """How many frames the module's subscriber took, and how often it warned of what; raises if one was misjudged."""
    directory, taken, warnings = SocketDirectory(), [0], Counter[str]()
    subscriber = module.WeightSubscriber(make_ends(directory.endpoint).subscriber, LAYOUT, SIZE)
    socket, subscriber.socket = subscriber.socket, Delivers()
    handler = logging.Handler()
    handler.emit = lambda record: warnings.update([record.getMessage()])  # type: ignore[method-assign]
    module.logger.addHandler(handler)

    @settings(max_examples=examples, deadline=None, database=None, phases=[Phase.generate])
    @given(frames())
    def judge(case: tuple[bytes, bool]) -> None:
        frame, wanted = case
        subscriber._version, subscriber.socket.frame = LAST, frame
        found = subscriber.newest(UPDATES)
        assert (found is not None) == wanted
        taken[0] += found is not None
        if found is not None:
            assert frame == encode(found.policy_version, LAYOUT, found.flat)
        assert subscriber.newest(UPDATES) is None

    try:
        judge()
    finally:
        module.logger.removeHandler(handler)
        subscriber.socket = socket
        subscriber.close()
        directory.close()
    return taken[0], warnings


def test_frames_that_do_not_fit_are_dropped_with_one_warning_of_each_kind() -> None:
    taken, warnings = fuzz(weights, MOST_EXAMPLES)
    assert 0 < taken < MOST_EXAMPLES
    assert 4 <= len(warnings) <= len(get_args(weights.Kind))
    assert set(warnings.values()) == {1}
    assert all("weight frame" in message and "it is dropped" in message for message in warnings)
    if MOST_EXAMPLES > 1000:
        print(f"{MOST_EXAMPLES} frames, {taken} taken, {len(warnings)} warnings")


PLANTED = {
    "short": ("if len(frame) < HEADER.size:", "if False:"),
    "magic": ("if magic != MAGIC:", "if False:"),
    "layout": ("if frame_hash != layout_hash or length != size:", "if length != size:"),
    "size": ("if frame_hash != layout_hash or length != size:", "if frame_hash != layout_hash:"),
    "length": ("if len(frame) != HEADER.size + 4 * size:", "if len(frame) < HEADER.size + 4 * size:"),
    "checksum": ("!= checksum:", "== -1:"),
    "values": ("if not plausible(flat):", "if False:"),
    "NaN": ("flat.min() >= -LARGEST_WEIGHT and flat.max()", "np.nanmin(flat) >= -LARGEST_WEIGHT and np.nanmax(flat)"),
    "one side": ("flat.min() >= -LARGEST_WEIGHT and flat.max()", "flat.max()"),
    "older": ("self._version <= weights.policy_version <=", "weights.policy_version <="),
    "jump": ("weights.policy_version <= updates:", "weights.policy_version:"),
    "warnings": ("self._unwarned.remove(error.kind)", "pass"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_check_that_is_missing_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, (check, instead) = inspect.getsource(weights), PLANTED[fault]
    assert source.count(check) == 1
    planted = ModuleType("planted")
    monkeypatch.setitem(sys.modules, "planted", planted)
    exec(source.replace(check, instead), planted.__dict__)
    if fault == "warnings":
        assert set(fuzz(planted, 100)[1].values()) != {1}
        return
    with pytest.raises((AssertionError, struct.error, ValueError)):
        fuzz(planted, 6000)
