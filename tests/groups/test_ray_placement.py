"""Ray's placement with its placer, whose Ray is a fake one: what they say, and what a failure makes of it."""

from __future__ import annotations

import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from support import fake_ray

from dsrl_async import __version__
from dsrl_async.config.settings import ConfigError
from dsrl_async.groups import placer, placing, ray_host, ray_placement
from dsrl_async.groups.placing import Ended, Event, Placed
from dsrl_async.groups.ray_placement import RayPlacement, own_address, plain
from dsrl_async.host import processes


class Cluster:
    """A placement, and all that it has said."""

    def __init__(self, run_dir: Path, wait_s: float, address: str = "10.0.0.1:6379") -> None:
        self.run_dir = run_dir
        self.placement = RayPlacement(address, run_dir / "logs", 0, 1, wait_s)
        self.events: list[Event] = []

    def start(self, group: int, incarnation: int = 1, **job: Any) -> None:
        job |= {"group": group, "run_dir": str(self.run_dir / "groups" / str(group))}
        self.placement.start(group, incarnation, job)

    def until(self, happened: Callable[[], Any], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, (self.events, self.placement.waits())
            self.events += self.placement.poll()
            time.sleep(0.02)

    def said(self, kind: type, group: int) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind) and event.group == group]

    def log(self, group: int) -> str:
        path = self.run_dir / "groups" / str(group) / placing.LOG
        return path.read_text() if path.is_file() else ""

    @property
    def placer(self) -> psutil.Process:
        assert self.placement._popen is not None
        return psutil.Process(self.placement._popen.pid)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(ray_placement, "PLACER", "support.fake_ray")
    monkeypatch.setattr(ray_placement, "AGAIN_S", 0.1)
    monkeypatch.setenv("DSRL_TEST_NO_CLUSTER", str(tmp_path / "no-cluster"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "logs").mkdir()
    cluster = Cluster(tmp_path, wait_s=1.0)
    yield cluster
    cluster.placement.close()


def test_groups_are_placed_watched_and_ended(cluster: Cluster) -> None:
    cluster.start(0)
    cluster.start(1, seconds=0.5, code=processes.FATAL)
    cluster.start(2, unavailable=2, answers=2)
    cluster.placement.tell(2, "early")
    cluster.start(3, dies="The actor is dead because its node has died")
    cluster.start(5, dies="The actor is dead because its worker process has died")
    cluster.start(4, pending=True)
    assert "10.0.0.1:6379" in cluster.placement.waits()[4]
    cluster.until(
        lambda: (
            cluster.said(Ended, 1)
            and cluster.said(Ended, 3)
            and cluster.said(Ended, 5)
            and cluster.said(Placed, 2)
            and cluster.log(2)
        )
    )
    assert cluster.said(Placed, 0) == [Placed(0, 1, "node 10.0.0.2, GPU 1")]
    assert cluster.said(Ended, 1) == [Ended(1, 1, "exit code 3: the policy cannot be read", True)]
    assert cluster.said(Ended, 3) == [Ended(3, 1, "its host has ended, because its machine is gone", False)]
    assert cluster.said(Ended, 5)[0].how == "its host has ended, because Ray's process for it is gone"
    assert cluster.said(Ended, 2) == []  # who cannot be reached for a while has not ended
    cluster.until(lambda: cluster.placement.waits() == {4: "Ray to start it"})
    assert cluster.log(1) == "group 1 has begun\nthe policy cannot be read\n"

    cluster.placement.tell(2, "late")
    heard = cluster.run_dir / "groups" / "2" / "heard.jsonl"
    cluster.until(heard.is_file)
    assert heard.read_text() == "early\nlate\n"

    cluster.placement.end(0)
    cluster.placement.end(4)
    cluster.until(lambda: cluster.said(Ended, 0) and cluster.said(Ended, 4))
    members = [process for process in cluster.placer.children() if "sleeping_member" in " ".join(process.cmdline())]
    assert len(members) == 3  # of groups 2, 3 and 5: the fake Ray has not ended what it says is dead

    cluster.placement.close()
    assert psutil.wait_procs(members, 5)[1] == []
    cluster.placement.poll()
    assert cluster.placement._popen is None  # none is started any more


def test_what_a_placer_had_ends_with_it_and_the_next_one_takes_over(cluster: Cluster) -> None:
    cluster.start(0)
    cluster.until(lambda: cluster.log(0))
    (member,) = cluster.placer.children()
    cluster.placer.send_signal(signal.SIGKILL)
    cluster.until(lambda: cluster.said(Ended, 0))
    (ended,) = cluster.said(Ended, 0)
    assert ended == Ended(0, 1, "the placer, which talks to Ray, ended (killed by SIGKILL)", False)
    psutil.wait_procs([member], 5)
    assert not member.is_running()

    cluster.start(0, 2)
    cluster.until(lambda: len(cluster.said(Placed, 0)) == 2)
    assert cluster.said(Placed, 0)[1].incarnation == 2
    # The new host has swept what the dead one left.
    assert len(list(cluster.run_dir.glob(f"{ray_host.PREFIX}*"))) == 1

    # The cluster is lost: the run is told, waits, and ends with a sentence.
    (cluster.run_dir / "no-cluster").touch()
    cluster.placer.send_signal(signal.SIGKILL)
    cluster.until(lambda: len(cluster.said(Ended, 0)) == 2)
    cluster.start(0, 3)
    cluster.until(lambda: len(cluster.said(Ended, 0)) == 3)
    assert cluster.said(Ended, 0)[2] == Ended(
        0, 3, "no Ray cluster for 1 s (group.wait_s): no Ray cluster at 10.0.0.1:6379", True
    )


def test_a_lost_cluster_that_does_not_answer_is_not_waited_for_longer(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_placement, "TRY_S", 1.0)
    cluster.start(0)
    cluster.until(lambda: cluster.said(Placed, 0))
    (cluster.run_dir / "no-cluster").write_text("does not answer")
    cluster.placer.kill()
    cluster.until(lambda: cluster.said(Ended, 0))
    cluster.start(0, 2)
    cluster.until(lambda: len(cluster.said(Ended, 0)) == 2)
    assert cluster.said(Ended, 0)[1] == Ended(0, 2, "no Ray cluster for 1 s (group.wait_s): killed by SIGKILL", True)


def test_without_a_cluster_at_the_start_the_run_ends_with_a_sentence(cluster: Cluster) -> None:
    (cluster.run_dir / "no-cluster").touch()
    cluster.start(0)
    cluster.until(lambda: cluster.said(Ended, 0))
    assert cluster.said(Ended, 0) == [Ended(0, 1, "no Ray cluster at 10.0.0.1:6379", True)]


@pytest.mark.ray
@pytest.mark.skipif(find_spec("ray") is None, reason="the extra `ray` is not installed")
@pytest.mark.timeout(900)
def test_with_ray_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")  # not one that happens to be here
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("DSRL_TEST_OF", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "a name with which sockets have no room"))
    (tmp_path / "a name with which sockets have no room").mkdir()
    (tmp_path / "logs").mkdir()
    cluster = Cluster(tmp_path, 300.0, address="auto")
    asleep: dict[str, Any] = {"module": "support.sleeping_member", "child": True}
    cluster.start(0, **asleep)
    cluster.start(1, **asleep, seconds=1.0)
    cluster.until(lambda: cluster.log(0) and cluster.said(Ended, 1), 240.0)
    assert cluster.said(Ended, 1) == [Ended(1, 1, "exit code 1: the policy cannot be read", False)]
    started = [process for process in psutil.process_iter() if is_of(process, str(tmp_path))]
    cluster.placer.kill()
    cluster.until(lambda: cluster.said(Ended, 0), 240.0)
    cluster.start(0, 2, **asleep)
    cluster.until(lambda: len(cluster.said(Placed, 0)) == 2, 240.0)
    started += [process for process in psutil.process_iter() if is_of(process, str(tmp_path))]
    assert len(set(started)) > 2
    cluster.placement.close()
    assert psutil.wait_procs(started, 180)[1] == []  # Ray's own agents see the end of a cluster that was killed late
    assert list((tmp_path / "a name with which sockets have no room").glob(f"{ray_host.PREFIX}*")) == []


