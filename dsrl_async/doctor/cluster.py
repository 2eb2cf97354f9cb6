"""What the machines of a Ray cluster have that groups need.

`look_at_cluster` runs in a process of its own, as all does that imports Ray, and `look_here` on each machine, where it
asks that machine's own doctor.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from dsrl_async import __version__
from dsrl_async.groups.placer import connect, first_sentence

CONNECT_S = 5.0
NONCE_BYTES = 16


def look_at_cluster(question: Mapping[str, Any]) -> dict[str, Any]:
    """Ask each machine of the cluster at `ray` that could have a group, which needs `gpus` and `cpus`.

    `address` and `ports` are those by which groups reach this machine (port 0: a free one), and `config` is a group's
    configuration in YAML. `machines` of the answer has one entry for each, from `look_here`, or an `error`.
    """
    nonce = secrets.token_hex(NONCE_BYTES // 2)
    with listening(question["address"], question["ports"], nonce.encode()) as ports:
        ray = connect(question["ray"])
        nodes = [node for node in ray.nodes() if node["Alive"]]
        able = {node["NodeID"]: node for node in nodes if rooms(node["Resources"], question)}
        place = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        remote = ray.remote(max_retries=0, num_cpus=0)(look_here)
        asked = {
            remote.options(scheduling_strategy=place(name, soft=False)).remote(
                {**question, "ports": ports, "nonce": nonce}
            ): node
            for name, node in able.items()
        }
        ready, _ = (
            ray.wait(list(asked), num_returns=len(asked), timeout=question["time_limit_s"]) if asked else ([], [])
        )
        machines = []
        for answer, node in asked.items():
            found = {"error": f"no answer within {question['time_limit_s']:g} s"}
            if answer in ready:
                try:
                    found = ray.get(answer)
                except Exception as error:
                    found = {"error": first_sentence(error)}
            machines.append({"where": node["NodeManagerAddress"], **found})
        return {
            "ray": ray.__version__,
            "nodes": len(nodes),
            "rooms": sum(rooms(node["Resources"], question) for node in able.values()),
            "machines": machines,
        }


def rooms(resources: Mapping[str, float], need: Mapping[str, Any]) -> int:
    """For how many groups a machine has room."""
    limits = [resources.get(name, 0) // need[of] for name, of in (("GPU", "gpus"), ("CPU", "cpus")) if need[of]]
    return int(min(limits))


@contextlib.contextmanager
def listening(address: str, ports: list[int], nonce: bytes) -> Iterator[list[int]]:
    """Say `nonce` to whoever connects to `ports` of this machine, which are yielded."""
    with contextlib.ExitStack() as stack:
        found = []
        for port in ports:
            try:
                listener = stack.enter_context(socket.create_server(("", port)))
            except OSError as error:
                raise ValueError(f"group.ports: {port} cannot be used on this machine ({error.strerror})") from error
            found.append(listener.getsockname()[1])
            threading.Thread(target=_say, args=(listener, nonce), daemon=True).start()
        yield found


def _say(listener: socket.socket, nonce: bytes) -> None:
    with contextlib.suppress(OSError):
        while True:
            with contextlib.suppress(ConnectionError), listener.accept()[0] as connection:
                connection.sendall(nonce)


def look_here(question: Mapping[str, Any]) -> dict[str, Any]:
    """What this machine has: versions, which ports of the learner's it cannot reach, what its own doctor finds."""
    unreached = []
    for port in question["ports"]:
        try:
            with socket.create_connection((question["address"], port), CONNECT_S) as connection:
                connection.settimeout(CONNECT_S)
                if connection.recv(NONCE_BYTES, socket.MSG_WAITALL).decode() != question["nonce"]:
                    unreached.append(f"{port} (somebody else answers there)")
        except OSError as error:
            unreached.append(f"{port} ({error.strerror or error})")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(question["config"])
        file.flush()
        command = [sys.executable, "-m", "dsrl_async.doctor", "--json", "--config", file.name]
        # Ray hides the GPUs from those who have not asked for any.
        variables = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        done = subprocess.run(command, capture_output=True, text=True, env=variables, stdin=subprocess.DEVNULL)
    try:
        findings = json.loads(done.stdout.splitlines()[-1])["findings"]
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        findings = [{"check": "doctor", "status": "problem", "message": f"it failed there: {said[-1]}"}]
    return {
        "version": __version__,
        "python": platform.python_version(),
        "token": os.environ.get("RAY_AUTH_MODE", "").lower() == "token",
        "unreached": unreached,
        "findings": findings,
    }
