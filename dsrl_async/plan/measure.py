"""Measures the parts of a run for a short while, one after another in this process, with the classes of a run."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from dsrl_async.config.settings import Config, ConfigError, SacConfig
from dsrl_async.host.device import resolve_device
from dsrl_async.host.machine import cpu_threads
from dsrl_async.plan.simulation import EnvironmentTimes
from dsrl_async.policies import FrozenPolicy
from dsrl_async.run.inference.policies import load_policies
from dsrl_async.run.inference.server import InferenceServer
from dsrl_async.run.learner.learner import learner_device, make_agent, products_of
from dsrl_async.run.learner.na import make_na_updates
from dsrl_async.run.learner.sampling import source_for
from dsrl_async.run.learner.updates import Updates
from dsrl_async.run.preflight import CheckedRun, check_gpu_memory
from dsrl_async.run.worker.worker import Lane
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters
from dsrl_async.shm.memory import action_row, create_memory
from dsrl_async.shm.replay import ActionRow, ReplayRing, replay_fields

RING_ROWS = 4096
"""Rows of the replay ring that updates draw from. They are random and take 50 MB, more than a cache holds."""
FEWEST = 3
"""Lower limit on the samples of anything."""
IDLE_LOAD = 0.5
"""Load average up to which the machine counts as idle."""
PATIENCE, LEAST_PATIENCE_S = 6, 60.0
"""An episode has to end within this many times the environment's share of the time, and is given these seconds."""


class Measured(NamedTuple):
    """Fields of `capacity.CapacityInputs` that can be measured."""

    environment: EnvironmentTimes
    steps_per_decision: float
    environment_cores: float
    device_s: dict[int, float]
    device_cores: float
    update_s: float
    update_cores: float


class Took(NamedTuple):
    """How long a call took."""

    seconds: float
    cpu_s: float
    """CPU time of all threads."""


def timed(function: Callable[[], object]) -> Took:
    cpu, begin = time.process_time(), time.perf_counter()
    function()
    return Took(time.perf_counter() - begin, time.process_time() - cpu)


def repeat(function: Callable[[], object], seconds: float) -> list[Took]:
    """Samples that take about this many seconds together, at least `FEWEST`. The first call warms up; it counts only if
    there is no time for another one."""
    first = timed(function)
    if first.seconds > seconds:
        return [first]
    samples: list[Took] = []
    begin = time.monotonic()
    while len(samples) < FEWEST or time.monotonic() - begin < seconds:
        samples.append(timed(function))
    return samples


def cores(samples: list[Took]) -> float:
    """Mean number of busy cores."""
    return sum(took.cpu_s for took in samples) / sum(took.seconds for took in samples)


def measuring_config(config: Config) -> Config:
    """The configuration that is measured, with every batch size, a small ring and a warm-up that never ends."""
    sizes = config.inference.buckets
    endless = {"capacity": 16 * sizes[-1], "warmup_decisions": 2**31, "warmup": "gaussian"}
    replay = config.replay.model_copy(update=endless)
    return config.model_copy(update={"actors": sizes[-1], "replay": replay, "max_decisions": None})


def measure(run: CheckedRun, seconds: float, say: Callable[[str], None]) -> Measured:
    """Measure for about `seconds`, beside loading the policy and the scene; `say` is told what comes next.

    Raises ConfigError if no episode ends in time, or if a GPU's memory does not suffice.
    """
    config = measuring_config(run.config)
    check_gpu_memory(replace(run, config=config))
    part_s = seconds / 3
    if (load := os.getloadavg()[0]) > IDLE_LOAD:
        say(f"the machine has a load of {load:.1f}: if others use it now, all times will be too long")
    with closing(create_memory(config, run.spec, run.horizon)) as arena:
        say("loading the policy")
        device = resolve_device(config.device)
        torch.set_num_threads(cpu_threads(config.inference.threads))
        policies = load_policies(config, run.spec, device, run.policy, Counters(arena))
        server = InferenceServer(config, arena, policies, lambda lanes: None)
        say(f"environment: {part_s:.0f} s, until an episode has ended")
        lane = Lane(0, 1, config.seed, config.env.model_dump(), arena, agent_cameras=config.sac.cameras)
        try:
            times, steps, environment_cores = measure_environment(lane, server, part_s)
        finally:
            lane.env.close()
        device_s, device_cores = measure_device(server, part_s, say)
    say(f"gradient updates: {part_s:.0f} s")
    torch.set_num_threads(cpu_threads(config.learner.threads))
    update = repeat(updating(config, run.horizon, policies.frozen), part_s)
    return Measured(
        times,
        steps,
        environment_cores,
        device_s,
        device_cores,
        statistics.median(took.seconds for took in update),
        cores(update),
    )


