"""Prints what a publication of the actor's weights costs, over the run's channel and over a bare ZeroMQ socket in turn.

    python scripts/studies/measure_channel.py --rounds 10 --publications 300

The bare one is a socket in the abstract namespace, without keys, and a frame without a checksum that nobody looks at:
what the channel was at first. Both ends are in this process; `cpu_us` is all that its threads take for one publication
(encode, send, encrypt, receive, check), `latency_us` the time from before the encoding to the weights in hand. Each
figure is the median of its rounds; `load` is the machine's load average, before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import zmq

from dsrl_async.config.settings import Config
from dsrl_async.run.channel import SocketDirectory, make_ends
from dsrl_async.run.weights import WeightPublisher, WeightSubscriber, encode
from dsrl_async.sac.flat import layout_hash
from dsrl_async.sac.networks import Actor

Exchange = Callable[[int], np.ndarray | None]
"""Publishes weights of a version, or with -1 only serves late joiners; returns what the subscriber has got."""
HORIZON = 10


@contextmanager
def channel(actor: Actor, flat: np.ndarray) -> Iterator[Exchange]:
    directory, layout = SocketDirectory(), layout_hash(actor)
    ends = make_ends(directory.endpoint)
    publisher = WeightPublisher(ends.publisher)
    subscriber = WeightSubscriber(ends.subscriber, layout, flat.size)
    updates = 1 << 40

    def exchange(version: int) -> np.ndarray | None:
        if version < 0:
            publisher.serve_late_joiners()
            return None
        publisher.publish(encode(version, layout, flat))
        if not subscriber.socket.poll(1000):
            return None
        weights = subscriber.newest(updates)
        return None if weights is None else weights.flat

    yield exchange
    subscriber.close()
    publisher.close()
    directory.close()


@contextmanager
def bare(actor: Actor, flat: np.ndarray) -> Iterator[Exchange]:
    header, layout = struct.Struct("<8sQqq"), layout_hash(actor)
    with zmq.Context() as context, context.socket(zmq.XPUB) as publisher, context.socket(zmq.SUB) as subscriber:
        publisher.linger = 0
        publisher.bind(address := f"ipc://@measure-channel-{os.getpid()}")
        subscriber.setsockopt(zmq.CONFLATE, 1)
        subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        subscriber.connect(address)

        def exchange(version: int) -> np.ndarray | None:
            if version < 0:
                while publisher.poll(0):
                    publisher.recv()
                return None
            publisher.send(header.pack(b"measure.", layout, version, flat.size) + flat.tobytes(), copy=False)
            if not subscriber.poll(1000):
                return None
            return np.frombuffer(subscriber.recv(copy=False).buffer, np.float32, offset=header.size)

        yield exchange


def measure(exchange: Exchange, flat: np.ndarray, publications: int) -> tuple[float, float]:
    """CPU time of a publication and its median latency, in seconds."""
    while exchange(0) is None:  # until the subscription is there
        exchange(-1)
    latencies, cpu = [], time.process_time()
    for version in range(1, publications + 1):
        begin = time.perf_counter()
        received = exchange(version)
        latencies.append(time.perf_counter() - begin)
        assert received is not None
        assert np.array_equal(received[:8], flat[:8])
    return (time.process_time() - cpu) / publications, statistics.median(latencies)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--publications", type=int, default=300)
    options = parser.parse_args()
    torch.manual_seed(0)
    actor = Actor(Config().sac, HORIZON)
    flat = actor.flat.detach().numpy()
    found: dict[str, list[tuple[float, float]]] = {"bare": [], "channel": []}
    load = [os.getloadavg()[0]]
    for _ in range(options.rounds):
        for name, way in (("bare", bare), ("channel", channel)):
            with way(actor, flat) as exchange:
                found[name].append(measure(exchange, flat, options.publications))
    load.append(os.getloadavg()[0])
    medians = {
        name: {
            "cpu_us": round(statistics.median(cpu for cpu, _ in rounds) * 1e6),
            "latency_us": round(statistics.median(latency for _, latency in rounds) * 1e6),
        }
        for name, rounds in found.items()
    }
    print(json.dumps({"bytes": flat.nbytes, **medians, "load": [round(value, 1) for value in load]}))
