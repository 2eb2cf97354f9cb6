"""What a machine can do for a run: throughput against the number of actors, and what bounds it. Pure functions.

The actors and the device that answers them are a closed queue, `throughput_model.equilibrium`. What they share with
one another and with the learner, CPU cores and possibly the device, is reckoned by its work: if a decision costs more
core-seconds than there are, everything that runs on the cores takes longer, by the factor at which the work just fits.
At that factor all cores are busy, as they are in a run, whoever the scheduler prefers.

Imports no torch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from dsrl_async.batching import choose_batch
from dsrl_async.throughput_model import EnvironmentTimes, Equilibrium, equilibrium

Bound = Literal["environments", "device", "cores", "learner", "memory"]
BUSY = 0.95
"""A device, and a throughput of what is possible, that are this near to all count as all."""
MOST_STRETCHED = 1e4
"""Factor beyond which a machine is not worth reckoning with."""
BISECTIONS = 14  # from a factor of two to less than 0.0001


class ModelError(ValueError):
    """Figures that cannot be; the message is one sentence."""


@dataclass(frozen=True)
class Figures:
    """A run and its machine. Seconds are those on an otherwise idle machine."""

    environment: EnvironmentTimes
    """Its reset probability is that of a decision."""
    steps_per_decision: float
    device_s: dict[int, float]
    """Seconds that the device needs for a batch, by size; straight lines between and beyond them."""
    batch_sizes: tuple[int, ...]
    """That there are, increasing."""
    cores: float
    """CPU cores that the run can have."""
    environment_cores: float = 1.0
    """That an environment keeps busy while it steps: 1 if it computes, 0 if it only waits."""
    device_cores: float = 1.0
    """That are busy while the device computes: those of a policy on the CPU, or of the thread that waits for a GPU."""
    batch_wait_s: float = 0.0
    update_s: float = 0.0
    """Of a gradient update; 0: the learner is not reckoned with."""
    update_cores: float = 1.0
    learner_shares_device: bool = False
    """The learner's updates take time of the device that the policy needs, as on one GPU."""
    replay_ratio: float = 1.0
    """Updates per decision."""
    throttle_actors: bool = True
    """The actors wait for the learner."""
    most_actors: int | None = None
    """That the memory holds."""

    def __post_init__(self) -> None:
        times = self.environment
        for name, value, least in (
            ("the time of a chunk", times.chunk_s, 0),
            ("the steps of a decision", self.steps_per_decision, 0),
            ("the number of cores", self.cores, 0),
            ("the replay ratio", self.replay_ratio, 0),
        ):
            if not value > least or not math.isfinite(value):
                raise ModelError(f"{name} must be a positive number, not {value:g}")
        for name, value in (
            ("the spread of a chunk's time", times.sigma),
            ("the time of a reset", times.reset_s),
            ("the time of an update", self.update_s),
            ("the batch wait", self.batch_wait_s),
            ("the cores of an environment", self.environment_cores),
            ("the cores of the device", self.device_cores),
            ("the cores of an update", self.update_cores),
        ):
            if not value >= 0 or not math.isfinite(value):
                raise ModelError(f"{name} must not be negative, not {value:g}")
        if not 0 <= times.reset_probability <= 1:
            raise ModelError("an episode must have at least 1 decision")
        if not self.device_s or min(self.device_s) < 1 or not all(0 < s < math.inf for s in self.device_s.values()):
            raise ModelError("the device's curve needs positive batch sizes and times")
        sizes = sorted(self.device_s)
        if any(self.device_s[small] > self.device_s[large] for small, large in itertools.pairwise(sizes)):
            raise ModelError("the device's curve must not fall: a larger batch takes at least as long")
        if self.most_actors is not None and self.most_actors < 1:
            raise ModelError("the memory holds no actor; lower replay.capacity, or give more memory")

    @property
    def think_s(self) -> float:
        """Mean seconds from an answer to the next request."""
        return self.environment.chunk_s + self.environment.reset_s * self.environment.reset_probability

    def service_s(self, size: int) -> float:
        """Seconds of a batch of that size: between the known ones on a line, below them as long as the smallest."""
        sizes = sorted(self.device_s)
        seconds = [self.device_s[known] for known in sizes]
        if size <= sizes[-1] or len(sizes) == 1:
            # of a single known size nothing tells how time grows: as the batch does, which is the worst that can be
            slope = max(1.0, size / sizes[-1])
            return float(np.interp(size, sizes, seconds)) * slope
        slope = max(0.0, (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]))
        return seconds[-1] + slope * (size - sizes[-1])


