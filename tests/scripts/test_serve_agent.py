"""An agent is served by openpi's protocol, and what strangers send ends nothing."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.launched import FinishedRun
from support.paths import SCRIPTS
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

import dsrl_async

spec = importlib.util.spec_from_file_location("serve_agent", SCRIPTS / "serve_agent.py")
assert spec is not None
assert spec.loader is not None
serve_agent = importlib.util.module_from_spec(spec)
sys.modules["serve_agent"] = serve_agent
spec.loader.exec_module(serve_agent)


class Served(NamedTuple):
    """A server in a thread of this process."""

    agent: dsrl_async.Agent
    port: int

    def connect(self) -> ClientConnection:
        return connect(f"ws://127.0.0.1:{self.port}", compression=None, max_size=None)


@pytest.fixture(scope="module")
def served(finished_run: FinishedRun) -> Iterator[Served]:
    agent = dsrl_async.load_agent(finished_run.run_dir, device="cpu")
    loop, ready, ports = asyncio.new_event_loop(), threading.Event(), []

    def listening(port: int) -> None:
        ports.append(port)
        ready.set()

    keys = serve_agent.Keys()
    task = loop.create_task(serve_agent.run_server(agent, "127.0.0.1", 0, keys, listening=listening))

    def run() -> None:
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(30)
    yield Served(agent, ports[0])
    loop.call_soon_threadsafe(task.cancel)
    thread.join(30)
    assert not thread.is_alive()


def packed(message: Any) -> bytes:
    """As openpi's client packs it, written from its `msgpack_numpy.py`."""

    def array(value: Any) -> Any:
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}

    content: bytes = msgpack.Packer(default=array).pack(message)
    return content


def unpacked(data: Any) -> Any:
    def array(value: dict[Any, Any]) -> Any:
        if b"__ndarray__" in value:
            return np.ndarray(buffer=value[b"data"], dtype=np.dtype(value[b"dtype"]), shape=value[b"shape"])
        return value

    assert isinstance(data, bytes), data
    return msgpack.unpackb(data, object_hook=array)


def observation(seed: int = 0) -> dict[str, Any]:
    """As openpi's LIBERO client sends it."""
    random = np.random.default_rng(seed)
    image, wrist = random.integers(0, 256, (2, 64, 64, 3), np.uint8)
    keys = {"observation/image": image, "observation/wrist_image": wrist, "observation/state": random.normal(size=8)}
    return {**keys, "prompt": "put the block on the red plate"}


def test_a_client_of_openpi_gets_the_agents_actions(served: Served) -> None:
    with served.connect() as connection:
        about = unpacked(connection.recv(timeout=10))
        assert about["prompts"] == ["put the block on the red plate"]
        assert (about["image_size"], about["state_dim"], about["chunk"]) == (64, 8, 5)
        for seed in range(2):
            sent = observation(seed)
            connection.send(packed(sent))
            received = unpacked(connection.recv(timeout=10))
            images = [sent["observation/image"], sent["observation/wrist_image"]]
            expected = served.agent.act({"images": images, "state": sent["observation/state"]})
            assert np.array_equal(received["actions"], expected)
            assert received["server_timing"]["infer_ms"] > 0


def test_two_clients_are_served_at_a_time_and_health_is_answered(served: Served) -> None:
    with served.connect() as one, served.connect() as two:
        for connection in (one, two):
            connection.recv(timeout=10)
        for connection in (two, one):
            connection.send(packed(observation()))
        assert [unpacked(connection.recv(timeout=10))["actions"].shape for connection in (one, two)] == [(5, 7)] * 2
        with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/healthz", timeout=10) as answer:
            assert (answer.status, answer.read()) == (200, b"OK\n")


def changed(**changes: Any) -> bytes:
    return packed(observation() | {key.replace("__", "/"): value for key, value in changes.items()})