def is_of(process: psutil.Process, directory: str) -> bool:
    """Whether a process was started by the test of this directory."""
    try:
        return process.environ().get("DSRL_TEST_OF") == directory
    except psutil.Error:
        return False


def test_a_host_starts_a_group_once_and_refuses_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", fake_ray)
    monkeypatch.setattr(placing, "MEMBER", "support.sleeping_member")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setattr(ray_host.tempfile, "tempdir", str(tmp_path))
    host = ray_host.Host()
    with pytest.raises(ValueError, match=rf"10\.0\.0\.2 has dsrl_async {__version__}, and the launched run 0\.0\.1"):
        host.start("0.0.1", {})
    for _ in range(2):  # the answer to the first call was lost on its way
        assert host.start(__version__, {"group": 5}) == "node 10.0.0.2, GPU 1"
    assert len([child for child in psutil.Process().children() if "sleeping_member" in " ".join(child.cmdline())]) == 1
    look = host.watch({}, [])
    while look.ended is None:
        host.end()  # it is not heeded before the group has begun
        look = host.watch({}, [])
    host.leave()
    assert list(tmp_path.iterdir()) == []


def test_the_token_of_a_local_cluster_is_readable_by_its_user_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    placer.make_token()
    path = tmp_path / ".ray" / "auth_token"
    token = path.read_text()
    assert len(token) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    placer.make_token()
    assert path.read_text() == token  # another cluster of this user may run with it


def test_without_the_library_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for variable in placer.VARIABLES:
        monkeypatch.setenv(variable, "")
    with pytest.raises(ValueError, match=r"ray: the library cannot be imported .*pip install .*\[ray\]"):
        placer.connect("auto")
    monkeypatch.setattr(ray_placement, "version", lambda name: "2.58.1")
    with pytest.raises(ConfigError, match=r"version 2\.58\.1 is installed, and 2\.59 to 2\.61 are known to work"):
        ray_placement.check_library()


def test_a_cluster_that_does_not_let_us_in_is_told_from_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(address: str, **_: Any) -> None:
        raise ConnectionError(f"Failed to connect to {address}")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    for variable in placer.VARIABLES:
        monkeypatch.setenv(variable, "")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"no Ray cluster at {address}: .*not with this machine's token"):
            placer.connect(address)
    with pytest.raises(
        ValueError, match=f"no Ray cluster at {address}: ConnectionError: Failed to connect to {address}$"
    ):
        placer.connect(address)


def test_what_ray_writes_is_told_without_its_form() -> None:
    assert plain("[2026-11-30 16:47:09,271 E 1 2] rpc_client.h:204: Failed to connect. It may") == "Failed to connect"
    assert plain("no Ray cluster at 10.0.0.1:6379: a. b") == "no Ray cluster at 10.0.0.1:6379: a. b"


def test_the_address_that_groups_connect_to() -> None:
    assert own_address("auto", "learner.example") == "learner.example"
    assert own_address("127.0.0.1:6379", None) == "127.0.0.1"
    assert own_address("no.such.host.invalid:6379", None) == own_address("auto", None)
