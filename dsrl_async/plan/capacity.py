"""What a machine can do for a run: throughput against the number of actors, and what bounds it. Pure functions.

The actors, of one environment each, and the device that answers them are simulated (`simulation.simulate`). What
that leaves out, the cores and the learner, are bounds of their own, by the work of a decision; the smallest of all is
the prediction. Where the cores are the bound this supposes that their scheduler slows everything down alike.

Imports no torch.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from dsrl_async.config.settings import MOST_ACTORS
from dsrl_async.plan.simulation import EnvironmentTimes, simulate
from dsrl_async.run.inference.batching import choose_batch

Bound = Literal["environments", "device", "cores", "learner", "memory", "actors", "machines", "network"]
BUSY = 0.95
"""A device, and a throughput of what is possible, that are this near to all count as all."""
DECISIONS, DECISIONS_PER_ACTOR = 4000, 20
"""Of a simulation, and half as many before it counts. Other draws change its throughput by up to 3 %."""
LEVEL = 0.01
"""Relative change of the throughput, for a doubling of the actors, below which more of them change nothing."""


@dataclass(frozen=True)
class Figures:
    """A run and its machine. Seconds are those on an otherwise idle machine."""

    environment: EnvironmentTimes
    device_s: Mapping[int, float]
    """Seconds that the device needs for a batch, by size."""
    batch_sizes: Sequence[int]
    """That there are, increasing."""
    cores: float
    """CPU cores that the run can have."""
    steps_per_decision: float
    environment_cores: float = 1.0
    """That an environment keeps busy while it steps: 1 if it computes, 0 if it only waits."""
    device_cores: float = 1.0
    """That are busy while the device computes: those of a policy on the CPU, or of the thread that waits for a GPU."""
    batch_wait_s: float = 0.0
    update_s: float = 0.0
    """Of a gradient update; 0: the learner is not reckoned with."""
    update_cores: float = 1.0
    learner_shares_device: bool = False
    """The learner's updates take time of the policy's device, as on one GPU."""
    replay_ratio: float = 1.0
    """Updates per decision. The actors wait for the learner."""
    most_actors: int = MOST_ACTORS
    """That the memory holds; no more than a run may have."""

    def service_s(self, size: int) -> float:
        """Seconds of a batch: on a line between the known sizes, and in proportion beyond the largest."""
        sizes = sorted(self.device_s)
        seconds = np.interp(size, sizes, [self.device_s[known] for known in sizes])
        return float(seconds) * max(1.0, size / sizes[-1])


class Prediction(NamedTuple):
    """Of a run with so many actors."""

    actors: int
    decisions_per_s: float
    env_steps_per_s: float
    updates_per_s: float
    device_busy: float
    """Share of time that the device computes the policy."""
    cores_busy: float
    bound: Bound
    """What holds the throughput back."""


def predict(figures: Figures, actors: int) -> Prediction:
    """Throughput with so many actors, whether or not the memory holds them."""
    times, sizes = figures.environment, figures.batch_sizes
    service_s = {size: figures.service_s(size) for size in sizes}
    decisions = DECISIONS + DECISIONS_PER_ACTOR * actors
    draws = [times.totals(0, lane) for lane in range(actors)]
    queue = simulate(draws, service_s.__getitem__, sizes, decisions, decisions // 2, figures.batch_wait_s)
    # of a decision
    environment_s = times.chunk_s + times.reset_s * times.reset_probability
    device_s = queue.device_busy / queue.decisions_per_s
    update_s = figures.replay_ratio * figures.update_s
    core_s = (
        environment_s * figures.environment_cores + device_s * figures.device_cores + update_s * figures.update_cores
    )
    rates: dict[Bound, float] = {"device" if queue.device_busy >= BUSY else "environments": queue.decisions_per_s}
    if figures.learner_shares_device:
        # while the updates have the device more actors get ready: the batches are as large as they can be
        count, size = choose_batch(actors, sizes)
        rates["device"] = min(queue.decisions_per_s, 1 / (service_s[size] / count + update_s))
    if core_s > 0:
        rates["cores"] = figures.cores / core_s
    if update_s > 0:
        rates["learner"] = 1 / update_s
    bound = min(rates, key=rates.__getitem__)
    rate = rates[bound]
    return Prediction(
        actors=actors,
        decisions_per_s=rate,
        env_steps_per_s=rate * figures.steps_per_decision,
        updates_per_s=rate * figures.replay_ratio,
        device_busy=rate * device_s,
        cores_busy=rate * core_s,
        bound=bound,
    )


def curve(figures: Figures) -> list[Prediction]:
    """Predictions for 1, 2, 3, 4, 6, 8, 12, ... actors, until more change nothing or the memory is full."""
    points: dict[int, Prediction] = {}
    actors = 1
    while actors < figures.most_actors:
        points[actors] = predict(figures, actors)
        half = points.get(actors // 2)
        if half and points[actors].decisions_per_s <= (1 + LEVEL) * half.decisions_per_s:
            return list(points.values())
        power = 1 << (actors.bit_length() - 1)
        actors = max(actors + 1, power * 3 // 2 if actors == power else 2 * power)
    return [*points.values(), predict(figures, figures.most_actors)]


class Verdict(NamedTuple):
    """What a curve says."""

    enough: Prediction
    """With the fewest actors that reach 95 % of the most that there is."""
    bound: Bound
    """What more actors would run into; memory, or the most actors that a run may have, if those come first."""


def judge(figures: Figures, points: Sequence[Prediction]) -> Verdict:
    """The fewest actors that are enough, and what bounds them; `points` as from `curve`."""
    enough = BUSY * max(point.decisions_per_s for point in points)
    index = next(index for index, point in enumerate(points) if point.decisions_per_s >= enough)
    between = range(points[index - 1].actors + 1 if index else 1, points[index].actors)
    actors = bisect.bisect_left(between, True, key=lambda number: predict(figures, number).decisions_per_s >= enough)
    fewest = predict(figures, between[actors]) if actors < len(between) else points[index]
    bound = points[-1].bound
    if bound == "environments":
        # before the most actors, the curve has ended because the device gives no more, though it waits at times
        most: Bound = "memory" if figures.most_actors < MOST_ACTORS else "actors"
        bound = most if points[-1].actors == figures.most_actors else "device"
    return Verdict(fewest, bound)


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
    updates_per_s: float
    transition_bytes_per_s: float
    """Into the learner's machine."""
    weights_bytes_per_s: float
    """Out of the learner's machine."""
    bound: Bound


def machines(
    figures: Figures, nodes: Sequence[int], payload: Payload, publish_interval: int, network_bytes_per_s: float
) -> list[Machines]:
    """For each of `nodes`: that many times what one machine does without the learner, as far as the learner's keeps up.

    Each has as many actors as are enough there: more than beside a learner, which takes cores and the device from them.
    `network_bytes_per_s` is the link of the learner's machine, in each direction.
    """
    without_learner = replace(figures, update_s=0.0, learner_shares_device=False)
    acting = judge(without_learner, curve(without_learner)).enough
    update_s = figures.replay_ratio * figures.update_s
    found = []
    for count in nodes:
        weights = figures.replay_ratio / publish_interval * payload.weights * count  # bytes per decision
        rates: dict[Bound, float] = {
            "machines": count * acting.decisions_per_s,
            "learner": 1 / update_s if update_s > 0 else math.inf,
            "network": network_bytes_per_s / max(payload.transition, weights),
        }
        bound = min(rates, key=rates.__getitem__)
        rate = rates[bound]
        updates, transitions = rate * figures.replay_ratio, rate * payload.transition
        found.append(Machines(count, count * acting.actors, rate, updates, transitions, rate * weights, bound))
    return found
