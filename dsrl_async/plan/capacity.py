"""What a machine can do for a run: throughput against the number of workers, and what bounds it. Pure functions.

Environment workers and the device that answers them are simulated (`simulation.simulate`). The simulation leaves out
the cores and the learner, which are bounds of their own, by the work that a decision takes; the smallest of all bounds
is the prediction. Where the cores are the bound, this assumes that their scheduler slows everything down alike.

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

Bound = Literal["environments", "device", "cores", "learner", "memory", "actors", "machines", "network", "downlink"]
BUSY = 0.95
"""A device counts as busy from this share of the time on, and a throughput as enough from this share of the most."""
DECISIONS, DECISIONS_PER_ACTOR = 4000, 20
"""Decisions of a simulation; half as many come before it counts. Other draws change the throughput by up to 3 %."""
LEVEL = 0.01
"""If twice as many workers change the throughput by less than this fraction, more of them change nothing."""


@dataclass(frozen=True)
class CapacityInputs:
    """What is known of a run and its machine. Times are those on an otherwise idle machine."""

    environment: EnvironmentTimes
    device_s: Mapping[int, float]
    """Seconds that the device takes for a batch, by size."""
    batch_sizes: Sequence[int]
    """Available batch sizes, in increasing order."""
    cores: float
    """CPU cores that the run can have."""
    steps_per_decision: float
    environment_cores: float = 1.0
    """Mean number of cores that an environment keeps busy while it steps: 1 if it computes, 0 if it only waits."""
    device_cores: float = 1.0
    """Mean number of cores that are busy while the device computes: those of a policy on the CPU, or one that waits for
    a GPU."""
    batch_wait_s: float = 0.0
    """How long the device waits for more observations."""
    update_s: float = 0.0
    """Seconds that a gradient update takes; 0 leaves the learner out."""
    update_cores: float = 1.0
    """Mean number of cores that an update keeps busy."""
    learner_shares_device: bool = False
    """Whether updates take time from the policy's device, as on a single GPU."""
    replay_ratio: float = 1.0
    """Gradient updates per decision. Workers wait for the learner."""
    most_actors: int = MOST_ACTORS
    """How many workers the memory holds, of each group, at most `MOST_ACTORS`."""
    groups: int = 1
    """How many groups the machine runs, each with a device and workers of its own; all share the cores and the
    learner, which has a part of one device if `learner_shares_device`."""

    def service_s(self, size: int) -> float:
        """Seconds that a batch takes: on a line between the known sizes, and in proportion beyond the largest."""
        sizes = sorted(self.device_s)
        seconds = np.interp(size, sizes, [self.device_s[known] for known in sizes])
        return float(seconds) * max(1.0, size / sizes[-1])


class Prediction(NamedTuple):
    """What a run with this many workers would do."""

    actors: int
    """Those of a group."""
    decisions_per_s: float
    env_steps_per_s: float
    updates_per_s: float
    device_busy: float
    """Share of the time in which a group's device computes the policy."""
    cores_busy: float
    """Mean number of busy cores."""
    bound: Bound
    """What holds the throughput back."""