class Prediction(NamedTuple):
    """Of a run with so many actors."""

    actors: int
    decisions_per_s: float
    env_steps_per_s: float
    updates_per_s: float
    device_busy: float
    """Share of time that the device computes the policy."""
    batch_size: float
    """Mean number of observations in a batch."""
    cores_busy: float
    stretch: float
    """Factor by which what runs on the cores is slowed down by their being shared; 1 while they suffice."""
    bound: Bound
    """What holds the throughput back."""


class _State(NamedTuple):
    """Of a run, where the cores' work takes `stretch` times as long and the device's `turns` times."""

    queue: Equilibrium
    decisions_per_s: float
    updates_per_s: float
    learner_bound: bool


def _state(figures: Figures, actors: int, stretch: float, turns: float) -> _State:
    def stretched(cores: float) -> float:
        """Factor for work that keeps so many cores busy: less than one core is busy only part of the time."""
        return 1 + (stretch - 1) * min(1.0, cores)

    of_device = max(stretched(figures.device_cores), turns)
    think_s = figures.think_s * stretched(figures.environment_cores)
    queue = equilibrium(
        actors, think_s, lambda size: of_device * figures.service_s(size), figures.batch_sizes, figures.batch_wait_s
    )
    update_s = figures.update_s * max(stretched(figures.update_cores), turns if figures.learner_shares_device else 1)
    most_updates = 1 / update_s if update_s > 0 else math.inf
    decisions, wanted = queue.decisions_per_s, queue.decisions_per_s * figures.replay_ratio
    if wanted <= most_updates:
        return _State(queue, decisions, wanted, False)
    if not figures.throttle_actors:
        return _State(queue, decisions, most_updates, False)
    # Whoever waits for the learner is answered together with the others: the largest batch that there is.
    decisions = most_updates / figures.replay_ratio
    count, size = choose_batch(actors, figures.batch_sizes)
    busy = decisions / count * of_device * figures.service_s(size)
    return _State(Equilibrium(decisions, min(1.0, busy), float(count)), decisions, most_updates, True)


def _cores_busy(figures: Figures, state: _State, service_factor: float) -> float:
    """Core-seconds of work per second. `device_busy` has the device's time as lengthened by `service_factor`."""
    return (
        state.decisions_per_s * figures.think_s * figures.environment_cores
        + state.queue.device_busy / service_factor * figures.device_cores
        + state.updates_per_s * figures.update_s * figures.update_cores
    )


def _least(fits: Callable[[float], bool]) -> float:
    """The smallest factor from 1 on that fits, if larger ones do."""
    if fits(1.0):
        return 1.0
    low, high = 1.0, 2.0
    while not fits(high) and high < MOST_STRETCHED:
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def predict(figures: Figures, actors: int) -> Prediction:
    """Throughput with so many actors, whether or not the memory holds them. Raises ModelError for fewer than one."""
    if actors < 1:
        raise ModelError(f"there must be at least 1 actor, not {actors}")

    def factor(stretch: float, turns: float) -> float:
        return max(1 + (stretch - 1) * min(1.0, figures.device_cores), turns)

    def device_fits(stretch: float, turns: float) -> bool:
        if not figures.learner_shares_device or figures.update_s == 0:
            return True
        state = _state(figures, actors, stretch, turns)
        policy = state.queue.device_busy / factor(stretch, turns)
        return policy + state.updates_per_s * figures.update_s <= 1

    @functools.cache
    def turns_for(stretch: float) -> float:
        return _least(lambda turns: device_fits(stretch, turns))

    def cores_fit(stretch: float) -> bool:
        turns = turns_for(stretch)
        return _cores_busy(figures, _state(figures, actors, stretch, turns), factor(stretch, turns)) <= figures.cores

    stretch = _least(cores_fit)
    turns = turns_for(stretch)
    state = _state(figures, actors, stretch, turns)
    bound: Bound = "environments"
    if stretch > 1:
        bound = "cores"
    elif turns > 1 or (state.queue.device_busy >= BUSY and not state.learner_bound):
        bound = "device"
    elif state.learner_bound:
        bound = "learner"
    return Prediction(
        actors=actors,
        decisions_per_s=state.decisions_per_s,
        env_steps_per_s=state.decisions_per_s * figures.steps_per_decision,
        updates_per_s=state.updates_per_s,
        device_busy=state.queue.device_busy / factor(stretch, turns),
        batch_size=state.queue.batch_size,
        cores_busy=_cores_busy(figures, state, factor(stretch, turns)),
        stretch=stretch,
        bound=bound,
    )


