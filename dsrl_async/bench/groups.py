"""Rows from groups to the learner's machine, and weights to groups, over sockets with keys.

A row has an agent's image of 64 x 64 x 3, 8 floats and a noise of 32. An uplink collects rows that lie in a ring, so
that no worker costs anything, and a downlink replays them into another one; they are processes of their own, as in a
run, and both ends of every socket encrypt. The figures are medians of
  cpu           CPU-microseconds per row, of the uplink, the downlink and both
  rows_per_s    as fast as they can
for messages of so many rows, and of
  cpu           CPU-milliseconds per frame of weights, of the publisher and of each group
for so many groups. `ipc` is for groups on the learner's machine, `tcp` for those on others.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import get_context

import numpy as np
import zmq

from dsrl_async.bench.figures import (
    Figure,
    JsonLines,
    Metrics,
    add_output_arguments,
    medians,
    require_positive,
    take_turns,
)
from dsrl_async.config.load import validate
from dsrl_async.groups import wire
from dsrl_async.groups.downlink import WAITING_FRAMES, Downlink, serve
from dsrl_async.groups.uplink import Uplink
from dsrl_async.host.cpu_time import usage
from dsrl_async.run.channel import Channel, SocketDirectory, make_ends
from dsrl_async.run.sockets import Connected
from dsrl_async.run.weights import FrameSubscriber, WeightPublisher, encode
from dsrl_async.shm import events
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters, counter_fields
from dsrl_async.shm.replay import ReplayRing, replay_fields

LANES, ROWS_PER_LANE, WINDOW_ROWS = 16, 256, 512
FRAMES_PER_S = 10.0
PATIENCE_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", nargs="+", choices=["ipc", "tcp"], default=["ipc", "tcp"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 128], help="in a message (default: 1 16 128)")
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 4], help="that take weights (default: 1 4)")
    parser.add_argument("--weights-mb", type=float, default=8.74, help="of a frame of weights (default: 8.74)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a repeat (default: 2)")
    add_output_arguments(parser, repeats=3)


@contextlib.contextmanager
def endpoints(kind: str, count: int) -> Iterator[list[str]]:
    """So many addresses to bind on this machine."""
    with contextlib.ExitStack() as stack:
        if kind == "ipc":
            directories = [SocketDirectory() for _ in range(count)]
            for directory in directories:
                stack.callback(directory.close)
            yield [directory.endpoint for directory in directories]
            return
        with zmq.Context() as context:
            sockets = [context.socket(zmq.ROUTER) for _ in range(count)]
            ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in sockets]
            for socket in sockets:
                socket.close()
        yield [f"tcp://127.0.0.1:{port}" for port in ports]


@contextlib.contextmanager
def children(*work: Callable[[], object]) -> Iterator[list[int]]:
    """Forked processes, which have no sockets yet; yields their ids."""
    processes = [get_context("fork").Process(target=of_child, daemon=True) for of_child in work]
    for process in processes:
        process.start()
    try:
        yield [process.pid for process in processes if process.pid]
    finally:
        for process in processes:
            if process.pid:
                os.kill(process.pid, signal.SIGKILL)
            process.join()


def make_arena(groups: int = 0) -> Arena:
    rows = replay_fields(LANES, ROWS_PER_LANE, state_dim=8, noise_width=32)
    return Arena.create({**rows, **counter_fields(LANES, groups=groups)})


def send_rows(arena: Arena, link: wire.Link, rows: int) -> None:
    """An uplink that always has `rows` rows for its next message."""
    uplink, ring = Uplink(arena, 0, WINDOW_ROWS), ReplayRing(arena)
    ring.rows["complete"][:] = True
    uplink.batch = rows
    end = Connected(link.rows, zmq.DEALER, wire.LONGEST_STATE, identity=wire.identity(0, 1))
    while not uplink.linked:
        wire.send(end.socket, wire.HELLO, uplink.hello())
        if end.socket.poll(200):
            uplink.take(end.socket.recv_multipart())
    while True:
        for frames in wire.received(end.socket, WINDOW_ROWS):
            uplink.take(frames)
        ring.head[: rows if rows < LANES else LANES] += -(-rows // LANES)  # as if workers had written them
        while (batch := uplink.next_rows()) is None:
            end.socket.poll(50)
            uplink.take(end.socket.recv_multipart())
        wire.send(end.socket, wire.ROWS, batch.view(np.uint8).data)
        uplink.confirm(batch)


def measure_rows(kind: str, rows: int, seconds: float) -> Metrics:
    """CPU-seconds of both processes, and rows, in so many seconds."""
    learner, group = make_arena(groups=1), make_arena()
    counters, ready = Counters(learner), events.create()
    counters.group_started[0] = 1
    with endpoints(kind, 2) as (for_rows, for_weights), endpoints("ipc", 1) as (nobody,):
        server, client = wire.make_link(for_rows, for_weights)
        weights = make_ends(nobody).subscriber
        downlink = Downlink(validate({}), learner, groups=1, tasks=1)
        with children(
            partial(send_rows, group, client, rows), partial(serve, downlink, server, weights, 1.0, ready)
        ) as pids:
            wait_for(lambda: int(counters.group_arrived[0]) > 3 * WINDOW_ROWS)
            before, first, begin = [usage([pid]) for pid in pids], int(counters.group_arrived[0]), time.monotonic()
            time.sleep(seconds)
            uplink_s, downlink_s = (usage([pid]).since(old).running for pid, old in zip(pids, before, strict=True))
            arrived, took = int(counters.group_arrived[0]) - first, time.monotonic() - begin
    events.close([ready])
    return {"rows": arrived, "seconds": took, "uplink": uplink_s, "downlink": downlink_s}


def wait_for(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not met():
        if time.monotonic() > deadline:
            raise ValueError(f"nothing has arrived within {PATIENCE_S:.0f} s")
        time.sleep(0.01)


def publish_weights(channel: Channel, size: int, count: np.ndarray) -> None:
    publisher, flat = WeightPublisher(channel, WAITING_FRAMES), np.ones(size, np.float32)
    while True:
        publisher.serve_late_joiners()
        publisher.publish(encode(int(count[0]), 0, flat))
        count[0] += 1
        time.sleep(1 / FRAMES_PER_S)


def take_weights(channel: Channel, count: np.ndarray) -> None:
    subscriber = FrameSubscriber(channel)
    while True:
        count[0] += subscriber.newest() is not None
        time.sleep(0.01)


def measure_weights(kind: str, groups: int, megabytes: float, seconds: float) -> Metrics:
    """CPU-seconds of the publisher and of all groups, and the frames of each, in so many seconds."""
    arena = Arena.create({"counts": ((groups + 1, 1), "int64")})
    counts = arena["counts"]
    with endpoints(kind, 1) as (endpoint,):
        publisher, subscriber = make_ends(endpoint)
        size = int(megabytes * 1e6 / 4)
        work = [
            partial(publish_weights, publisher, size, counts[0]),
            *(partial(take_weights, subscriber, count) for count in counts[1:]),
        ]
        with children(*work) as pids:
            wait_for(lambda: bool((counts[1:] > 3).all()))
            before, first = [usage([pid]) for pid in pids], counts.copy()
            time.sleep(seconds)
            cpu = [usage([pid]).since(old).running for pid, old in zip(pids, before, strict=True)]
            frames = (counts - first)[:, 0]
    return {"published": frames[0], "taken": frames[1:].sum(), "publisher": cpu[0], "groups": sum(cpu[1:])}


def summarise_rows(samples: Sequence[Metrics]) -> Iterator[Figure]:
    values = medians(
        [
            {
                "rate": each["rows"] / each["seconds"],
                "uplink": 1e6 * each["uplink"] / each["rows"],
                "downlink": 1e6 * each["downlink"] / each["rows"],
                "both": 1e6 * (each["uplink"] + each["downlink"]) / each["rows"],
            }
            for each in samples
        ]
    )
    for system in ("uplink", "downlink", "both"):
        yield Figure(system, "cpu", values[system], "CPU-us per row")
    yield Figure("both", "rows_per_s", values["rate"], "rows/s")


def summarise_weights(samples: Sequence[Metrics]) -> Iterator[Figure]:
    values = medians(
        [
            {
                "publisher": 1e3 * each["publisher"] / each["published"],
                "each group": 1e3 * each["groups"] / each["taken"],
            }
            for each in samples
        ]
    )
    for system, value in values.items():
        yield Figure(system, "cpu", value, "CPU-ms per frame")


def run(arguments: argparse.Namespace) -> None:
    require_positive(arguments, "rows", "groups", "weights_mb", "seconds", "repeats")
    largest = wire.batch_rows(wire.row_type(ReplayRing(make_arena())))
    if max(arguments.rows) > largest:
        raise ValueError(f"--rows must not be above {largest}, which is what a message has room for")
    lines = JsonLines("groups", arguments)
    runs: dict[tuple[str, str], Callable[[], Metrics]] = {}
    for kind in arguments.endpoint:
        for rows in arguments.rows:
            runs[f"{kind}, {rows} rows a message", "rows"] = partial(measure_rows, kind, rows, arguments.seconds)
        for groups in arguments.groups:
            case = f"{kind}, weights of {arguments.weights_mb:g} MB to {groups} groups"
            runs[case, "weights"] = partial(measure_weights, kind, groups, arguments.weights_mb, arguments.seconds)
    for (case, what), measure in runs.items():
        lines.case(case)
        samples = take_turns({case: measure}, arguments.repeats)[case]
        lines.add(summarise_rows(samples) if what == "rows" else summarise_weights(samples))
