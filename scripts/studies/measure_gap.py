"""Measures how long the device waits for the host between two batches, and simulates what an overlap could gain.

    python scripts/studies/measure_gap.py

It measures what the inference process does for a batch beside waiting for the device, in CPU time, which other programs
disturb little. The device sleeps, observations are two 224 x 224 images and one of 64 x 64, and a process waits for
each answer.
  gather      copies the observations into the batch
  transfers   copies them row by row and field by field as for a GPU, but into host memory, without the driver's time
              and a GPU's launches
  launch      finds the ready lanes and chooses the batch
  scatter     writes the answers and wakes the workers

It simulates, with the draws of `bench pipeline`, the decisions/s if none of this took time; the share of them that
remains if the device waits for all of it, as it does; and the share that remains with overlap, when waiting requests
are gathered while the device computes and the next batch is launched before the answers are scattered, so that the
device waits only for the launch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from dsrl_async.bench.pipeline import DEVICES, MODEL_DECISIONS, SEED
from dsrl_async.bench.simulated.device import PROMPT_LENGTH, SimulatedPolicy
from dsrl_async.bench.simulated.environment import HORIZON, SPEC
from dsrl_async.bench.simulated.run import FAR_AHEAD, WARMUP_DECISIONS, Simulation, run_config
from dsrl_async.config.settings import InferenceConfig
from dsrl_async.host.command import guard
from dsrl_async.plan.simulation import EnvironmentTimes, Host, simulate
from dsrl_async.run.inference import server as inference
from dsrl_async.sac.networks import Actor
from dsrl_async.shm import events
from dsrl_async.shm.memory import create_memory

SIZES = InferenceConfig().buckets
Curve = Callable[[int], float]


class PhasesInCpuTime:
    """Replaces `InferenceServer.phase` and sums up the thread's CPU-seconds by phase."""

    def __init__(self) -> None:
        self.cpu_s: dict[str, float] = {}

    def __call__(self, name: str) -> AbstractContextManager[None]:
        @contextmanager
        def phase():  # type: ignore[no-untyped-def]
            begin = time.thread_time()
            yield
            self.cpu_s[name] = self.cpu_s.get(name, 0.0) + time.thread_time() - begin

        return phase()


def wait_forever(wake_fd: int) -> None:
    while True:
        events.wait(wake_fd, timeout_s=10.0)


def server_of_sleeping_device(service_s: float) -> tuple[inference.InferenceServer, list[int]]:
    """A server with as many lanes as the largest batch has rows, and the events that wake their workers."""
    config = run_config(Simulation(SIZES[-1], EnvironmentTimes(), dict.fromkeys(SIZES, service_s)))
    policies = inference.Policies(
        {(size, PROMPT_LENGTH): SimulatedPolicy(config, size, service_s, gather=True) for size in SIZES},
        Actor(config.sac, HORIZON, torch.device("cpu"), config.seed),
        prompt_lengths=np.array([PROMPT_LENGTH]),
    )
    wake_fds = [events.create() for _ in range(config.actors)]
    arena = create_memory(config, SPEC, HORIZON)
    server = inference.InferenceServer(config, arena, policies, inference.notifier(wake_fds))
    server.policy_version = 0
    server.counters.learner_updates[0] = FAR_AHEAD
    server.counters.actor_decisions[0] = WARMUP_DECISIONS
    return server, wake_fds


def transfer(rows: np.ndarray, lanes: np.ndarray, buffer: torch.Tensor) -> None:
    """Copies as `inference.gather` does for a GPU."""
    for index, lane in enumerate(lanes):
        buffer[index].copy_(torch.from_numpy(rows[lane]), non_blocking=True)


def measure(server: inference.InferenceServer, size: int, repeats: int) -> dict[str, float]:
    """Median CPU-seconds per batch of `size` for gather, transfers, scatter, and launch, which is the rest."""
    slots, samples = server.slots, []
    buffers = server.policies.steered_batches[size, PROMPT_LENGTH].inputs
    server_fd = events.create()
    for repeat in range(repeats):
        for lane in range(size):
            slots.images[lane] = slots.sac_image[lane] = repeat % 256
            slots.request(lane, 1, (size << 20) + repeat)
        phases: Any = PhasesInCpuTime()
        server.phase = phases
        begin = time.thread_time()
        events.clear(server_fd)
        server.serve_ready(slots.ready())
        parts = {**phases.cpu_s, "launch": time.thread_time() - begin - sum(phases.cpu_s.values())}
        assert len(slots.ready()) == 0
        begin = time.thread_time()
        for name, buffer in buffers.items():
            transfer(getattr(slots, name), np.arange(size), buffer)
        samples.append({**parts, "transfers": time.thread_time() - begin})
    return {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}


def rate(curve: Curve, actors: int, host: Host | None) -> float:
    draws = [EnvironmentTimes().totals(SEED, lane) for lane in range(actors)]
    return simulate(draws, curve, SIZES, MODEL_DECISIONS, MODEL_DECISIONS // 4, host=host).decisions_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--service-ms", type=float, default=10.0, help="time that the device sleeps (default: 10)")
    parser.add_argument("--repeats", type=int, default=200, help="batches of each size (default: 200)")
    parser.add_argument("--actors", nargs="+", type=int, default=[8, 16, 24, 32, 64])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    server, wake_fds = server_of_sleeping_device(arguments.service_ms / 1e3)
    waiting = [get_context("fork").Process(target=wait_forever, args=(fd,), daemon=True) for fd in wake_fds]
    for process in waiting:
        process.start()
    parts = {size: measure(server, size, arguments.repeats) for size in SIZES}
    for process in waiting:
        process.kill()

    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; CPU-microseconds per batch\n")
    names = ("gather", "transfers", "launch", "scatter")
    print("| rows | " + " | ".join(names) + " |\n|---|---|---|---|---|")
    for size, part in parts.items():
        print(f"| {size} | " + " | ".join(f"{1e6 * part[name]:.0f}" for name in names) + " |")

    def seconds(name: str) -> Curve:
        return lambda count: float(np.interp(count, SIZES, [part[name] for part in parts.values()]))

    print("\n| device | actors | no gap, decisions/s | gather | with overlap | transfers | with overlap |")
    print("|---|---|---|---|---|---|---|")
    for device, curve in DEVICES.items():
        service = {size: curve(size) for size in SIZES}.__getitem__
        for actors in arguments.actors:
            best = rate(service, actors, None)
            shares = [
                rate(service, actors, Host(seconds(way), seconds("launch"), seconds("scatter"), overlap)) / best
                for way in ("gather", "transfers")
                for overlap in (False, True)
            ]
            print(f"| {device} | {actors} | {best:.1f} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")


if __name__ == "__main__":
    sys.exit(guard(main))
