"""Short measurements of the parts of a run, through the classes that a run uses, one after another in this process.

Times are those on an otherwise idle machine, as near as the kernel tells: what this process waited for a core is
subtracted.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dsrl_async.bench.usage import thread_usage
from dsrl_async.config import Config, ConfigError
from dsrl_async.device import resolve_device
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.inference import InferenceServer, batch_sizes, load_policies
from dsrl_async.learner import Learner
from dsrl_async.machine import available_cpus
from dsrl_async.preflight import cpu_threads, policy_directory
from dsrl_async.shm.memory import create_memory
from dsrl_async.shm.slots import Slots
from dsrl_async.worker import Actor

RING_ROWS = 4096
"""Rows of the replay ring that is drawn from, random ones: 50 MB, more than a cache holds."""
FEWEST = 3  # samples of anything
PATIENCE, LEAST_PATIENCE_S = 6, 60.0
"""How many times its share of the time the environment may take until an episode ends, and the seconds at least."""


class Took(NamedTuple):
    """Of one call."""

    seconds: float
    """Without what it waited for a core."""
    cpu_s: float
    """Of all threads."""


class Environment(NamedTuple):
    """How an environment of the run behaves, played by the policy with the noise of the warm-up."""

    chunk_s: float
    sigma: float
    """Standard deviation of the logarithm of a chunk's time."""
    reset_s: float
    decisions_per_episode: float
    steps_per_decision: float
    cores: float
    """Kept busy while it steps."""


class Device(NamedTuple):
    """The policy's."""

    seconds: dict[int, float]
    """By batch size: gathering, computing, scattering."""
    cores: float


class Update(NamedTuple):
    """A gradient update, with its share of the publications of weights."""

    seconds: float
    cores: float


class Measured(NamedTuple):
    environment: Environment
    device: Device
    update: Update
    cores: float
    on_gpu: bool


def _waited() -> float:
    """Seconds that this thread has waited for a core so far; 0 where the kernel does not say."""
    try:
        return thread_usage(os.getpid(), threading.get_native_id()).waiting
    except ValueError:
        return 0.0


def _timed(function: Callable[[], object]) -> Took:
    waited, cpu, of_thread, begin = _waited(), time.process_time(), time.thread_time(), time.perf_counter()
    function()
    seconds, of_thread = time.perf_counter() - begin, time.thread_time() - of_thread
    used = time.process_time() - cpu
    # Some virtual machines count more waiting than there was time; what this thread computed is certain.
    return Took(max(1e-9, of_thread, seconds - (_waited() - waited)), used)


def _repeat(function: Callable[[], object], seconds: float) -> list[Took]:
    """Samples of about so many seconds in all, at least `FEWEST`; the first call, which warms up, counts only if there
    is no time for another one."""
    first = _timed(function)
    if first.seconds > seconds:
        return [first]
    samples: list[Took] = []
    begin = time.monotonic()
    while len(samples) < FEWEST or time.monotonic() - begin < seconds:
        samples.append(_timed(function))
    return samples


def measure(config: Config, spec: EnvironmentSpec, horizon: int, seconds: float) -> Measured:
    """About `seconds` of measurement, beside loading the policy and the scene.

    Raises:
        ConfigError: an episode takes too long to see its end, or a part cannot be started.
    """
    replay = config.replay.model_copy(
        update={"capacity": max(RING_ROWS, 16 * config.actors), "warmup_decisions": 2**31}  # always warming up
    )
    sac = config.sac.model_copy(update={"train_actor_steps": 0})  # every update is a whole one
    config = config.model_copy(update={"replay": replay, "sac": sac, "max_decisions": None})
    part_s = seconds / 4
    with closing(create_memory(config, spec, horizon)) as arena, tempfile.TemporaryDirectory() as directory:
        device = resolve_device(config.device)
        torch.set_num_threads(cpu_threads(config.inference.threads))
        policies = load_policies(config, spec, device, "stochastic", policy_directory(config))
        server = InferenceServer(config, arena, policies, lambda lanes: None)
        actor = Actor(0, 1, config.seed, config.env.model_dump(), arena)
        try:
            environment = _environment(actor, server, part_s)
        finally:
            actor.env.close()
        served = _device(server, batch_sizes(config), part_s)
        learner_device = resolve_device(config.learner.device or config.device)
        torch.set_num_threads(cpu_threads(config.learner.threads))
        rng = np.random.default_rng(0)
        learner = Learner(config, arena, horizon, learner_device, Path(directory), lambda frame: None)
        _fill(learner, rng)
        update = _update(learner, part_s)
    return Measured(environment, served, update, usable_cores(part_s / 2), device.type == "cuda")