def array(**changes: Any) -> bytes:
    """An observation whose state is an array with other entries."""
    state = {b"__ndarray__": True, b"data": bytes(64), b"dtype": "<f8", b"shape": [8]}
    return packed(
        observation() | {"observation/state": state | {key.encode(): value for key, value in changes.items()}}
    )


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("hello", r"must be a msgpack map"),
        (b"", r"is not msgpack"),
        (b"\xc1", r"is not msgpack"),
        (b"\x93\x01", r"is not msgpack"),
        (b"\x91" * 100_000, r"is not msgpack"),
        (b"\x80\x04K\x01.", r"is not msgpack|must be a msgpack map"),  # a pickle
        (packed([1, 2]), r"must be a msgpack map"),
        (packed({}), r"the observation lacks 'observation/image'; it has \[\]"),
        (changed(observation__state=None), r"must have one axis"),
        (changed(observation__state=np.zeros((4000, 8))), r"must have one axis: one observation is answered at a time"),
        (changed(observation__state=np.zeros(3)), r"state must be finite numbers \[8\]"),
        (changed(observation__state=np.full(8, np.inf)), r"state must be finite numbers \[8\]"),
        (changed(observation__image="x"), r"images must be uint8"),
        (changed(observation__image=np.zeros((64, 64, 3))), r"images must be uint8 .* whole numbers from 0 to 255"),
        (changed(prompt="fly"), r"prompt 'fly' is none of this agent's"),
        (changed(prompt=[1]), r"prompt \[1\] is none of this agent's"),
        (array(dtype="|O8"), r"arrays of '\|O8' are not read"),
        (array(dtype="|V8"), r"arrays of '\|V8' are not read"),
        (array(dtype="<M8[s]"), r"arrays of '<M8\[s\]' are not read"),
        (array(dtype=["<f8"]), r"is no dtype"),
        (array(dtype="nothing"), r"is not msgpack with arrays of numbers"),
        (array(shape=[1 << 40]), r"is not msgpack with arrays of numbers"),
        (array(shape=[1] * 40), r"a shape of few axes"),
        (array(shape=8), r"a shape of few axes"),
        (array(data=b"123"), r"is not msgpack with arrays of numbers"),
    ],
)
def test_what_is_no_observation_is_told_and_the_next_one_answered(served: Served, message: Any, reason: str) -> None:
    with served.connect() as connection:
        connection.recv(timeout=10)
        connection.send(message)
        said = connection.recv(timeout=10)
        assert isinstance(said, str)
        assert "\n" not in said
        with pytest.raises(AssertionError, match=reason):
            unpacked(said)
        connection.send(packed(observation()))
        assert unpacked(connection.recv(timeout=10))["actions"].shape == (5, 7)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=50))
def test_whatever_is_sent_is_answered_with_a_sentence(message: str | bytes) -> None:
    """An agent is not asked, since none of these is an observation."""
    said = serve_agent.answer(message, (None, np.random.default_rng(0)), serve_agent.Keys(), None)
    assert isinstance(said, str)
    assert said
    assert "\n" not in said


def test_a_stranger_that_is_no_websocket_and_one_that_sends_too_much_end_nothing(served: Served) -> None:
    for content in (b"\x00" * 100, b"GET / HTTP/1.1\r\n\r\n", b""):
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as stranger:
            stranger.sendall(content)
    with served.connect() as connection:
        connection.recv(timeout=10)
        with contextlib.suppress(ConnectionClosed):  # it may be closed before all is sent
            connection.send(bytes(serve_agent.LARGEST_MESSAGE + 1))
        with pytest.raises(ConnectionClosed):
            connection.recv(timeout=10)
    with served.connect() as connection:
        connection.recv(timeout=10)
        connection.send(packed(observation()))
        assert unpacked(connection.recv(timeout=10))["actions"].shape == (5, 7)


def test_a_failure_of_the_agent_is_not_the_servers_end(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with served.connect() as connection:
        connection.recv(timeout=10)
        with monkeypatch.context() as patched:
            patched.setattr(served.agent, "act", fail)
            connection.send(packed(observation()))
            assert connection.recv(timeout=10) == "the server failed at this observation; its log says why"
        connection.send(packed(observation()))
        assert unpacked(connection.recv(timeout=10))["actions"].shape == (5, 7)


def test_the_command_says_what_is_wrong(finished_run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    with pytest.raises(ValueError, match=r"^--image-keys must be 2, one for each camera, not 1$"):
        serve_agent.main([str(finished_run.run_dir), "--device", "cpu", "--image-keys", "a"])
