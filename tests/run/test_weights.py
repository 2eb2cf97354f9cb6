"""Weights over ZeroMQ: exact, newest only, kept for late joiners, refused when they do not fit."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

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
