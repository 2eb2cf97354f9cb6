"""The weights' channel: where its socket lies, who may come near it, and what is left of it afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zmq
from support import stranger
from support.stranger import hold

from dsrl_async.config.settings import ConfigError
from dsrl_async.run import channel, preflight, sockets, weights
from dsrl_async.run.channel import Channel, Ends, SocketDirectory, make_ends, places, read_secret, sweep, write_secret
from dsrl_async.run.weights import WeightPublisher, WeightSubscriber, encode

LAYOUT, UPDATES = 7, 1000
NOBODY = 12345
"""A user that is neither this one nor known to the machine."""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory with a short name, as others see it: anybody may write, and nobody remove what is
    another's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o1777)
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


@pytest.fixture
def ends(base: Path) -> Iterator[Ends]:
    directory = SocketDirectory()
    assert directory.path.parent == base
    yield make_ends(directory.endpoint)
    directory.close()


@contextlib.contextmanager
def publishing(end: Channel, version: int = 1) -> Iterator[WeightPublisher]:
    publisher = WeightPublisher(end)
    publisher.publish(encode(version, LAYOUT, np.full(3, version, np.float32)))
    try:
        yield publisher
    finally:
        publisher.close()


def received(end: Channel, publisher: WeightPublisher | None, seconds: float) -> int | None:
    """The version that a subscriber gets within so many seconds."""
    subscriber = WeightSubscriber(end, LAYOUT, 3)
    try:
        return await_version(subscriber, publisher, seconds)
    finally:
        subscriber.close()


def await_version(subscriber: WeightSubscriber, publisher: WeightPublisher | None, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if publisher is not None:
            publisher.serve_late_joiners()
        if (found := subscriber.newest(UPDATES)) is not None:
            return found.policy_version
        time.sleep(0.01)
    return None


# ---- the directory


def test_the_directory_is_for_its_owner_alone_and_goes_with_him(base: Path) -> None:
    first, second = SocketDirectory(), SocketDirectory()
    assert first.path.stat().st_mode & 0o777 == 0o700
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(first.endpoint.removeprefix("ipc://"))
    assert len(list(base.iterdir())) == 2
    first.close()
    first.close()
    del second  # forgotten
    assert list(base.iterdir()) == []


LEAVES = """
import os, signal, socket, sys, time
from dsrl_async.run.channel import SocketDirectory
directory = SocketDirectory()
socket.socket(socket.AF_UNIX).bind(directory.endpoint.removeprefix("ipc://"))
print(directory.path, flush=True)
{}
"""


def leave(how: str, base: Path) -> subprocess.Popen[str]:
    """A process that has a directory and then does as it is told; its first line is out."""
    process = subprocess.Popen(
        [sys.executable, "-c", LEAVES.format(how)],
        env={**os.environ, "TMPDIR": str(base)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert Path(process.stdout.readline().strip()).parent == base
    return process


def test_the_directory_goes_with_an_error_but_not_with_a_process_that_was_forked(base: Path) -> None:
    process = leave("if os.fork() == 0: sys.exit()\nos.wait(); print(os.path.exists(directory.path)); 1 / 0", base)
    assert process.communicate(timeout=60)[0] == "True\n"
    assert process.returncode == 1
    assert list(base.iterdir()) == []


def test_what_a_killed_process_left_is_swept_by_the_next_start_and_what_a_living_one_has_is_not(base: Path) -> None:
    frozen, killed = leave("time.sleep(60)", base), leave("os.kill(os.getpid(), signal.SIGKILL)", base)
    assert killed.wait(60) == -signal.SIGKILL
    frozen.send_signal(signal.SIGSTOP)
    assert len(list(base.iterdir())) == 2
    SocketDirectory().close()
    assert len(list(base.iterdir())) == 1
    frozen.kill()
    frozen.wait(60)
    SocketDirectory().close()
    assert list(base.iterdir()) == []


def test_nothing_else_is_swept(base: Path) -> None:
    name = channel.PREFIX
    (base / f"{name}file").touch()
    (base / f"{name}link").symlink_to(base)
    for label, mode in (("results", 0o700), ("open", 0o755), ("mine", 0o700)):
        (base / f"{name}{label}").mkdir(mode=mode)
    (base / f"{name}results" / "weights").write_text("a file of that name")
    (base / f"{name}mine" / "notes").touch()
    (base / "dsrl_async").mkdir(mode=0o700)
    before = sorted(base.rglob("*"))
    sweep(base)
    assert sorted(base.rglob("*")) == before


@as_root
def test_what_belongs_to_others_is_not_swept(base: Path) -> None:
    (base / f"{channel.PREFIX}other").mkdir(mode=0o700)
    os.chown(base / f"{channel.PREFIX}other", NOBODY, NOBODY)
    sweep(base)
    assert len(list(base.iterdir())) == 1


def test_a_start_that_is_swept_before_it_has_its_lock_makes_another(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    make = tempfile.mkdtemp

    def swept(**where: Any) -> str:
        made.append(make(**where))
        if len(made) < 3:
            sweep(base)
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", swept)
    directory = SocketDirectory()
    assert str(directory.path) == made[2]
    assert directory.path.exists()
    directory.close()


@pytest.mark.parametrize("bytes_left", [0, 1, -1])
def test_a_socket_has_room_up_to_the_last_byte(base: Path, monkeypatch: pytest.MonkeyPatch, bytes_left: int) -> None:
    room = channel.LONGEST_PATH - len(f"/{channel.PREFIX}12345678/{channel.SOCKET}") - bytes_left
    long = base / ("x" * (room - len(str(base)) - 1))
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    directory = SocketDirectory()
    assert (directory.path.parent == long) == (bytes_left >= 0)
    end = make_ends(directory.endpoint)
    with publishing(end.publisher) as publisher:
        assert received(end.subscriber, publisher, 20) == 1
    directory.close()


def test_a_very_long_or_unusable_temporary_directory_is_passed_over(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base / ("ü" * 40)).mkdir()  # 80 bytes
    (base / "open").mkdir()
    (base / "open").chmod(0o777)
    for name in ("ü" * 40, "missing", "relative"):
        monkeypatch.setattr(tempfile, "tempdir", str(base / name) if name != "relative" else name)
        assert places()[0] == Path("/tmp")
    monkeypatch.setattr(tempfile, "tempdir", str(base / "open"))
    assert places()[0] == Path("/tmp")
    assert places()[-1] == base / "open"  # others may rename what lies there
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base / "runtime"))
    (base / "runtime").mkdir(mode=0o700)
    assert places()[0] == base
    assert places()[-1] == base / "runtime"


def test_no_place_and_no_curve_are_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "places", lambda: [Path("/proc"), Path("/sys")])
    with pytest.raises(ConfigError, match=r"no directory for the socket .* set TMPDIR to .* \(/proc: .*; /sys: "):
        preflight.check_channel()
    monkeypatch.setattr(channel, "LONGEST_PATH", 10)
    monkeypatch.undo()
    monkeypatch.setattr(channel, "LONGEST_PATH", 10)
    with pytest.raises(ConfigError, match="their names are too long"):
        preflight.check_channel()
    monkeypatch.setattr(zmq, "has", lambda what: what != "curve")
    with pytest.raises(ConfigError, match="pyzmq was built without CURVE"):
        preflight.check_channel()


# ---- the keys


def test_keys_are_new_for_every_run_and_a_child_reads_its_own() -> None:
    ends, others = make_ends("ipc:///tmp/x"), make_ends("ipc:///tmp/x")
    keys = {key for end in (*ends, *others) for key in end[1:]}
    assert len(keys) == 8
    fd = write_secret(ends.publisher)
    assert os.fstat(fd).st_mode & 0o777 == 0o600
    code = "import sys; from dsrl_async.run.channel import read_secret; print(read_secret(int(sys.argv[1])).secret)"
    child = subprocess.run([sys.executable, "-c", code, str(fd)], pass_fds=[fd], capture_output=True, text=True)
    assert child.stdout.strip() == ends.publisher.secret
    assert read_secret(fd) == ends.publisher
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# ---- strangers

BARRED = {
    "connect": "PermissionError",
    "flood": 0,
    "read without keys": False,
    "read": False,
    "list": "PermissionError",
    "take name": "PermissionError",
    "take directory": "PermissionError",
}


@contextlib.contextmanager
def learner(end: Channel) -> Iterator[subprocess.Popen[str]]:
    """A process that publishes, and can be killed like a learner."""
    code = (
        "import os, sys, time, numpy as np\n"
        "from dsrl_async.run.channel import read_secret\n"
        "from dsrl_async.run.weights import WeightPublisher, encode\n"
        "publisher = WeightPublisher(read_secret(int(sys.argv[1])))\n"
        f"publisher.publish(encode(int(sys.argv[2]), {LAYOUT}, np.ones(3, np.float32)))\n"
        "print('bound', flush=True)\n"
        "while True:\n"
        "    publisher.serve_late_joiners()\n"
        "    time.sleep(0.01)\n"
    )
    fd = write_secret(end)
    arguments = [sys.executable, "-c", code, str(fd), "5"]
    process = subprocess.Popen(arguments, pass_fds=[fd], stdout=subprocess.PIPE, text=True)
    os.close(fd)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "bound\n"
        yield process
    finally:
        process.kill()
        process.wait()


@as_root
def test_another_user_can_neither_read_nor_write_nor_flood_nor_take_the_name(ends: Ends) -> None:
    with learner(ends.publisher) as process:
        # Even one who has stolen the keys; and of the processes he learns nothing.
        found = stranger.run(NOBODY, ends.publisher.endpoint, ends.subscriber, [process.pid, os.getpid()])
        assert found == {**BARRED, "read processes": ["PermissionError"] * 2}
        assert received(ends.subscriber, None, 20) == 5
        process.kill()
        process.wait()
        assert stranger.run(NOBODY, ends.publisher.endpoint, ends.subscriber) == {**BARRED, "read processes": []}
    with publishing(ends.publisher, 6) as successor:
        assert received(ends.subscriber, successor, 20) == 6


@as_root
def test_without_its_directory_another_user_comes_near_but_the_keys_still_keep_him_out(ends: Ends) -> None:
    """Each guard is shown by taking the other ones away."""
    path = Path(ends.publisher.endpoint.removeprefix("ipc://"))
    own = make_ends(ends.publisher.endpoint)
    with learner(ends.publisher):
        os.chmod(path.parent, 0o777)
        os.chmod(path, 0o777)
        found = stranger.run(NOBODY, ends.publisher.endpoint, own.subscriber)
        assert found["connect"] == "done"
        assert found["flood"] == stranger.FLOOD
        assert not found["read without keys"]
        assert not found["read"]
        assert found["take name"] == "done"
        assert found["take directory"] == "PermissionError"
    with pytest.raises(OSError, match="others may enter it"):
        WeightPublisher(ends.publisher)


@pytest.mark.parametrize("known", ["nothing", "the public keys", "everything"])
def test_a_process_of_the_same_user_needs_the_subscribers_secret_key(ends: Ends, known: str) -> None:
    own = make_ends(ends.publisher.endpoint).subscriber
    if known == "the public keys":
        own = own._replace(server=ends.subscriber.server)
    with publishing(ends.publisher) as publisher:
        end = ends.subscriber if known == "everything" else own
        assert received(end, publisher, 20 if known == "everything" else 1) == (1 if known == "everything" else None)


def test_without_the_authenticator_the_public_key_of_the_publisher_would_do(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets.OnlyKey, "callback", lambda self, domain, key: True)
    own = make_ends(ends.publisher.endpoint).subscriber._replace(server=ends.subscriber.server)
    with publishing(ends.publisher) as publisher:
        assert received(own, publisher, 20) == 1


def impostor_with_other_keys(end: Channel) -> None:
    with publishing(make_ends(end.endpoint).publisher):
        time.sleep(0.5)


def impostor_without_keys(end: Channel) -> None:
    with zmq.Context() as context, context.socket(zmq.XPUB) as plain:
        plain.linger = 0
        plain.bind(end.endpoint)
        for _ in range(25):
            plain.send(encode(1, LAYOUT, np.ones(3, np.float32)))
            time.sleep(0.02)


def impostor_that_chatters(end: Channel) -> None:
    path = end.endpoint.removeprefix("ipc://")
    Path(path).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with listener.accept()[0] as stream:
            stream.send(os.urandom(500))


def owner_of_the_keys_with_large_frames(end: Channel) -> None:
    with contextlib.closing(hold(end, zmq.PUB)) as publisher:
        for _ in range(25):
            publisher.send(bytes(100_000))
            time.sleep(0.02)


IMPOSTORS = [
    impostor_with_other_keys,
    impostor_without_keys,
    impostor_that_chatters,
    owner_of_the_keys_with_large_frames,
]


@pytest.mark.parametrize("impostor", IMPOSTORS)
def test_a_subscriber_listens_to_no_impostor_and_goes_back_to_its_publisher(
    ends: Ends, impostor: Callable[[Channel], None]
) -> None:
    subscriber = WeightSubscriber(ends.subscriber, LAYOUT, 3)
    impostor(ends.publisher)
    assert await_version(subscriber, None, 0.3) is None
    Path(ends.publisher.endpoint.removeprefix("ipc://")).unlink(missing_ok=True)
    with publishing(ends.publisher, 2) as publisher:
        assert await_version(subscriber, publisher, 20) == 2
    subscriber.close()


# ---- those who hold the keys and misuse them


@pytest.mark.parametrize("topics", [[b"a"], [b"%d" % number for number in range(3000)], [b"x" * 100_000]])
def test_one_that_subscribes_to_something_else_is_disconnected(
    ends: Ends, caplog: pytest.LogCaptureFixture, topics: list[bytes]
) -> None:
    with publishing(ends.publisher) as publisher:
        friend = WeightSubscriber(ends.subscriber, LAYOUT, 3)
        assert await_version(friend, publisher, 20) == 1
        flooding = hold(ends.subscriber, zmq.SUB)
        disconnected = flooding.get_monitor_socket(zmq.Event.DISCONNECTED)
        for topic in topics:
            flooding.setsockopt(zmq.SUBSCRIBE, topic)
        for _ in range(30):
            publisher.serve_late_joiners()
            time.sleep(0.01)
        assert disconnected.poll(0)
        flooding.disable_monitor()
        disconnected.close()
        flooding.close()
        assert caplog.text.count("asks for something else") == (len(topics[0]) < weights.LONGEST_REQUEST)
        publisher.publish(encode(2, LAYOUT, np.ones(3, np.float32)))
        while await_version(friend, publisher, 20) == 1:
            pass
        assert friend._version == 2
        friend.close()


SENDS_LARGE = """
import sys, time
from support.stranger import hold
from dsrl_async.run.channel import read_secret
import zmq
publisher = hold(read_secret(int(sys.argv[1])), zmq.PUB)
frame = bytes(100 << 20)
print("ready", flush=True)
while True:
    publisher.send(frame, copy=False)
    time.sleep(0.2)
