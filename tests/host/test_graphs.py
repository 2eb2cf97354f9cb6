"""Captures, on a pretended GPU (`support.fake_cuda`): what they share, and what a failed one leaves behind."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from support.fake_cuda import NOT_WHILE_CAPTURING, SPOILT, CUDAGraph, FakeCuda

from dsrl_async.host import graphs
from dsrl_async.host.graphs import (
    HIGH_PRIORITY,
    NORMAL_PRIORITY,
    WARMUP_RUNS,
    Captured,
    CaptureError,
    capture,
    first_cause,
    graphs_of,
)
from dsrl_async.shm.counters import Graphs

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    graphs.capture_stream.cache_clear()
    yield FakeCuda().install(monkeypatch)
    graphs.capture_stream.cache_clear()


def captured(*arguments: object, **named: object) -> Captured:
    result = capture(*arguments, **named)  # type: ignore[arg-type]
    assert result is not None
    return result


def appending(cuda: FakeCuda, done: list[str], name: str, size: int = 0) -> Callable[[], None]:
    """A function to be captured, which appends `name` to `done` and needs `size` bytes for a while."""

    def function() -> None:
        with cuda.memory(size):
            cuda.launch(lambda: done.append(name))

    return function


def test_functions_are_rehearsed_captured_and_replayed_in_their_order(cuda: FakeCuda) -> None:
    done: list[str] = []
    halves = [appending(cuda, done, name) for name in ("encode", "denoise")]
    replays, _ = captured(halves, GPU, None, "the policy", "policy.graphs")
    assert done == ["encode", "denoise"] * WARMUP_RUNS  # and nothing was done while it was captured
    assert {stream for stream, _ in cuda.done} == set(cuda.streams)
    done.clear()
    cuda.done.clear()
    for replay in (*replays, *replays):
        replay()
    assert done == ["encode", "denoise"] * 2
    assert {stream for stream, _ in cuda.done} == {cuda.default}
    side = cuda.streams[0]
    assert side.waited_for == [cuda.default]  # which has filled the buffers
    assert cuda.default.waited_for == [side]
    assert cuda.current is cuda.default


def test_captures_that_share_a_pool_share_its_memory(cuda: FakeCuda) -> None:
    """What all sizes of a policy take is what the largest takes, since only one of them runs at a time."""
    pool = None
    for size in (800, 400, 200, 100):
        halves = [appending(cuda, [], "encode", size), appending(cuda, [], "denoise", size // 2)]
        pool = captured(halves, GPU, pool, f"batches of {size}", "policy.graphs").pool
    assert pool is not None
    assert cuda.reserved(pool) == 800
    assert cuda.reserved(0) <= 800  # for the rehearsals


def test_there_is_one_stream_for_each_device_and_priority(cuda: FakeCuda) -> None:
    for device, priority in 2 * [(GPU, NORMAL_PRIORITY), (GPU, HIGH_PRIORITY), (torch.device("cuda"), HIGH_PRIORITY)]:
        captured([lambda: None], device, None, "anything", "policy.graphs", priority)
    captured([lambda: None], torch.device("cuda", 1), None, "anything", "policy.graphs", HIGH_PRIORITY)
    assert [(stream.device, stream.priority) for stream in cuda.streams] == [(0, 0), (0, -1), (1, -1)]


# --- failures -------------------------------------------------------------------------------------------------------


def fails_in_the_rehearsal(cuda: FakeCuda) -> None:
    raise RuntimeError("planted")


def raises_in_the_capture(cuda: FakeCuda) -> None:
    if cuda.capturing:
        raise RuntimeError("planted")


def spoils_the_capture(cuda: FakeCuda) -> None:
    cuda.synchronize()


def spoils_the_capture_unseen(cuda: FakeCuda) -> None:
    """As when a library swallows the error of a call."""
    if cuda.capturing:
        with pytest.raises(RuntimeError):
            cuda.synchronize()


def needs_more_memory_in_the_capture(cuda: FakeCuda) -> None:
    cuda.capacity = 0 if cuda.capturing else 10**12
    with cuda.memory(200):
        pass


FAILURES: dict[Callable[[FakeCuda], None], str] = {
    fails_in_the_rehearsal: "planted",
    raises_in_the_capture: "planted",
    spoils_the_capture: NOT_WHILE_CAPTURING.splitlines()[0],
    spoils_the_capture_unseen: SPOILT.splitlines()[0],
    needs_more_memory_in_the_capture: "CUDA out of memory. Tried to allocate 200 bytes.",
}
"""What a captured function does -> the cause that the user is told."""


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.__name__)
def test_a_failed_capture_leaves_nothing_behind_and_names_its_cause(
    cuda: FakeCuda, failure: Callable[[FakeCuda], None]
) -> None:
    done: list[str] = []
    first = appending(cuda, done, "encode", 100)
    with pytest.raises(CaptureError) as error:
        capture([first, lambda: failure(cuda)], GPU, None, "batches of 4", "policy.graphs")
    advice = "policy.graphs: off does without them"
    assert str(error.value) == f"no CUDA graphs of batches of 4 could be captured: {FAILURES[failure]}; {advice}"
    assert cuda.current is cuda.default
    assert cuda.capturing is None
    del error
    gc.collect()
    assert not cuda.graphs, "a part of what could not be captured is kept"


def test_a_capture_that_cannot_begin_leaves_the_stream(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: CUDAGraph, pool: int) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(cuda, "begin_capture", refuse)
    with pytest.raises(CaptureError, match="planted"):
        capture([lambda: None], GPU, None, "anything", "policy.graphs")
    assert cuda.current is cuda.default


def test_what_is_no_failure_of_cuda_is_raised_as_it_is(cuda: FakeCuda) -> None:
    def wrong() -> None:
        raise TypeError("planted")

    with pytest.raises(TypeError, match="planted"):
        capture([wrong], GPU, None, "anything", "policy.graphs")
    assert cuda.current is cuda.default


def test_the_fake_leaves_torchs_allocator_in_a_spoilt_capture(cuda: FakeCuda) -> None:
    """This is why the process has to end: from then on memory would come from the graphs' pool."""
    with pytest.raises(CaptureError):
        capture([lambda: spoils_the_capture(cuda)], GPU, None, "anything", "policy.graphs")
    assert cuda.allocator_captures


