"""Uplink and downlink as processes, over sockets with keys: killed at random, refused, and deaf to strangers."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from support.mirrors import Player, assert_mirrored, make_arena

from dsrl_async.config.load import to_yaml, validate
from dsrl_async.groups import reports, wire
from dsrl_async.groups.grants import least_rows
from dsrl_async.host import processes
from dsrl_async.run.channel import Channel, SocketDirectory, make_ends, write_secret
from dsrl_async.run.sockets import Bound, Connected
from dsrl_async.run.weights import FrameSubscriber, WeightPublisher, encode
from dsrl_async.shm import events
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters, Stop
from dsrl_async.shm.replay import ReplayRing

LANES, LAYOUT = 3, 7
KILLS = int(os.environ.get("DSRL_LINK_KILLS", "4"))


class Machines:
    """The learner's machine and one group, with their two processes between them; the test is all others."""

    def __init__(self, base: Path) -> None:
        self.base, self.directories = base, [SocketDirectory() for _ in range(4)]
        rows, weights, local, own = (directory.endpoint for directory in self.directories)
        self.server, self.client = wire.make_link(rows, weights)
        self.learner_ends, self.group_ends = make_ends(local), make_ends(own)
        self.learner, self.group = make_arena(LANES, 200, groups=1), make_arena(LANES, least_rows(LANES) + 20)
        self.counters, self.of_group = Counters(self.learner), Counters(self.group)
        self.counters.group_started[0] = 1
        self.of_group.control_granted[0] = -1
        reports.begin_with(self.of_group, reports.counters_for(self.counters, 0, 1))
        self.ready = [events.create(), events.create()]
        (base / "logs").mkdir()
        (base / "config.yaml").write_text(to_yaml(validate({"replay_ratio": 0.5})))
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.publisher = WeightPublisher(self.learner_ends.publisher)
        self.subscriber = FrameSubscriber(self.group_ends.subscriber)

    def start(self, name: str, **more: Any) -> subprocess.Popen[bytes]:
        jobs: dict[str, tuple[dict[str, Any], Arena, Channel, wire.Link]] = {
            "uplink": (
                {"group": 0, "incarnation": 1, "decisions_before": 0, "window_rows": 16},
                self.group,
                self.group_ends.publisher,
                self.client,
            ),
            "downlink": (
                {"groups": 1, "tasks": 1, "publish_s": 0.2},
                self.learner,
                self.learner_ends.subscriber,
                self.server,
            ),
        }
        job, arena, end, link = jobs[name]
        ready, channel_fd, link_fd = self.ready[name == "uplink"], write_secret(end), write_secret(link)
        described = {"arena": arena.describe(), "run_dir": str(self.base), "transition_ready_fd": ready}
        fds = {"channel_fd": channel_fd, "link_fd": link_fd}
        self.children[name] = processes.start(
            f"dsrl_async.groups.{name}",
            {**described, **fds, **job, **more},
            [arena.fd, ready, channel_fd, link_fd],
            self.log(name),
            threads=1,
        )
        os.close(channel_fd)
        os.close(link_fd)
        return self.children[name]

    def log(self, name: str) -> Path:
        return self.base / "logs" / f"{name}.log"

    def close(self) -> None:
        processes.kill_all(self.children.values())
        self.publisher.close()
        self.subscriber.close()
        events.close(self.ready)
        for directory in self.directories:
            directory.close()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    both = Machines(tmp_path)
    yield both
    both.close()


