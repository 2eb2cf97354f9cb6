"""What the doctor says of a Ray cluster, and how a machine of it is looked at; Ray itself is a fake one."""

from __future__ import annotations

import json
import socket
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from dsrl_async import __version__
from dsrl_async.config.load import validate
from dsrl_async.doctor import checks, cluster
from dsrl_async.doctor.checks import Finding, Options
from dsrl_async.groups import ray_placement

MACHINE = {"where": "10.0.0.2", "version": __version__, "python": "3.11.7", "token": True, "unreached": []}
QUESTION = {"address": "127.0.0.1", "gpus": 1, "cpus": 1, "ray": "auto", "time_limit_s": 5.0, "config": "actors: 2\n"}


def check(monkeypatch: pytest.MonkeyPatch, rooms: int, *machines: dict[str, Any]) -> list[Finding]:
    answer = {"ray": "2.60.0", "nodes": 3, "rooms": rooms, "machines": list(machines)}
    monkeypatch.setattr(ray_placement, "version", lambda name: "2.60.0")
    monkeypatch.setattr(checks, "ask", lambda *_, **__: answer)
    return list(checks.check_cluster(validate({"ray": "127.0.0.1:6379", "groups": 2, "actors": 2}), Options()))


def test_what_is_wrong_with_machines_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    fine, gone = {**MACHINE, "findings": []}, {"where": "10.0.0.9", "error": "No module named 'dsrl_async'"}
    graphics = {"check": "graphics", "status": "problem", "message": "MUJOCO_GL=egl cannot render"}
    known = {"check": "cpus", "status": "ok", "message": "2 may be used"}
    bad = {**MACHINE, "version": "0.0.1", "token": False, "unreached": ["7001 (timed out)"]}
    found = check(monkeypatch, 1, {**fine, "findings": [known]}, gone, {**bad, "findings": [graphics, known]})
    assert [(finding.status, finding.message) for finding in found] == [
        (
            "warning",
            "Ray 2.60.0, 3 machines: room for 1 group of 1 GPU and 1 CPU; 1 group will wait until a machine joins",
        ),
        ("ok", "node 10.0.0.2: Python 3.11.7, and all that a group needs"),
        ("problem", "node 10.0.0.9: dsrl_async cannot be used there: No module named 'dsrl_async'"),
        ("problem", f"node 10.0.0.2: dsrl_async 0.0.1 is there, and {__version__} here; install the same"),
        (
            "problem",
            "node 10.0.0.2: it does not reach 127.0.0.1, port 7001 (timed out); set group.address to an address of "
            "this machine that it reaches, and open group.ports in the firewall",
        ),
        ("problem", "node 10.0.0.2: graphics: MUJOCO_GL=egl cannot render"),
        (
            "warning",
            "this cluster has no token: whoever reaches it runs programs on it in your name; set RAY_AUTH_MODE=token "
            "on every machine before `ray start` (docs/cluster.md)",
        ),
    ]
    assert [finding.status for finding in check(monkeypatch, 2, fine)] == ["ok", "ok"]
    assert check(monkeypatch, 0)[0].status == "problem"


def test_without_a_cluster_in_the_configuration_nothing_is_asked() -> None:
    assert list(checks.check_cluster(validate({}), Options())) == []


def test_a_machine_says_which_ports_it_does_not_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def doctor(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command)
        with open(command[-1]) as file:
            assert file.read() == "actors: 2\n"
        return SimpleNamespace(stdout='{"findings": []}\n', stderr="", returncode=0)

    monkeypatch.setattr(subprocess, "run", doctor)
    with socket.create_server(("127.0.0.1", 0)) as stranger, cluster.listening("", [0], b"0123456789abcdef") as ports:
        other = stranger.getsockname()[1]
        closed = socket.create_server(("127.0.0.1", 0))
        free = closed.getsockname()[1]
        closed.close()
        monkeypatch.setattr(cluster, "CONNECT_S", 0.2)
        found = cluster.look_here({**QUESTION, "ports": [*ports, other, free], "nonce": "0123456789abcdef"})
        assert found["unreached"] == [f"{other} (timed out)", f"{free} (Connection refused)"]
        with pytest.raises(ValueError, match=rf"group\.ports: {other} cannot be used on this machine"):
            cluster.listening("", [other], b"").__enter__()
    assert asked[0][1:4] == ["-m", "dsrl_async.doctor", "--json"]

    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="", stderr="no torch\n", returncode=1)
    )
    (finding,) = cluster.look_here({**QUESTION, "ports": [], "nonce": ""})["findings"]
    assert finding["message"] == "it failed there: no torch"


def test_every_machine_with_room_for_a_group_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    resources = ({"CPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 3.0, "GPU": 8.0}, {"CPU": 8.0, "GPU": 1.0})
    nodes = [
        {"Alive": number < 3, "NodeID": str(number), "NodeManagerAddress": f"10.0.0.{number}", "Resources": had}
        for number, had in enumerate(resources)
    ]
    asked: list[dict[str, Any]] = []

    def answer(question: dict[str, Any]) -> str:
        asked.append(question)
        return f"answer {len(asked)}"

    def remote(**_: Any) -> Any:
        call = SimpleNamespace(remote=answer)
        return lambda function: SimpleNamespace(options=lambda scheduling_strategy: call)

    def get(answer: str) -> dict[str, Any]:
        if answer == "answer 1":
            return {"findings": []}
        raise RuntimeError("no such module\nas that")

    affinity = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda name, soft: name)
    ray = SimpleNamespace(
        __version__="2.60.0", nodes=lambda: nodes, remote=remote, get=get, wait=lambda asked, **_: (asked, [])
    )
    ray.util = SimpleNamespace(scheduling_strategies=affinity)
    monkeypatch.setattr(cluster, "connect", lambda address: ray)
    assert cluster.rooms({"CPU": 3.0}, {"gpus": 0, "cpus": 1}) == 3
    found = json.loads(json.dumps(cluster.look_at_cluster({**QUESTION, "ports": [0, 0]})))
    assert len(set(asked[0]["ports"])) == 2
    assert found == {
        "ray": "2.60.0",
        "nodes": 3,
        "rooms": 7,
        "machines": [
            {"where": "10.0.0.1", "findings": []},
            {"where": "10.0.0.2", "error": "RuntimeError: no such module as that"},
        ],
    }
