"""A transport in a process of its own, which starts the environments' processes.

    python -m dsrl_async.bench.systems.transport_process '{"system": ..., "environments": N, "gather": ..., ...}'

answers with a line {"decisions", "seconds", "cpu_s"}; see `SYSTEMS`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context

import numpy as np

from dsrl_async.bench.simulated.environment import CHUNK, HORIZON, SPEC, SleepingEnvironment
from dsrl_async.bench.systems import bare_transport
from dsrl_async.host.cpu_time import usage
from dsrl_async.plan.simulation import EnvironmentTimes
from dsrl_async.shm import events
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.slots import Slots, slot_fields

NOISE_DIM = 32

Transport = Callable[[int, bool], AbstractContextManager[tuple[Callable[[], int], list[int]]]]
"""(environments, whether observations are copied into a batch) -> a step, which answers environments and returns how
many, and the ids of their processes."""


def _environment(lane: int, arena: Arena, wake_fd: int, server_fd: int) -> None:
    slots, environment = Slots(arena), SleepingEnvironment(EnvironmentTimes(0.0, 0.0, 0.0, 0.0), 0, lane)
    count = 0
    while True:
        environment.observe(slots.images[lane], slots.sac_image[lane], slots.state[lane])
        count += 1
        number = slots.request(lane, 1, count)
        events.notify(server_fd)
        while not slots.answered(lane, number):
            events.wait(wake_fd, timeout_s=1.0)
        slots.action_chunk[lane].copy()  # as in the bare transport


@contextmanager
def slots_only(environments: int, gather: bool) -> Iterator[tuple[Callable[[], int], list[int]]]:
    """The run's own slots, wake-ups and gathering, without anything else that workers and inference process do."""
    arena = Arena.create(slot_fields(environments, SPEC, CHUNK, NOISE_DIM, HORIZON * NOISE_DIM))
    server_fd, wake_fds = events.create(), [events.create() for _ in range(environments)]
    targets = [(lane, arena, wake_fds[lane], server_fd) for lane in range(environments)]
    children = [get_context("fork").Process(target=_environment, args=target, daemon=True) for target in targets]
    for child in children:
        child.start()
    import torch  # only now, since the forked environments do without

    from dsrl_async.run.inference.copies import copy_rows
    from dsrl_async.run.inference.server import notifier

    torch.set_num_threads(1)
    slots, notify = Slots(arena), notifier(wake_fds)
    buffers = [
        (rows, torch.zeros(rows.shape, dtype=torch.from_numpy(rows).dtype))
        for rows in (slots.images, slots.sac_image, slots.state)
    ]
    chunk = np.zeros((environments, CHUNK, SPEC.action_dim), np.float32)
    noise = np.zeros((environments, NOISE_DIM), np.float32)

    def answer() -> int:
        events.wait(server_fd, timeout_s=1.0)
        lanes = slots.ready()
        numbers = slots.numbers(lanes)
        if gather:
            for rows, buffer in buffers:
                copy_rows(rows, lanes, buffer)
        notify(slots.answer(lanes, numbers, chunk[: len(lanes)], noise[: len(lanes)], 0))
        return len(lanes)

    yield answer, [child.pid for child in children if child.pid]
    for child in children:
        child.kill()


@contextmanager
def memcpy(environments: int, gather: bool) -> Iterator[tuple[Callable[[], int], list[int]]]:
    """The bound: a process copies payloads from `environments` rows to as many others, again and again."""
    source = np.random.default_rng(0).integers(0, 256, (environments, bare_transport.PAYLOAD), np.uint8)
    destination = np.empty_like(source)

    def copy() -> int:
        for row in range(environments):
            np.copyto(destination[row], source[row])
        return environments

    yield copy, []


SYSTEMS: dict[str, Transport] = {"bare": bare_transport.bare, "slots": slots_only, "memcpy": memcpy}


def main(system: str, environments: int, gather: bool, warm_s: float, seconds: float) -> dict[str, float]:
    """Make steps for `warm_s`, then measure further ones for `seconds`."""
    with SYSTEMS[system](environments, gather) as (step, pids):
        pids = [os.getpid(), *pids]
        until = time.monotonic() + warm_s
        while time.monotonic() < until:
            step()
        decisions, begin, before = 0, time.monotonic(), usage(pids)
        while time.monotonic() < begin + seconds:
            decisions += step()
        return {
            "decisions": decisions,
            "seconds": time.monotonic() - begin,
            "cpu_s": usage(pids).since(before).running,
        }


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))), flush=True)