"""


def test_a_frame_that_is_too_large_is_not_even_buffered(ends: Ends) -> None:
    fd = write_secret(ends.publisher)
    sender = subprocess.Popen(
        [sys.executable, "-c", SENDS_LARGE, str(fd)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        pass_fds=[fd],
        stdout=subprocess.PIPE,
        text=True,
    )
    os.close(fd)
    subscriber = WeightSubscriber(ends.subscriber, LAYOUT, 3)
    assert sender.stdout is not None
    assert sender.stdout.readline() == "ready\n"
    process = psutil.Process()
    before, most = process.memory_info().rss, 0
    for _ in range(100):
        assert subscriber.newest(UPDATES) is None
        most = max(most, process.memory_info().rss)
        time.sleep(0.01)
    sender.kill()
    sender.wait()
    subscriber.close()
    assert most - before < 20 << 20


def test_idle_and_chattering_connections_keep_nobody_out(ends: Ends) -> None:
    path = ends.publisher.endpoint.removeprefix("ipc://")
    with publishing(ends.publisher) as publisher, contextlib.ExitStack() as stack:
        for number in range(300):
            stream = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            stream.connect(path)
            if number % 2:
                with contextlib.suppress(OSError):
                    stream.send(os.urandom(1000))
        assert received(ends.subscriber, publisher, 20) == 1


# ---- a successor


def test_a_successor_binds_at_once_and_is_found(ends: Ends) -> None:
    with learner(ends.publisher) as process:
        subscriber = WeightSubscriber(ends.subscriber, LAYOUT, 3)
        assert await_version(subscriber, None, 20) == 5
        process.kill()
        process.wait()
        begin = time.monotonic()
        with publishing(ends.publisher, 6) as successor:
            assert time.monotonic() - begin < 2
            assert await_version(subscriber, successor, 20) == 6
        subscriber.close()


def test_a_directory_that_was_cleaned_away_is_made_again_for_a_successor(ends: Ends) -> None:
    path = Path(ends.publisher.endpoint.removeprefix("ipc://"))
    with publishing(ends.publisher):
        pass
    shutil.rmtree(path.parent)
    with publishing(ends.publisher, 6) as successor:
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert received(ends.subscriber, successor, 20) == 6


def link_to(path: Path) -> None:
    (path.parent / "elsewhere").mkdir(mode=0o700)
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("take", [link_to, Path.touch, lambda path: path.mkdir(mode=0o755)])
def test_a_directory_whose_name_is_taken_is_not_used(ends: Ends, take: Callable[[Path], object]) -> None:
    path = Path(ends.publisher.endpoint.removeprefix("ipc://")).parent
    path.rmdir()
    take(path)
    with pytest.raises(OSError, match=str(path)):
        WeightPublisher(ends.publisher)


def test_a_publisher_that_cannot_bind_ends_with_the_error(ends: Ends) -> None:
    Path(ends.publisher.endpoint.removeprefix("ipc://")).mkdir()
    with pytest.raises(zmq.ZMQError, match="Address already in use"):
        WeightPublisher(ends.publisher)