MOST_ACTORS = 4096
"""Of a run (`config.Config.actors`)."""
LEVEL = 0.002
"""Relative change of the throughput, for a doubling of the actors, below which more of them change nothing."""


def curve(figures: Figures, also: Iterable[int] = ()) -> list[Prediction]:
    """Predictions for 1, 2, 3, 4, 6, 8, 12, ... actors, until more change nothing or the memory is full; also others.

    The others are left out where the memory does not hold them.
    """
    limit = figures.most_actors or MOST_ACTORS
    points: dict[int, Prediction] = {}

    def add(actors: int) -> Prediction:
        return points.setdefault(actors, predict(figures, actors))

    actors = 1
    while actors <= limit:
        now = add(actors)
        if actors >= 4:
            before = points[actors // 2]
            if abs(now.decisions_per_s - before.decisions_per_s) <= LEVEL * before.decisions_per_s:
                break
        actors = actors * 4 // 3 if actors & (actors - 1) else (actors * 3 // 2 if actors > 1 else 2)
    if actors > limit:
        add(limit)
    for number in also:
        if number <= limit:
            add(number)
    return [points[number] for number in sorted(points)]


class Verdict(NamedTuple):
    """What a curve says."""

    actors: int
    """The fewest that reach 95 % of the most that there is."""
    at_most: Prediction
    """The most decisions per second, within the memory."""
    bound: Bound
    """What more actors would run into; memory, if it ends before anything else does."""


def judge(figures: Figures, points: list[Prediction]) -> Verdict:
    """The fewest actors that are enough, and what bounds them; `points` as from `curve`."""
    best = max(points, key=lambda point: point.decisions_per_s)
    enough = BUSY * best.decisions_per_s
    index = next(index for index, point in enumerate(points) if point.decisions_per_s >= enough)
    low, high = (points[index - 1].actors if index else 0), points[index].actors
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if predict(figures, middle).decisions_per_s >= enough else (middle, high)
    last = points[-1]
    bound = last.bound
    if bound == "environments" and figures.most_actors is not None and last.actors >= figures.most_actors:
        bound = "memory"
    return Verdict(high, best, bound)


class Payload(NamedTuple):
    """Bytes that would cross a network."""

    observation: int
    """Per decision, if the policy is on another machine than the environment: what the policy and SAC see."""
    action_chunk: int
    """Per decision, and back."""
    transition: int
    """Per decision, if only the learner is on another machine."""
    weights: int
    """Per machine and publication: the SAC actor's."""


class Machines(NamedTuple):
    """So many machines, each with actors and a policy of its own, and one more with the learner and the replay ring."""

    nodes: int
    actors: int
    """In all."""
    decisions_per_s: float
    env_steps_per_s: float
    updates_per_s: float
    transition_bytes_per_s: float
    """Into the learner's machine."""
    weights_bytes_per_s: float
    """Out of the learner's machine."""
    observation_bytes_per_s: float
    """What the machine with the policy would take in, if there were only one and the others had environments only."""
    bound: Literal["nodes", "learner", "network"]


def machines(
    figures: Figures, actors: int, nodes: int, payload: Payload, publish_interval: int, network_bytes_per_s: float
) -> Machines:
    """`nodes` times what a machine with `actors` does without the learner, as far as the learner's machine keeps up.

    The learner has a device and the cores of its own; `network_bytes_per_s` is its machine's link, in each direction.
    """
    acting = predict(replace(figures, update_s=0.0, learner_shares_device=False), actors)
    rates = {"nodes": nodes * acting.decisions_per_s, "network": network_bytes_per_s / payload.transition}
    most_updates = 1 / figures.update_s if figures.update_s > 0 else math.inf
    # publications per second, at replay_ratio updates per decision, each to all machines
    per_decision = figures.replay_ratio / publish_interval * payload.weights * nodes
    rates["network"] = min(rates["network"], network_bytes_per_s / per_decision)
    if figures.throttle_actors:
        rates["learner"] = most_updates / figures.replay_ratio
    bound = min(rates, key=lambda name: rates[name])
    decisions = rates[bound]
    updates = min(most_updates, decisions * figures.replay_ratio)
    return Machines(
        nodes=nodes,
        actors=nodes * actors,
        decisions_per_s=decisions,
        env_steps_per_s=decisions * figures.steps_per_decision,
        updates_per_s=updates,
        transition_bytes_per_s=decisions * payload.transition,
        weights_bytes_per_s=updates / publish_interval * payload.weights * nodes,
        observation_bytes_per_s=decisions * payload.observation,
        bound=bound,  # type: ignore[arg-type]
    )