def measure_environment(lane: Lane, server: InferenceServer, seconds: float) -> tuple[EnvironmentTimes, float, float]:
    """The environment's times, steps per decision and busy cores, while the policy plays with the warm-up's noise."""
    number, counters = lane.number, lane.counters
    within: list[Took] = []  # chunks
    ending: list[Took] = []  # chunks that ended an episode, with the reset
    finished = 0  # decisions of episodes that have ended
    lane.start()
    begin, limit_s = time.monotonic(), max(LEAST_PATIENCE_S, PATIENCE * seconds)
    while (spent := time.monotonic() - begin) < seconds or not ending or len(within) + len(ending) < FEWEST:
        if spent > limit_s:
            raise ConfigError(
                f"no episode ended within {spent:.0f} s; measure longer with --seconds, or lower env.max_episode_steps"
            )
        server.serve_ready(np.array([number]))
        episodes = int(counters.actor_episodes[number])
        took = timed(lane.advance)
        if counters.actor_episodes[number] == episodes:
            within.append(took)
        else:
            ending.append(took)
            finished = len(within) + len(ending)
    chunks = [took.seconds for took in within or ending]  # where every decision ends an episode, resets are in them
    chunk_s = statistics.fmean(chunks)
    reset_s = max(0.0, statistics.fmean(took.seconds for took in ending) - chunk_s)
    sigma = float(np.std(np.log(chunks)))
    steps = float(counters.actor_env_steps[number]) / (len(within) + len(ending))
    return EnvironmentTimes(chunk_s, sigma, reset_s, len(ending) / finished), steps, cores(within + ending)


def measure_device(
    server: InferenceServer, seconds: float, say: Callable[[str], None]
) -> tuple[dict[int, float], float]:
    """Seconds that it takes to gather, compute and scatter copies of one observation, by batch size; and busy cores."""
    slots = server.slots
    for rows in (slots.images, slots.sac_image, slots.state, slots.standard_normal, slots.task_index):
        rows[1:] = rows[0]
    times: dict[int, float] = {}
    everything: list[Took] = []
    number = 2**20  # a request's: larger than any number that the lane has used
    for size in server.sizes:
        say(f"policy, batches of {size}: {seconds / len(server.sizes):.1f} s")
        lanes = np.arange(size)

        def batch(lanes: np.ndarray = lanes) -> None:
            nonlocal number
            number += 1
            for lane in lanes.tolist():
                slots.request(lane, 1, number)
            served = server.serve_ready(lanes)
            assert served == len(lanes)

        samples = repeat(batch, seconds / len(server.sizes))
        times[size] = statistics.median(took.seconds for took in samples)
        everything += samples
        if size > 1 and times[size] > seconds:
            break  # a large policy on a CPU: that is how long larger batches take, by the row
    return times, cores(everything)


def updating(config: Config, horizon: int, policy: FrozenPolicy | None = None) -> Callable[[], None]:
    """A function that does one gradient update of critic, actor and temperature, to its end; with DSRL-NA, which needs
    the `policy`, the steps of the noise critic that come with it on average."""
    sac = config.sac.model_copy(update={"train_actor_steps": 0})
    config, device = config.model_copy(update={"sac": sac}), learner_device(config)
    told = torch.zeros(1, sac.instruction_dim, device=device) if sac.instruction_dim else None
    if sac.algorithm == "na":
        assert policy is not None
        if device != resolve_device(config.device):
            raise ConfigError(
                f"learner.device: with na only a learner beside its policy is measured; leave {device} out"
            )
        sizes = policy.spec
        of_actions = action_row(config, sizes.cameras, sizes.image_size, sizes.robot_action_dim)
        ring = fill_ring(sac, RING_ROWS, sac.noise_width(horizon), of_actions)
        updates: Updates = make_na_updates(config, policy, device, source_for(ring, device), products_of(config), told)
    else:
        agent = make_agent(config, horizon, device)
        updates = Updates(agent, source_for(fill_ring(sac, RING_ROWS, agent.action_dim), device), sac.batch_size, told)
    updates.refresh()
    if device.type == "cuda" and config.learner.graphs == "auto":
        updates.capture()

    def update() -> None:
        updates.refresh()
        updates.draw_batch()
        updates.run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return update


def fill_ring(config: SacConfig, rows: int, action_dim: int, of_actions: ActionRow | None = None) -> ReplayRing:
    """A ring whose only lane is full of random observations, in episodes of ten decisions."""
    sizes = config.state_dim, action_dim, len(config.cameras)
    ring = ReplayRing(Arena.create(replay_fields(1, rows, *sizes, of_actions, config.instruction_dim > 0)))
    rng = np.random.default_rng(0)
    for name in ("image", "policy_images") if of_actions is not None else ("image",):
        ring.rows[name][:] = rng.integers(0, 256, ring.rows[name].shape, dtype=np.uint8)
    for name in ("state", ring.judged):
        ring.rows[name][:] = rng.standard_normal(ring.rows[name].shape)
    ring.rows["complete"][:] = np.arange(rows) % 11 != 10
    ring.head[:] = rows
    return ring