def wait_until(met: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def test_whoever_is_killed_all_rows_arrive_once_and_weights_and_the_end_reach_the_group(
    machines: Machines,
) -> None:
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        check_kills(machines, asked)
    finally:
        signal.signal(signal.SIGTERM, before)


def check_kills(machines: Machines, asked: list[int]) -> None:
    counters, of_group, rng = machines.counters, machines.of_group, np.random.default_rng(0)
    origin, mirror = ReplayRing(machines.group), ReplayRing(machines.learner)
    players = [Player(machines.group, lane, lane) for lane in range(LANES)]
    weights = np.arange(2000, dtype=np.float32)
    for name in ("downlink", "uplink"):
        machines.start(name)
    frames: list[bytes] = []
    published, kills, kill_at = 0.0, 0, 50  # rows
    begin = time.monotonic()
    while counters.group_arrived[0] < kill_at or kills < KILLS:
        now = time.monotonic()
        assert now < begin + 60 + 20 * KILLS
        if now - published > 0.05:  # a learner that keeps the ratio
            published = now
            done = int(counters.learner_updates[0])
            counters.learner_updates[0] = max(done, int((counters.decisions() - 400) * 0.5))
            machines.publisher.publish(encode(int(counters.learner_updates[0]), LAYOUT, weights))
        machines.publisher.serve_late_joiners()
        if (frame := machines.subscriber.newest()) is not None:
            frames.append(frame)
        if of_group.decisions() + LANES <= of_group.control_granted[0]:
            for player in players:
                player.play(1)
            events.notify(machines.ready[1])
        if counters.group_arrived[0] >= kill_at and kills < KILLS:
            kill_at, kills = int(counters.group_arrived[0] + rng.integers(1, 60)), kills + 1
            name = ("downlink", "uplink")[int(rng.integers(2))]
            processes.kill_all([machines.children[name]])
            machines.start(name)
        time.sleep(0.001)
    assert counters.downlink_heartbeat_ns[0] > 0
    counters.stop = Stop.WORKERS
    wait_until(lambda: asked)
    of_group.stop = Stop.EVERYONE
    machines.children["uplink"].wait(30)
    assert machines.children["uplink"].returncode == 0
    counters.stop = Stop.EVERYONE
    machines.children["downlink"].wait(30)
    assert machines.children["downlink"].returncode == 0
    for lane in range(LANES):
        assert_mirrored(origin, lane, mirror, lane)
    for name in ("decisions", "env_steps", "started_episodes", "episodes", "successes"):
        assert (getattr(of_group, f"actor_{name}") == getattr(counters, f"actor_{name}")).all(), name
    assert of_group.learner_updates[0] <= counters.learner_updates[0]
    # Thinned: as many as fit in the time, and one for each who joined again.
    assert 1 <= len(frames) <= (time.monotonic() - begin) / 0.2 + 3 * kills + 3
    assert all(frame[40:] == weights.tobytes() for frame in frames)
    print(f"{kills} kills, {counters.decisions()} decisions, {counters.group_repeated[0]} repeated")


def test_a_group_that_does_not_fit_ends_with_the_sentence(machines: Machines) -> None:
    machines.group = make_arena(LANES + 1, 40)
    machines.start("downlink")
    uplink = machines.start("uplink")
    uplink.wait(60)
    assert uplink.returncode == processes.FATAL
    sentence = f"group 0 has {LANES + 1} environments, and the learner's machine expects {LANES}"
    assert processes.last_line(machines.log("uplink")) == sentence
    assert sentence in machines.log("downlink").read_text()
    assert machines.counters.group_incarnation[0] == 0


def test_an_address_that_is_taken_ends_the_downlink_with_a_sentence(machines: Machines) -> None:
    taken: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    port = taken.bind_to_random_port("tcp://127.0.0.1")
    machines.server = machines.server._replace(rows=machines.server.rows._replace(endpoint=f"tcp://127.0.0.1:{port}"))
    downlink = machines.start("downlink")
    downlink.wait(60)
    taken.close()
    assert downlink.returncode == processes.FATAL
    assert f"the downlink cannot use tcp://127.0.0.1:{port}" in processes.last_line(machines.log("downlink"))


# ---- strangers


def heard(bound: Bound, seconds: float) -> list[list[bytes]]:
    return [bound.socket.recv_multipart()] if bound.socket.poll(round(seconds * 1000)) else []


@pytest.mark.parametrize("endpoint", ["ipc", "tcp"])
def test_the_rows_end_hears_nobody_without_the_keys(endpoint: str) -> None:
    directory = SocketDirectory()
    ends = make_ends(directory.endpoint if endpoint == "ipc" else free_endpoint())
    bound = Bound(ends.publisher, zmq.ROUTER, 1000)
    own = make_ends(ends.publisher.endpoint).subscriber
    strangers = {
        "other keys": own,
        "another client key": own._replace(server=ends.subscriber.server),
        "another server key": ends.subscriber._replace(server=own.server),
    }
    try:
        for end in strangers.values():
            stranger = Connected(end, zmq.DEALER, 1000, identity=b"0.1")
            stranger.socket.send(b"hello")
            assert heard(bound, 0.3) == []
            stranger.close()
        plain: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        plain.linger = 0
        plain.connect(ends.publisher.endpoint)
        plain.send(b"hello")
        assert heard(bound, 0.3) == []
        plain.close()
        friend = Connected(ends.subscriber, zmq.DEALER, 1000, identity=b"0.1")
        friend.socket.send(b"hello")
        assert heard(bound, 20) == [[b"0.1", b"hello"]]
        friend.close()
    finally:
        bound.close()
        directory.close()


def free_endpoint() -> str:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        return f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"


def test_one_that_sends_too_much_is_disconnected_and_a_group_takes_its_place(machines: Machines) -> None:
    ends = machines.server.rows, machines.client.rows
    bound = Bound(ends[0], zmq.ROUTER, 1000, [(zmq.ROUTER_HANDOVER, 1)])
    large = hold_dealer(ends[1])
    large.send(bytes(100_000))
    assert heard(bound, 0.5) == []
    friend = Connected(ends[1], zmq.DEALER, 1000, identity=b"0.1")
    friend.socket.send(b"hello")
    assert heard(bound, 20) == [[b"0.1", b"hello"]]
    # Its successor has the same name.
    successor = Connected(ends[1], zmq.DEALER, 1000, identity=b"0.1")
    successor.socket.send(b"again")
    assert heard(bound, 20) == [[b"0.1", b"again"]]
    bound.socket.send_multipart([b"0.1", b"answer"])
    assert successor.socket.poll(20_000)
    for socket in (large, friend, successor, bound):
        socket.close()


def hold_dealer(end: Channel) -> zmq.Socket[bytes]:
    """A socket with the keys of an end, without any of the limits that ours have."""
    dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    dealer.linger = 0
    dealer.setsockopt_string(zmq.CURVE_SERVERKEY, end.server)
    dealer.setsockopt_string(zmq.CURVE_PUBLICKEY, end.client)
    dealer.setsockopt_string(zmq.CURVE_SECRETKEY, end.secret)
    dealer.connect(end.endpoint)
    return dealer


def test_a_socket_that_a_cleaner_has_removed_is_made_again(machines: Machines) -> None:
    bound = Bound(machines.server.rows, zmq.ROUTER, 1000)
    assert not bound.keep_place()
    Path(machines.server.rows.endpoint.removeprefix("ipc://")).unlink()
    assert bound.keep_place()
    friend = Connected(machines.client.rows, zmq.DEALER, 1000, identity=b"0.1")
    friend.socket.send(b"hello")
    assert heard(bound, 20) == [[b"0.1", b"hello"]]
    friend.close()
    bound.close()
