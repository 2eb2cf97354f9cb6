"""A transport as bare as Python allows, with which `bench transport` compares the real processes.

It has anonymous shared memory, an eventfd per process, and a request and an answer number per environment. It has no
transitions, noise, counters or weights, and nobody notices when a process dies.
"""

from __future__ import annotations

import math
import mmap
import os
import select
import time
from collections.abc import Callable
from multiprocessing import get_context

import numpy as np

PAYLOAD = 2 * 224 * 224 * 3 + 64 * 64 * 3 + 8 * 4
ANSWER = (10, 7)


def environment(lane: int, memory: mmap.mmap, environments: int, event: int, server_event: int) -> None:
    observation, action, asked, _ = arrays(memory, environments)
    source = np.random.default_rng(lane).integers(0, 256, PAYLOAD, np.uint8)
    poller = select.poll()
    poller.register(event, select.POLLIN)
    while True:
        np.copyto(observation[lane], source)
        asked[lane] += 1
        os.eventfd_write(server_event, 1)
        poller.poll()
        os.eventfd_read(event)
        action[lane].copy()


def arrays(memory: mmap.mmap, environments: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Views of memory: observation uint8 [N, PAYLOAD], action float32 [N, 10, 7], requests and answers int64 [N]."""
    shapes = [((environments, PAYLOAD), "u1"), ((environments, *ANSWER), "f4"), ((environments,), "i8")]
    found, offset = [], 0
    for shape, dtype in [*shapes, shapes[-1]]:
        found.append(np.ndarray(shape, dtype, memory, offset))
        offset += -(-found[-1].nbytes // 64) * 64
    return found[0], found[1], found[2], found[3]


def run(environments: int, gather: bool, warm_s: float, seconds: float, cpu_s: Callable[[list[int]], float]) -> dict:
    """Measures decisions, seconds, and the CPU-seconds of all processes; `cpu_s` reads those of process ids."""
    memory = mmap.mmap(-1, environments * (PAYLOAD + 1024))
    events = [os.eventfd(0) for _ in range(environments + 1)]
    context = get_context("fork")
    targets = [(lane, memory, environments, events[lane], events[-1]) for lane in range(environments)]
    children = [context.Process(target=environment, args=target, daemon=True) for target in targets]
    for child in children:
        child.start()
    pids = [os.getpid(), *(child.pid for child in children if child.pid)]
    observation, action, asked, answered = arrays(memory, environments)
    batch, chunk = np.empty_like(observation), np.zeros((environments, *ANSWER), np.float32)
    decisions, begin, spent = 0, math.inf, 0.0
    warm = time.monotonic() + warm_s
    while (now := time.monotonic()) < begin + seconds:
        if begin == math.inf and now >= warm:
            decisions, begin, spent = 0, now, cpu_s(pids)
        os.eventfd_read(events[-1])
        numbers = asked.copy()
        ready = np.flatnonzero(numbers != answered)
        if gather:
            np.take(observation, ready, axis=0, out=batch[: len(ready)], mode="clip")
        action[ready] = chunk[: len(ready)]
        answered[ready] = numbers[ready]
        for lane in ready.tolist():
            os.eventfd_write(events[lane], 1)
        decisions += len(ready)
    sample = {"decisions": decisions, "seconds": time.monotonic() - begin, "cpu_s": cpu_s(pids) - spent}
    for child in children:
        child.kill()
        child.join()
    for event in events:
        os.close(event)
    return sample