def _environment(actor: Actor, server: InferenceServer, seconds: float) -> Environment:
    lane = np.array([actor.lane])
    within: list[Took] = []  # chunks
    ending: list[Took] = []  # chunks that ended an episode, with the reset
    finished = 0  # decisions of episodes that have ended
    actor.start()
    begin, limit_s = time.monotonic(), max(LEAST_PATIENCE_S, PATIENCE * seconds)
    while (spent := time.monotonic() - begin) < seconds or not ending or len(within) + len(ending) < FEWEST:
        if spent > limit_s:
            raise ConfigError(
                f"no episode ended within {spent:.0f} s; measure longer with --seconds, or lower env.max_episode_steps"
            )
        server.serve_ready(lane)
        episodes = int(actor.counters.actor_episodes[actor.lane])
        took = _timed(actor.advance)
        if actor.counters.actor_episodes[actor.lane] == episodes:
            within.append(took)
        else:
            ending.append(took)
            finished = len(within) + len(ending)
    chunks = [took.seconds for took in within or ending]  # where every decision ends an episode, resets are in them
    chunk_s = statistics.fmean(chunks)
    return Environment(
        chunk_s=chunk_s,
        sigma=float(np.std(np.log(chunks))),
        reset_s=max(0.0, statistics.fmean(took.seconds for took in ending) - chunk_s),
        decisions_per_episode=finished / len(ending),
        steps_per_decision=float(actor.counters.actor_env_steps[actor.lane]) / (len(within) + len(ending)),
        cores=_cores(within + ending),
    )


def _cores(samples: list[Took]) -> float:
    return sum(took.cpu_s for took in samples) / sum(took.seconds for took in samples)


def _device(server: InferenceServer, sizes: list[int], seconds: float) -> Device:
    """Batches of copies of the first lane's observation."""
    slots: Slots = server.slots
    for name in server.policies.batch_policies[sizes[0], int(server.policies.language_length.max())].inputs:
        rows = getattr(slots, name)
        rows[1:] = rows[0]
    slots.task_index[:] = slots.task_index[0]
    times: dict[int, float] = {}
    everything = []
    number = 2**20  # of a request: more than the actor has made

    for size in sizes:
        lanes = np.arange(size)

        def batch(lanes: np.ndarray = lanes) -> None:
            nonlocal number
            number += 1
            for lane in lanes.tolist():
                slots.request(lane, 1, number)
            assert server.serve_ready(lanes) == len(lanes)

        samples = _repeat(batch, seconds / len(sizes))
        times[size] = statistics.median(took.seconds for took in samples)
        everything += samples
        if len(times) > 1 and times[size] > seconds:
            break  # a large policy on a CPU: two sizes tell the slope
    # A larger batch that seems to be quicker is noise.
    longest = np.maximum.accumulate(list(times.values()))
    return Device(dict(zip(times, longest.tolist(), strict=True)), _cores(everything))


def _fill(learner: Learner, rng: np.random.Generator) -> None:
    """Random observations in all lanes, in episodes of ten decisions."""
    rows = learner.ring.rows
    for lane in range(learner.ring.lanes):
        rows["image"][lane] = rng.integers(0, 256, rows["image"].shape[1:], dtype=np.uint8)
    for name in ("state", "noise"):
        rows[name][:] = rng.standard_normal(rows[name].shape, np.float32)
    rows["steps"][:] = 1
    rows["complete"][:] = np.arange(learner.ring.rows_per_lane) % 11 != 10
    learner.ring.head[:] = learner.ring.rows_per_lane


def _update(learner: Learner, seconds: float) -> Update:
    """On a GPU from one publication of weights to the next, so that its work is done when the clock stops."""
    count = 1 if learner.updates.captured is None else learner.config.learner.publish_interval

    def update() -> None:
        if not learner.update(count):
            raise ConfigError("replay.capacity: the measurement's ring is too small for sac.batch_size")

    samples = _repeat(update, seconds)
    # the mean, since now and then there is a publication among them
    return Update(statistics.fmean(took.seconds for took in samples) / count, _cores(samples))


# What a core does: a loop whose rounds are counted, from when a line comes in.
_LOOP = """
import sys, time
print("ready", flush=True)
sys.stdin.readline()
rounds, begin, end = 0, time.process_time(), time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    for value in range(2000):
        value * value
    rounds += 1
print(rounds, time.process_time() - begin)
"""


def usable_cores(seconds: float) -> float:
    """What processes that compute together get done, in units of what a core does for one alone.

    There are as many of them as a run can have at work when the cores are what it lacks: one for each core, the policy
    and the learner. Less than the number of cores, where cores are threads of one another or others use them too.
    """

    def rounds_and_cpu_s(processes: int) -> tuple[float, float]:
        command = [sys.executable, "-c", _LOOP, str(seconds / 2)]
        children = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(processes)
        ]
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        numbers = [[float(word) for word in child.communicate()[0].split()] for child in children]
        return sum(rounds for rounds, _ in numbers), sum(cpu_s for _, cpu_s in numbers)

    rounds, cpu_s = rounds_and_cpu_s(1)
    together, _ = rounds_and_cpu_s(available_cpus() + 2)
    return together / (rounds / cpu_s) / (seconds / 2)
