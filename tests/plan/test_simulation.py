"""The simulated throughput, against cases worked out by hand and queueing theory; how batches are chosen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsrl_async.plan.simulation import EnvironmentTimes, Host, simulate, simulate_lock_step
from dsrl_async.run.inference.batching import FEWEST_USED_ROWS, choose_batch


def every(seconds: float, first: float | None = None) -> Iterator[float]:
    """An environment that always takes as long, but for the time until its first request."""
    return itertools.chain([seconds if first is None else first], itertools.repeat(seconds))


def test_one_environment_alternates_with_the_device() -> None:
    result = simulate([every(3.0)], lambda size: 1.0, [1], decisions=50)
    assert result.decisions_per_s == pytest.approx(1 / 4, rel=0.02)  # the first think time is not in the stretch
    assert result.device_busy == pytest.approx(1 / 4, rel=0.02)
    assert result.queue_wait_s.tolist() == [0.0] * 50
    assert result.latency_s.tolist() == [1.0] * 50


def test_who_comes_while_the_device_is_busy_waits_for_its_next_batch() -> None:
    """Service 1, thinking 10. Requests at 0, 0.5, 0.75: the first alone at 0, the others together at 1."""
    environments = [every(10.0, first) for first in (0.0, 0.5, 0.75)]
    result = simulate(environments, lambda size: 1.0, [1, 2, 3], decisions=3)
    assert result.queue_wait_s.tolist() == [0.0, 0.25, 0.5]
    assert result.latency_s.tolist() == [1.0, 1.25, 1.5]
    assert result.batch_size == 1.5
    assert result.device_busy == 1.0
    assert result.decisions_per_s == 3 / 2


def test_waiting_for_a_fuller_batch() -> None:
    """Requests at 0 and 0.3 become one batch at 0.3 when 0.5 may be waited, and two when 0.2 may."""
    patient = simulate([every(9.0, 0.0), every(9.0, 0.3)], lambda size: 1.0, [1, 2], 2, batch_wait_s=0.5)
    assert patient.queue_wait_s.tolist() == pytest.approx([0.0, 0.3])
    assert patient.batch_size == 2
    hasty = simulate([every(9.0, 0.0), every(9.0, 0.3)], lambda size: 1.0, [1, 2], 2, batch_wait_s=0.2)
    assert hasty.batch_size == 1
    # the first starts at 0.2, the other, for which there is nobody else to wait, 0.2 after the device is free
    assert hasty.queue_wait_s.tolist() == pytest.approx([0.2, 1.4 - 0.3])


def test_padding_is_paid_for() -> None:
    """Two always ready together; only batches of 4: the device works as for 4."""
    result = simulate([every(1.0), every(1.0)], lambda size: float(size), [4], decisions=40, skip=2)
    assert result.decisions_per_s == pytest.approx(2 / 5)
    assert result.batch_fill == 0.5
    assert result.device_busy == pytest.approx(4 / 5)


@pytest.mark.parametrize(
    ("overlap", "latency_s"), [(False, 0.25 + 0.5 + 4.0 + 1.0), (True, 0.25 + 0.5 + 4.0 + 0.25 + 1.0)]
)
def test_the_host_keeps_the_device_idle(overlap: bool, latency_s: float) -> None:
    """Two that are always ready together: 0.25 to launch, 0.5 to gather, 4 of the device, 1 to scatter.

    With overlap answers wait for a launch, here in vain: there is nobody to be served meanwhile.
    """
    host = Host(lambda count: count / 4, lambda count: 0.25, lambda count: count / 2, overlap)
    result = simulate([every(0.0), every(0.0)], lambda size: 4.0, [2], 100, skip=2, host=host)
    assert result.latency_s == pytest.approx(latency_s)
    assert result.decisions_per_s == pytest.approx(2 / latency_s, rel=0.01)


def test_overlap_leaves_a_busy_device_the_launch() -> None:
    """Many that are always ready: 0.25 to launch and 4 of the device, and nothing else, from one batch to the next."""
    host = Host(lambda count: 0.5, lambda count: 0.25, lambda count: 1.0, overlap=True)
    environments = [every(0.0, first) for first in (0.0, 0.0, 0.0, 0.0)]
    result = simulate(environments, lambda size: 4.0, [2], 100, skip=20, host=host)
    assert result.device_busy == pytest.approx(4 / 4.25, rel=0.01)
    serial = simulate(
        [every(0.0) for _ in range(4)], lambda size: 4.0, [2], 100, skip=20, host=host._replace(overlap=False)
    )
    assert serial.device_busy == pytest.approx(4 / 5.75, rel=0.01)


def test_a_saturated_device_serves_full_batches() -> None:
    result = simulate([every(0.01) for _ in range(100)], lambda size: 0.1 * size, range(1, 9), 2000, skip=500)
    assert result.decisions_per_s == pytest.approx(10)
    assert result.batch_size == pytest.approx(8)


@pytest.mark.parametrize("environments", [1, 3, 10])
def test_machine_repairman(environments: int) -> None:
    """Exponential times, one at a time: the M/M/1//N queue, whose server is idle with probability p0."""
    think, service = 1.0, 0.2
    rng = np.random.default_rng(0)

    def thinking() -> Iterator[float]:
        while True:
            yield float(rng.exponential(think))

    ratio = service / think
    weights = [
        math.factorial(environments) / math.factorial(environments - k) * ratio**k for k in range(environments + 1)
    ]
    busy = 1 - weights[0] / sum(weights)
    result = simulate(
        [thinking() for _ in range(environments)], lambda size: float(rng.exponential(service)), [1], 20_000, skip=1000
    )
    assert result.device_busy == pytest.approx(busy, rel=0.04)
    assert result.decisions_per_s == pytest.approx(busy / service, rel=0.04)
    # Little's law: all environments are either thinking or at the device
    assert environments / result.decisions_per_s == pytest.approx(think + result.latency_s.mean(), rel=0.04)


