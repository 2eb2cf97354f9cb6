"""What the placer uses of Ray, in one process: hosts live in this process, and calls are made when they are asked for.

A job may say what is to go wrong: `"unavailable": 2`, the first two calls cannot reach the host; `"dies": WHY`, Ray
says that it has ended; `"pending": true`, there is no room for it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class ActorUnavailableError(Exception):
    pass


class ActorDiedError(Exception):
    pass


exceptions = SimpleNamespace(ActorUnavailableError=ActorUnavailableError, ActorDiedError=ActorDiedError)
util = SimpleNamespace(get_node_ip_address=lambda: "10.0.0.2")
FREE: dict[str, float] = {"CPU": 1.0}


class Call:
    """What Ray has an ObjectRef for."""

    def __init__(self, handle: Handle, name: str, arguments: tuple[Any, ...]) -> None:
        self.handle, self.name, self.arguments = handle, name, arguments

    def make(self) -> Any:
        trouble = self.handle.trouble
        if trouble.get("unavailable", 0) > 0:
            trouble["unavailable"] -= 1
            raise ActorUnavailableError("The actor is temporarily unavailable")
        if self.handle.killed or (trouble.get("dies") and self.name == "watch"):
            raise ActorDiedError(f"{trouble.get('dies')}. Possible reasons: high memory usage. Node Id: 00ff")
        return getattr(self.handle.instance, self.name)(*self.arguments)


class Handle:
    def __init__(self, instance: Any) -> None:
        self.instance, self.killed = instance, False
        self.trouble: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Call:
            if name == "start":
                self.trouble = self.trouble or dict(arguments[1])
            elif name == "end":
                self.instance.end()
            return Call(self, name, arguments)

        return SimpleNamespace(remote=remote)


def remote(**options: Any) -> Callable[[type], Any]:
    assert options["max_restarts"] == options["max_task_retries"] == 0
    return lambda kind: SimpleNamespace(remote=lambda: Handle(kind()))


def get(call: Call, timeout: float | None = None) -> Any:
    return call.make()


def wait(calls: list[Call], num_returns: int, timeout: float) -> tuple[list[Call], list[Call]]:
    ready = [call for call in calls if not call.handle.trouble.get("pending")]
    return ready, [call for call in calls if call not in ready]


def kill(handle: Handle) -> None:
    handle.killed = True
    popen = handle.instance._popen
    if popen is not None:
        popen.kill()
        popen.wait()


def get_gpu_ids() -> list[int]:
    return [1]


def nodes() -> list[dict[str, Any]]:
    return [{"Alive": True}, {"Alive": False}]


def available_resources() -> dict[str, float]:
    return FREE


def cluster_resources() -> dict[str, float]:
    return {"CPU": 1.0}


def main(argument: str) -> None:
    """A placer with this instead of Ray; `DSRL_TEST_NO_CLUSTER` names a file that keeps it from having one."""
    import json
    import socket

    from dsrl_async.groups import placing
    from dsrl_async.groups.placer import Placer
    from dsrl_async.host import processes

    job = processes.begin_child(argument, "placer")
    if (no_cluster := Path(os.environ["DSRL_TEST_NO_CLUSTER"])).is_file():
        if no_cluster.read_text():  # it lets the placer wait
            time.sleep(60)
        print(f"no Ray cluster at {job['address']}")
        sys.exit(1)
    sys.modules["ray"] = sys.modules[__name__]
    placing.MEMBER = "support.sleeping_member"
    Placer(sys.modules[__name__], socket.socket(fileno=job["link_fd"]), json.loads(json.dumps(job["resources"]))).run()


if __name__ == "__main__":
    main(sys.argv[1])
