"""What a run would achieve: a discrete-event simulation of environments and a device that serves them in batches.

`simulate` lets a batch form whenever the device is free, as the inference process does; `simulate_lock_step` has one
barrier per decision, as vectorised environments have. Both are pure functions of the times that they are given, so that
a real run with the same times can be compared with them. Environments and the device take time, and the host if asked
to. Each environment has a process and a core of its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dsrl_async.run.inference.batching import choose_batch

BLOCK = 256
"""Random numbers that are drawn at once."""


@dataclass(frozen=True)
class EnvironmentTimes:
    """How long an environment takes, in seconds."""

    chunk_s: float = 0.06
    """Mean time that a chunk takes, with rendering; times are lognormal."""
    sigma: float = 0.3
    """Standard deviation of the chunk time's logarithm."""
    reset_s: float = 0.6
    """Time that a reset takes."""
    reset_probability: float = 1 / 25
    """Probability that a decision ends its episode."""

    def draw(self, seed: int, lane: int) -> Iterator[tuple[float, float]]:
        """Yield for ever what each decision of an environment takes: (chunk seconds, reset seconds or 0)."""
        rng = np.random.default_rng([seed, lane])
        mean_log = np.log(self.chunk_s) - self.sigma**2 / 2 if self.chunk_s > 0 else -np.inf
        while True:
            chunks = np.exp(mean_log + self.sigma * rng.standard_normal(BLOCK))
            resets = self.reset_s * (rng.random(BLOCK) < self.reset_probability)
            yield from zip(chunks.tolist(), resets.tolist(), strict=True)

    def totals(self, seed: int, lane: int) -> Iterator[float]:
        """Yield for ever the seconds from an answer to the environment's next request."""
        return (chunk + reset for chunk, reset in self.draw(seed, lane))


class Throughput(NamedTuple):
    """What a simulated run achieved; waits and latencies are sorted arrays, float64 [decisions], in seconds."""

    decisions_per_s: float
    device_busy: float
    """Share of the time in which the device computes."""
    batch_size: float
    """Mean number of observations in a batch."""
    batch_fill: float
    """Observations per computed row; the others are padding."""
    queue_wait_s: np.ndarray
    """Time from an observation to the start of its batch."""
    latency_s: np.ndarray
    """Time from an observation to its answer."""


class Host(NamedTuple):
    """What the host does for a batch, in seconds by number of observations, while the device waits."""

    gather_s: Callable[[int], float]
    """Copying the observations to the device."""
    launch_s: Callable[[int], float]
    """Choosing and starting the batch."""
    scatter_s: Callable[[int], float]
    """Giving the answers to the environments."""
    overlap: bool = False
    """Whether the host gathers while the device computes, and launches the next batch before it gives out answers."""


class _Tally:
    """Sums over the decisions that come after the first `skip`."""

    def __init__(self, skip: int) -> None:
        self.skip, self.served = skip, 0
        self.start_s: float | None = None
        self.busy_s, self.batches, self.rows = 0.0, 0, 0
        self.waits: list[float] = []
        self.latencies: list[float] = []

    def add(self, begin_s: float, end_s: float, service_s: float, size: int, requests_s: Sequence[float]) -> None:
        self.served += len(requests_s)
        if self.served <= self.skip:
            self.start_s = end_s
            return
        self.start_s = begin_s if self.start_s is None else self.start_s
        self.busy_s += service_s
        self.batches += 1
        self.rows += size
        self.waits += [begin_s - request for request in requests_s]
        self.latencies += [end_s - request for request in requests_s]

    def throughput(self, end_s: float) -> Throughput:
        assert self.start_s is not None
        seconds, decisions = end_s - self.start_s, len(self.waits)
        return Throughput(
            decisions / seconds,
            self.busy_s / seconds,
            decisions / self.batches,
            decisions / self.rows,
            np.sort(self.waits),
            np.sort(self.latencies),
        )


def simulate(
    environments: Sequence[Iterator[float]],
    service_s: Callable[[int], float],
    sizes: Sequence[int],
    decisions: int,
    skip: int = 0,
    batch_wait_s: float = 0.0,
    host: Host | None = None,
    choose: Callable[[int, Sequence[int]], tuple[int, int]] = choose_batch,
) -> Throughput:
    """Simulate batching by readiness: whenever the device is free, it serves who waits, longest waiting first.

    With `sizes = range(1, cap + 1)` and nothing else this is the ideal: no padding, no waiting, no overhead.

    Args:
        environments: for each, endless seconds from an answer to the next request, at first from the start.
        service_s: seconds that the device takes for a batch of a size.
        sizes: available batch sizes, in increasing order.
        decisions: how many decisions are counted.
        skip: how many decisions come before those and are not counted.
        batch_wait_s: how long to wait for more when fewer are ready than the largest batch, or all environments.
        host: what the host does for each batch; None means that it takes no time.
        choose: (ready, sizes) -> (observations, batch size).
    """
    upcoming = [(next(times), lane) for lane, times in enumerate(environments)]
    heapq.heapify(upcoming)
    waiting: list[tuple[float, int]] = []
    tally, full = _Tally(skip), min(sizes[-1], len(environments))
    free_s = 0.0
    while tally.served < skip + decisions:
        if not waiting:
            waiting.append(heapq.heappop(upcoming))
        begin_s = max(free_s, waiting[0][0])
        while upcoming and upcoming[0][0] <= begin_s:
            waiting.append(heapq.heappop(upcoming))
        deadline_s = begin_s + batch_wait_s
        while len(waiting) < full and upcoming and upcoming[0][0] <= deadline_s:
            waiting.append(heapq.heappop(upcoming))
            begin_s = waiting[-1][0]
        if len(waiting) < full:
            begin_s = deadline_s
        count, size = choose(len(waiting), sizes)
        served, waiting = waiting[:count], waiting[count:]
        service = service_s(size)
        if host is None:
            answered_s = free_s = begin_s + service
        else:
            gathered = host.overlap and served[0][0] <= free_s
            begin_s += host.launch_s(count) + (0.0 if gathered else host.gather_s(count))
            free_s = begin_s + service
            answered_s = free_s + host.scatter_s(count) + (host.launch_s(count) if host.overlap else 0.0)
            free_s = free_s if host.overlap else answered_s
        tally.add(begin_s, answered_s, service, size, [request for request, _ in served])
        for _, lane in served:
            heapq.heappush(upcoming, (answered_s + next(environments[lane]), lane))
    return tally.throughput(free_s)


def simulate_lock_step(
    environments: Sequence[Iterator[float]],
    service_s: Callable[[int], float],
    sizes: Sequence[int],
    decisions: int,
) -> Throughput:
    """Simulate one barrier per decision: all environments step, the slowest with its reset; then all are served, and go
    on together.

    If there are more environments than the largest of `sizes`, batches follow one another. See `simulate` for the
    arguments.
    """
    tally, now_s = _Tally(0), 0.0
    while tally.served < decisions:
        requests = sorted(now_s + next(times) for times in environments)
        now_s = requests[-1]
        while requests:
            size = next((size for size in sizes if size >= len(requests)), sizes[-1])
            service = service_s(size)
            tally.add(now_s, now_s + service, service, size, requests[:size])
            requests, now_s = requests[size:], now_s + service
    return tally.throughput(now_s)