def test_lock_step_waits_for_the_slowest_of_each_round() -> None:
    """Rounds of max(1, 2) and max(3, 1), each with a batch of two that takes 1."""
    environments = [iter([1.0, 3.0]), iter([2.0, 1.0])]
    result = simulate_lock_step(environments, lambda size: 0.5 * size, [1, 2], decisions=4)
    # the stretch begins with the first batch, at 2: 1 for it, 3 for the round, 1 for the second
    assert result.decisions_per_s == 4 / 5
    assert result.device_busy == 2 / 5
    assert result.latency_s.tolist() == [1.0, 1.0, 2.0, 3.0]


def test_lock_step_serves_more_than_a_batch_one_after_the_other() -> None:
    result = simulate_lock_step([every(1.0) for _ in range(5)], lambda size: float(size), [1, 2], decisions=500)
    assert result.decisions_per_s == pytest.approx(5 / 6, rel=0.02)
    assert result.batch_size == pytest.approx(5 / 3)


def test_published_figures_of_lock_step_and_readiness() -> None:
    """An H100 at 1.3 x its bound, chunks of 60 ms, resets of 600 ms: the figures of docs/measurements/throughput.md."""
    times = EnvironmentTimes()
    expected = {8: (86, 28), 16: (162, 36), 32: (209, 48), 64: (209, 68)}
    for actors, (by_readiness, in_lock_step) in expected.items():

        def draws(actors: int = actors) -> list[Iterator[float]]:
            return [times.totals(1, lane) for lane in range(actors)]

        def service(size: int) -> float:
            return 1.3e-3 * max(5.2, 3.68 * size)

        assert simulate(draws(), service, range(1, 33), 12_000, 3000).decisions_per_s == pytest.approx(
            by_readiness, rel=0.03
        )
        assert simulate_lock_step(draws(), service, range(1, 33), 12_000).decisions_per_s == pytest.approx(
            in_lock_step, rel=0.04
        )


def test_drawn_times_have_the_given_means_and_belong_to_the_lane() -> None:
    times = EnvironmentTimes(chunk_s=0.06, sigma=0.3, reset_s=0.6, reset_probability=0.04)
    chunks, resets = np.array(list(itertools.islice(times.draw(0, 3), 40_000))).T
    assert chunks.mean() == pytest.approx(0.06, rel=0.01)
    assert np.log(chunks).std() == pytest.approx(0.3, rel=0.02)
    assert set(resets.tolist()) == {0.0, 0.6}
    assert (resets > 0).mean() == pytest.approx(0.04, rel=0.1)
    again, other = (list(itertools.islice(times.totals(0, lane), 5)) for lane in (3, 4))
    assert again == pytest.approx((chunks + resets)[:5])
    assert other != again
    assert next(EnvironmentTimes(0.0, 0.0, 0.0, 0.0).totals(0, 0)) == 0.0


@given(st.integers(1, 200), st.sets(st.integers(1, 64), min_size=1))
def test_a_batch_is_padded_little_or_there_is_no_smaller_one(ready: int, sizes: set[int]) -> None:
    increasing = sorted(sizes)
    count, size = choose_batch(ready, increasing)
    assert size in sizes
    assert 1 <= count <= min(ready, size)
    if count < size:
        assert count >= FEWEST_USED_ROWS * size or size == increasing[0]
    # who is left over would not have fitted, or would have cost too much padding
    if count < min(ready, increasing[-1]):
        larger = next(other for other in increasing if other >= min(ready, increasing[-1]))
        assert min(ready, increasing[-1]) < FEWEST_USED_ROWS * larger


@pytest.mark.parametrize(
    ("ready", "sizes", "chosen"),
    [
        (5, [1, 2, 4, 8], (4, 4)),
        (8, [1, 2, 4, 8], (8, 8)),
        (30, [1, 8, 32], (30, 32)),
        (28, [1, 8, 32], (8, 8)),
        (100, [1, 8, 32], (32, 32)),
        (1, [4, 8], (1, 4)),
        (5, [4, 8], (4, 4)),
    ],
)
def test_chosen_batches(ready: int, sizes: list[int], chosen: tuple[int, int]) -> None:
    assert choose_batch(ready, sizes) == chosen
