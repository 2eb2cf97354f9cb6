"""What another process tries against a run's channel: it can see its path, and may even have stolen its keys.

    python -m support.stranger '{"uid": 12345 or null, "endpoint": ..., "keys": [...] or null, "pids": [...]}'

prints a line of JSON: what it tried -> what came of it. All modules are imported before it becomes another user, since
Python may lie where that one may not read.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zmq

from dsrl_async.run.channel import Channel

FLOOD = 200
WAIT_MS = 700


def attempt(action: Callable[[], object]) -> str:
    """`done`, or the name of the error."""
    try:
        action()
    except OSError as error:
        return type(error).__name__
    return "done"


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.connect(str(path))


def reads(channel: Channel | None, endpoint: str) -> bool:
    """Whether anything comes, with the keys of a channel or without any."""
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.linger = 0
        if channel is not None:
            subscriber.setsockopt_string(zmq.CURVE_SERVERKEY, channel.server)
            subscriber.setsockopt_string(zmq.CURVE_PUBLICKEY, channel.client)
            subscriber.setsockopt_string(zmq.CURVE_SECRETKEY, channel.secret)
        subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        subscriber.connect(endpoint)
        return bool(subscriber.poll(WAIT_MS))


def take_name(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        path.unlink(missing_ok=True)
        stream.bind(str(path))


def take_directory(path: Path) -> None:
    path.rename(path.with_name("taken"))
    path.mkdir()


def read_process(pid: int) -> None:
    """Read what a process holds open, or was told by its environment."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with fd.open("rb") as file:
            file.read(1)
    Path(f"/proc/{pid}/environ").read_bytes()


def hold(end: Channel, kind: int) -> zmq.Socket[bytes]:
    """A socket of the kind with the keys of an end, without any of the limits that ours have."""
    held: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    held.linger = 0
    held.setsockopt_string(zmq.CURVE_SECRETKEY, end.secret)
    if kind == zmq.SUB:
        held.setsockopt_string(zmq.CURVE_SERVERKEY, end.server)
        held.setsockopt_string(zmq.CURVE_PUBLICKEY, end.client)
        held.connect(end.endpoint)
    else:
        held.setsockopt(zmq.CURVE_SERVER, 1)
        held.bind(end.endpoint)
    return held


def try_everything(endpoint: str, channel: Channel | None, pids: Sequence[int]) -> dict[str, Any]:
    path = Path(endpoint.removeprefix("ipc://"))
    return {
        "connect": attempt(lambda: connect(path)),
        "flood": sum(attempt(lambda: connect(path)) == "done" for _ in range(FLOOD)),
        "read without keys": reads(None, endpoint),
        "read": reads(channel, endpoint),
        "list": attempt(lambda: list(path.parent.iterdir())),
        "read processes": [attempt(lambda pid=pid: read_process(pid)) for pid in pids],  # type: ignore[misc]
        "take name": attempt(lambda: take_name(path)),
        "take directory": attempt(lambda: take_directory(path.parent)),
    }


def run(uid: int | None, endpoint: str, channel: Channel | None, pids: Sequence[int] = ()) -> dict[str, Any]:
    """What a stranger achieves, in a process of its own."""
    job = json.dumps({"uid": uid, "endpoint": endpoint, "keys": channel, "pids": list(pids)})
    done = subprocess.run(
        [sys.executable, "-m", "support.stranger", job],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    keys = None if job["keys"] is None else Channel(*job["keys"])
    if job["uid"] is not None:
        os.setgroups([])
        os.setgid(job["uid"])
        os.setuid(job["uid"])
    print(json.dumps(try_everything(job["endpoint"], keys, job["pids"])))