def predict(inputs: CapacityInputs, actors: int) -> Prediction:
    """Throughput with this many workers in each group, whether or not the memory holds them."""
    times, sizes = inputs.environment, inputs.batch_sizes
    service_s = {size: inputs.service_s(size) for size in sizes}
    decisions = DECISIONS + DECISIONS_PER_ACTOR * actors
    draws = [times.totals(0, lane) for lane in range(actors)]
    queue = simulate(draws, service_s.__getitem__, sizes, decisions, decisions // 2, inputs.batch_wait_s)
    # what a decision takes
    environment_s = times.chunk_s + times.reset_s * times.reset_probability
    device_s = queue.device_busy / queue.decisions_per_s
    update_s = inputs.replay_ratio * inputs.update_s
    core_s = environment_s * inputs.environment_cores + device_s * inputs.device_cores + update_s * inputs.update_cores
    acting: Bound = "device" if queue.device_busy >= BUSY else "environments"
    rates: dict[Bound, float] = {acting: inputs.groups * queue.decisions_per_s}
    if inputs.learner_shares_device:
        # while the updates have the device more actors get ready: the batches are as large as they can be
        count, size = choose_batch(actors, sizes)
        # the other groups have their devices to themselves: rate = groups * q - rate * update_s * q
        rates["device"] = min(rates[acting], inputs.groups / (service_s[size] / count + update_s))
    if core_s > 0:
        rates["cores"] = inputs.cores / core_s
    if update_s > 0:
        rates["learner"] = 1 / update_s
    bound = min(rates, key=rates.__getitem__)
    rate = rates[bound]
    return Prediction(
        actors=actors,
        decisions_per_s=rate,
        env_steps_per_s=rate * inputs.steps_per_decision,
        updates_per_s=rate * inputs.replay_ratio,
        device_busy=rate * device_s / inputs.groups,
        cores_busy=rate * core_s,
        bound=bound,
    )


def curve(inputs: CapacityInputs) -> list[Prediction]:
    """Predictions for 1, 2, 3, 4, 6, 8, 12, ... workers, until more change nothing or the memory is full."""
    points: dict[int, Prediction] = {}
    actors = 1
    while actors < inputs.most_actors:
        points[actors] = predict(inputs, actors)
        half = points.get(actors // 2)
        if half and points[actors].decisions_per_s <= (1 + LEVEL) * half.decisions_per_s:
            return list(points.values())
        power = 1 << (actors.bit_length() - 1)
        actors = max(actors + 1, power * 3 // 2 if actors == power else 2 * power)
    return [*points.values(), predict(inputs, inputs.most_actors)]


class Verdict(NamedTuple):
    """What a curve says about how many workers to start."""

    enough: Prediction
    """The prediction for the fewest workers that reach 95 % of the highest throughput."""
    bound: Bound
    """What more workers would run into: memory, or the most workers that a run may have, if those come first."""


def judge(inputs: CapacityInputs, points: Sequence[Prediction]) -> Verdict:
    """The fewest workers that are enough, and what bounds them; `points` are those of `curve`."""
    enough = BUSY * max(point.decisions_per_s for point in points)
    index = next(index for index, point in enumerate(points) if point.decisions_per_s >= enough)
    between = range(points[index - 1].actors + 1 if index else 1, points[index].actors)
    actors = bisect.bisect_left(between, True, key=lambda number: predict(inputs, number).decisions_per_s >= enough)
    fewest = predict(inputs, between[actors]) if actors < len(between) else points[index]
    bound = points[-1].bound
    if bound == "environments":
        # before the most actors, the curve has ended because the device gives no more, though it waits at times
        most: Bound = "memory" if inputs.most_actors < MOST_ACTORS else "actors"
        bound = most if points[-1].actors == inputs.most_actors else "device"
    return Verdict(fewest, bound)


class Payload(NamedTuple):
    """Bytes that would cross a network if parts of the run were on other machines."""

    observation: int
    """Bytes per decision from an environment to a policy elsewhere: what the policy and SAC see."""
    action_chunk: int
    """Bytes per decision from a policy elsewhere back to the environment."""
    transition: int
    """Bytes per decision to a learner elsewhere."""
    weights: int
    """Bytes per publication of the actor's weights, from the learner to each machine."""


class Machines(NamedTuple):
    """What several machines with a group each would do, beside one with the learner and the replay ring."""

    nodes: int
    actors: int
    """Number of workers on all machines together."""
    decisions_per_s: float
    updates_per_s: float
    transition_bytes_per_s: float
    """Traffic into the learner's machine."""
    weights_bytes_per_s: float
    """Traffic out of the learner's machine."""
    weights_every_s: float
    """Seconds between two publications to a machine."""
    bound: Bound


class Link(NamedTuple):
    """What carries rows to the learner's machine, and weights from it."""

    bytes_per_s: float
    """Bandwidth of the learner's machine in each direction."""
    publish_interval: int
    """Updates between two publications of the learner."""
    publish_s: float
    """Seconds that pass at least between two publications to a machine."""


ROW_S = 100e-6
"""What a row takes of the downlink, a process of one thread that stores what arrives: a little more than `bench groups`
measured for messages of one row."""
ENCRYPTED_BYTES_PER_S = 600e6
"""What ZeroMQ's one I/O thread encrypts and sends of the weights, which go to each machine by themselves."""


def machines(inputs: CapacityInputs, nodes: Sequence[int], payload: Payload, link: Link) -> list[Machines]:
    """For each number in `nodes`: that many times what one machine does without the learner, as far as the learner's
    machine keeps up with updates and rows.

    Each has as many workers as are enough there, which are more than beside a learner that takes cores and the device
    from them. Weights hold nobody up: where they would fill the link or the thread that encrypts them, they come less
    often.
    """
    alone = replace(inputs, update_s=0.0, learner_shares_device=False, groups=1)
    acting = judge(alone, curve(alone)).enough
    update_s = inputs.replay_ratio * inputs.update_s
    found = []
    for count in nodes:
        rates: dict[Bound, float] = {
            "machines": count * acting.decisions_per_s,
            "learner": 1 / update_s if update_s > 0 else math.inf,
            "network": link.bytes_per_s / payload.transition,
            "downlink": 1 / ROW_S,
        }
        bound = min(rates, key=rates.__getitem__)
        rate = rates[bound]
        updates, weights = rate * inputs.replay_ratio, count * payload.weights
        every_s = max(
            link.publish_interval / updates,
            link.publish_s,
            weights / min(link.bytes_per_s, ENCRYPTED_BYTES_PER_S),
        )
        found.append(
            Machines(
                nodes=count,
                actors=count * acting.actors,
                decisions_per_s=rate,
                updates_per_s=updates,
                transition_bytes_per_s=rate * payload.transition,
                weights_bytes_per_s=weights / every_s,
                weights_every_s=every_s,
                bound=bound,
            )
        )
    return found
