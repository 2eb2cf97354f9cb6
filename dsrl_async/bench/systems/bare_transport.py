"""A transport as bare as Python allows, with which `bench transport` compares the real processes.

It has anonymous shared memory, an eventfd per process, and a request and an answer number per environment. It has no
transitions, noise, counters or weights, and nobody notices when a process dies.
"""

from __future__ import annotations

import mmap
import os
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def bare(environments: int, gather: bool) -> Iterator[tuple[Callable[[], int], list[int]]]:
    """The transport's step, as `transport_process.Transport` describes it."""
    memory = mmap.mmap(-1, environments * (PAYLOAD + 1024))
    events = [os.eventfd(0) for _ in range(environments + 1)]
    context = get_context("fork")
    targets = [(lane, memory, environments, events[lane], events[-1]) for lane in range(environments)]
    children = [context.Process(target=environment, args=target, daemon=True) for target in targets]
    for child in children:
        child.start()
    observation, action, asked, answered = arrays(memory, environments)
    batch, chunk = np.empty_like(observation), np.zeros((environments, *ANSWER), np.float32)

    def answer() -> int:
        os.eventfd_read(events[-1])
        numbers = asked.copy()
        ready = np.flatnonzero(numbers != answered)
        if gather:
            np.take(observation, ready, axis=0, out=batch[: len(ready)], mode="clip")
        action[ready] = chunk[: len(ready)]
        answered[ready] = numbers[ready]
        for lane in ready.tolist():
            os.eventfd_write(events[lane], 1)
        return len(ready)

    yield answer, [child.pid for child in children if child.pid]
    for child in children:
        child.kill()
        child.join()
    for event in events:
        os.close(event)