def test_the_first_cause_is_found_behind_what_it_led_to() -> None:
    def fail(hidden: bool) -> None:
        try:
            try:
                raise KeyError("first")
            except KeyError:
                raise ValueError("second")  # noqa: B904
        except ValueError as error:
            raise RuntimeError("third") from (None if hidden else error)

    with pytest.raises(RuntimeError) as error:
        fail(hidden=False)
    assert isinstance(first_cause(error.value), KeyError)
    with pytest.raises(RuntimeError) as error:
        fail(hidden=True)
    assert first_cause(error.value) is error.value


def test_there_are_no_graphs_off_cuda(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert capture([lambda: None], CPU, None, "batches of 4", "policy.graphs") is None
    assert "no CUDA graphs for batches of 4: it runs on cpu" in caplog.text


# --- what the run is told -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "device", "before", "wanted", "after"),
    [
        ("auto", CPU, Graphs.NONE, False, Graphs.NONE),
        ("off", CPU, Graphs.NONE, False, Graphs.NONE),
        ("auto", GPU, Graphs.NONE, True, Graphs.CAPTURED),
        ("off", GPU, Graphs.NONE, False, Graphs.OFF),
        ("auto", GPU, Graphs.CAPTURED, True, Graphs.CAPTURED),  # the process before it died of something else
        ("auto", GPU, Graphs.FAILED, False, Graphs.FAILED),
        ("off", GPU, Graphs.FAILED, False, Graphs.FAILED),
    ],
)
def test_graphs_are_captured_where_they_can_and_may_be(
    setting: str, device: torch.device, before: Graphs, wanted: bool, after: Graphs
) -> None:
    state = np.array([before])
    with graphs_of(setting, device, state) as graphs:  # type: ignore[arg-type]
        assert graphs is wanted
    assert state[0] == after


def test_a_failure_is_noted_for_the_successor() -> None:
    state = np.zeros(1, np.int64)
    with pytest.raises(CaptureError), graphs_of("auto", GPU, state):
        raise CaptureError("planted")
    assert state[0] == Graphs.FAILED
    with pytest.raises(KeyError), graphs_of("auto", GPU, state := np.zeros(1, np.int64)):
        raise KeyError("something else")
    assert state[0] == Graphs.NONE
