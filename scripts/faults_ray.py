"""Do to groups under Ray what networks and machines do to them, and print a table of what came of it.

    python scripts/faults_ray.py [--only FAULT ...] [--sleeping]

Machines are network namespaces of this one, joined by a bridge: it needs root, `ip`, and the extra `ray`. The run has
environments that count what they show: after each fault its rows must be all there, in order, and each once
(tests/support/group_faults.py). With `--sleeping`, groups are processes that sleep, and no rows. Takes half an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from support.counting import COUNTS  # noqa: E402
from support.group_faults import SETTINGS, GroupRun  # noqa: E402

NETWORK = "10.77.0."
PORT = 6379
GROUPS = 2
DEAD_S = 60
"""After so long Ray takes a machine for dead that is cut off, and that machine then ends what Ray has started on it."""
RAY = Path(sys.executable).with_name("ray")
START_S = 240.0
"""How long `ray start` may take: 10 to 45 s where two cores are busy. Now and then it gives up, and is tried again."""


class Machine(NamedTuple):
    name: str
    number: int
    gpus: int
    cpus: int

    @property
    def namespace(self) -> str:
        return f"dsrl-{self.name}"

    @property
    def address(self) -> str:
        return f"{NETWORK}{self.number}"

    def pids(self) -> list[psutil.Process]:
        """The processes that see this machine's network."""
        said = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True).stdout
        found = []
        for pid in said.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def named(self, pattern: str) -> list[psutil.Process]:
        """The processes on this machine whose command line matches."""
        found = []
        for process in self.pids():
            with contextlib.suppress(psutil.Error):
                if re.search(pattern, " ".join(process.cmdline())) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def link(self, state: str) -> None:
        ip(f"link set dsrl-v{self.number} {state}")


HEAD, LEARNER = Machine("head", 1, 0, 1), Machine("learner", 2, 0, 0)
NODES = [Machine("a", 3, 1, 4), Machine("b", 4, 1, 4), Machine("c", 5, 1, 4)]
"""Those that have a GPU, as Ray is told; the last one joins late."""


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)


class Cluster:
    """The machines, with Ray on them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.token = directory / "token"
        self.token.touch(0o600)
        self.token.write_text(secrets.token_hex(32))
        ip("link add dsrl-br type bridge")
        ip("link set dsrl-br up")
        for machine in (HEAD, LEARNER, *NODES):
            ip(f"netns add {machine.namespace}")
            ip(f"link add dsrl-v{machine.number} type veth peer name eth0 netns {machine.namespace}")
            ip(f"link set dsrl-v{machine.number} master dsrl-br up")
            ip(f"-n {machine.namespace} addr add {machine.address}/24 dev eth0")
            ip(f"-n {machine.namespace} link set eth0 up")
            ip(f"-n {machine.namespace} link set lo up")

    def variables(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "COUNTING": str(self.directory),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",  # other programs of this machine are not Ray's to judge
        }

    def inside(self, machine: Machine, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        variables = self.variables() | options.pop("variables", {})
        return subprocess.Popen(["ip", "netns", "exec", machine.namespace, *command], env=variables, **options)

    def join(self, machine: Machine) -> float:
        """Start Ray on a machine; returns how many seconds that took."""
        which = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        if machine is not HEAD:
            which = [f"--address={HEAD.address}:{PORT}"]
        resources = [f"--num-gpus={machine.gpus}", f"--num-cpus={machine.cpus}"]
        place = [f"--node-ip-address={machine.address}", f"--temp-dir={self.directory / machine.name}"]
        begun = time.monotonic()
        for _ in range(3):
            with (self.directory / f"{machine.name}.log").open("a") as log:
                starting = self.inside(machine, str(RAY), "start", *which, *resources, *place, stdout=log, stderr=log)
                if starting.wait(START_S) == 0:
                    return time.monotonic() - begun
            self.leave(machine)
        raise RuntimeError(f"ray start failed on {machine.name}, see {log.name}")

    def leave(self, machine: Machine) -> None:
        """A machine's power fails."""
        for process in machine.pids():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def complete(self) -> None:
        """Bring those machines back that a fault has taken."""
        if not HEAD.named("gcs_server"):
            for machine in (HEAD, LEARNER, *NODES):
                self.leave(machine)
        for machine in (HEAD, LEARNER, *NODES[:GROUPS]):
            machine.link("up")
            if not machine.named("raylet/raylet"):
                self.leave(machine)
                print(f"  ray start on {machine.name}: {self.join(machine):.0f} s", flush=True)
        self.leave(NODES[-1])

    def close(self) -> None:
        for machine in (HEAD, LEARNER, *NODES):
            self.leave(machine)
            subprocess.run(["ip", "netns", "del", machine.namespace])
        subprocess.run(["ip", "link", "del", "dsrl-br"])


class Said(NamedTuple):
    when: float
    what: str
    """`placed` or `ended`."""
    group: int
    words: str


class Subject:
    """Groups that are placed on the cluster by a process on the learner's machine."""

    pattern = r"faults_ray\.py drive"
    member = "support.sleeping_member|sleep 86400"
    processes = 2
    """Of each group."""
    rows = 0

    def __init__(self, cluster: Cluster, directory: Path, **variables: str) -> None:
        self.cluster, self.directory = cluster, directory
        directory.mkdir()
        with (directory / "driver.log").open("w") as log:
            command = [sys.executable, __file__, "drive", str(directory)]
            self.popen = cluster.inside(LEARNER, *command, stdout=log, stderr=log, variables=variables)

    def said(self) -> list[Said]:
        path = self.directory / "said.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [Said(*json.loads(line)) for line in lines]

    def until(self, happened: Callable[[list[Said]], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not happened(self.said()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def place(self, group: int) -> Machine:
        """Where a group was placed last."""
        words = [said.words for said in self.said() if said.what == "placed" and said.group == group][-1]
        return next(machine for machine in NODES if f"{machine.address}," in f"{words},")

    def members(self) -> dict[str, int]:
        """How many processes of groups there are on each machine."""
        return {machine.name: len(machine.named(self.member)) for machine in NODES if machine.named(self.member)}

    def works(self) -> bool:
        """Wait until all groups do what they are for; returns whether they do."""
        return True

    def check(self) -> str:
        """What is wrong with what the run has made, or nothing."""
        return ""

    def stop(self) -> None:
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(60)

    def signal(self, number: int) -> None:
        for process in LEARNER.named(self.pattern):
            process.send_signal(number)


class CountingRun(Subject):
    """A run of environments that count what they show."""

    pattern = r"-m support\.counting"
    member = "dsrl_async: "
    processes = 6
    """Supervisor, template, two environments, inference, uplink."""
    placed = re.compile(r"^(.{23}) \w+ group-(\d+) starts on (.+)$", re.MULTILINE)
    gone = re.compile(r"^(.{23}) \w+ group-(\d+) on .+? ended \((.+)\) after \d", re.MULTILINE)

    def __init__(self, cluster: Cluster, directory: Path, **variables: str) -> None:
        self.cluster, self.directory, self.run_dir = cluster, directory, directory / "run"
        directory.mkdir()
        (cluster.directory / COUNTS).unlink(missing_ok=True)
        where = ["--ray", f"{HEAD.address}:{PORT}", "--group.wait-s", "30", "--run-dir", str(self.run_dir)]
        with (directory / "launch.log").open("w") as log:
            command = [sys.executable, "-m", "support.counting", *SETTINGS, *where]
            self.popen = cluster.inside(LEARNER, *command, stdout=log, stderr=log, variables=variables)

    def said(self) -> list[Said]:
        path = self.run_dir / "logs" / "supervisor.log"
        text = path.read_text() if path.is_file() else ""
        return sorted(
            Said(datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f").timestamp(), what, int(group), words)
            for what, pattern in (("placed", self.placed), ("ended", self.gone))
            for when, group, words in pattern.findall(text)
        )

    def decided(self) -> list[int]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().rpartition("\n")[0].splitlines() if path.is_file() else []
        return [group["decisions"] for group in json.loads(lines[-1])["groups"]] if lines else [0] * GROUPS

    def works(self) -> bool:
        before = self.decided()
        return self.until(lambda said: all(b >= a + 10 for a, b in zip(before, self.decided(), strict=True)), START_S)

    def check(self) -> str:
        """A run that was killed has left no checkpoint of its end."""
        try:
            summary = json.loads((self.run_dir / "summary.json").read_text())
        except OSError:
            return "no summary"
        run = GroupRun.__new__(GroupRun)  # without starting one
        run.directory, run.run_dir = self.cluster.directory, self.run_dir
        try:
            self.rows = run.check(summary)
        except AssertionError as error:
            return " ".join(str(error).split())[:300] or "wrong rows"
        return ""


class Fault(NamedTuple):
    do: Callable[[Cluster, Subject], None]
    ends: int
    """How many groups it ends."""
    again_s: float = 240.0
    """How long it may take until all groups are there again."""
    over: bool = False
    """Whether the run is over."""


def cut(seconds: float) -> Callable[[Cluster, Subject], None]:
    def do(cluster: Cluster, subject: Subject) -> None:
        machine, begun = subject.place(0), time.monotonic()
        machine.link("down")
        if seconds > DEAD_S:
            cluster.join(NODES[-1])  # where the group is then started, while its predecessor still runs
        time.sleep(max(0.0, begun + seconds - time.monotonic()))
        machine.link("up")
        time.sleep(10)

    return do


def kill(pattern: str, where: Callable[[Subject], Machine]) -> Callable[[Cluster, Subject], None]:
    def do(cluster: Cluster, subject: Subject) -> None:
        found = where(subject).named(pattern)
        assert found, f"there is no {pattern}"
        for process in found:
            process.kill()
        time.sleep(3)

    return do


def power_fails(cluster: Cluster, subject: Subject) -> None:
    cluster.leave(subject.place(0))
    cluster.join(NODES[-1])  # and another machine joins


def of_group_0(subject: Subject) -> Machine:
    return subject.place(0)


KILLED = "launched process killed"
FAULTS = {
    "link down 5 s": Fault(cut(5), 0),
    "link down 20 s": Fault(cut(20), 0),
    "link down 120 s": Fault(cut(120), 1),
    "group killed": Fault(kill(r"support.sleeping_member|supervisor of group", of_group_0), 1),
    "Host killed": Fault(kill("ray::Host", of_group_0), 1),
    "placer killed": Fault(kill("dsrl_async: placer", lambda subject: LEARNER), GROUPS),
    "raylet killed, another machine joins": Fault(power_fails, 1),
    "learner killed": Fault(kill("dsrl_async: learner", lambda subject: LEARNER), 0),
    "downlink killed": Fault(kill("dsrl_async: downlink", lambda subject: LEARNER), 0),
    KILLED: Fault(lambda cluster, subject: subject.signal(signal.SIGKILL), 0, over=True),
    "head killed": Fault(kill("gcs_server", lambda subject: HEAD), GROUPS, over=True),
}


WRONG_TOKEN = "wrong token"


class Row(NamedTuple):
    fault: str
    ended: str
    """When the last of the groups that ended was found dead."""
    again: str
    """When all groups were there again."""
    left: str
    """Processes of groups on each machine when all is over."""
    rows: str
    """How many rows the last checkpoint has, all of which were checked."""
    verdict: str


def trial(cluster: Cluster, name: str, fault: Fault, make: Callable[[Cluster, Path], Subject]) -> Row:
    cluster.complete()
    subject = make(cluster, cluster.directory / re.sub(r"\W+", "-", name))
    try:
        return judge(cluster, name, fault, subject)
    finally:
        subject.stop()


def judge(cluster: Cluster, name: str, fault: Fault, subject: Subject) -> Row:
    problems = []
    if not subject.until(lambda said: len({one.group for one in said if one.what == "placed"}) == GROUPS, START_S):
        raise RuntimeError(f"the groups were not placed: {subject.said()}")
    if not subject.works():
        raise RuntimeError("the groups do not work")
    time.sleep(5)
    begun, before = time.time(), len(subject.said())
    fault.do(cluster, subject)

    def ended(said: list[Said]) -> list[Said]:
        return [one for one in said[before:] if one.what == "ended"]

    def placed(said: list[Said]) -> list[Said]:
        return [one for one in said[before:] if one.what == "placed"]

    when, again = "", ""
    if fault.over:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subject.popen.wait(fault.again_s)
            again = f"over after {time.time() - begun:.0f} s"
        if not again:
            problems.append("it did not end")
    else:
        if not subject.until(lambda said: len(placed(said)) == len(ended(said)) >= fault.ends, fault.again_s):
            problems.append("the groups did not come back")
        elif not subject.works():
            problems.append("the groups do not work again")
        again = f"{placed(subject.said())[-1].when - begun:.0f} s" if placed(subject.said()) else ""
        if len(ended(subject.said())) != fault.ends:
            problems.append(f"{len(ended(subject.said()))} groups ended")
    if found := ended(subject.said()):
        when = f"{found[-1].when - begun:.0f} s"
    time.sleep(3)
    left = subject.members()
    if not fault.over and sum(left.values()) != GROUPS * subject.processes:
        problems.append(f"processes: {left}")
    subject.stop()
    deadline = time.monotonic() + 60
    while (left := subject.members()) and time.monotonic() < deadline:
        time.sleep(1)
    if left:
        problems.append("something is left over")
    if name != KILLED and (wrong := subject.check()):
        problems.append(wrong)
    return Row(name, when, again, str(left or "nothing"), str(subject.rows), "; ".join(problems) or "as expected")


def wrong_token(cluster: Cluster) -> Row:
    """A run whose token is not the cluster's ends with a sentence, and leaves nothing."""
    cluster.complete()
    other = cluster.directory / "other"
    other.touch(0o600)
    other.write_text(secrets.token_hex(32))
    begun, run = time.monotonic(), CountingRun(cluster, cluster.directory / "wrong", RAY_AUTH_TOKEN_PATH=str(other))
    code = run.popen.wait(START_S)
    said = json.loads((run.run_dir / "summary.json").read_text())["exit_reason"]
    refused = code == 1 and "not with this machine's token" in said and not run.said()
    over = f"over after {time.monotonic() - begun:.0f} s"
    return Row(WRONG_TOKEN, "", over, str(run.members() or "nothing"), "0", "as expected" if refused else said)


# ---- the groups that sleep


def drive(directory: Path) -> None:
    """The learner's machine: keep the groups running, and write down what becomes of them."""
    import logging

    from dsrl_async.groups.placing import Placed
    from dsrl_async.groups.ray_placement import RayPlacement

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    placement = RayPlacement(f"{HEAD.address}:{PORT}", directory / "logs", 1, 1, wait_s=30)
    incarnations = dict.fromkeys(range(GROUPS), 0)
    over = False

    def start(group: int) -> None:
        incarnations[group] += 1
        job = {
            "group": group,
            "run_dir": str(directory / f"groups/{group}"),
            "module": "support.sleeping_member",
            "child": True,
        }
        placement.start(group, incarnations[group], job)

    for group in incarnations:
        start(group)
    with (directory / "said.jsonl").open("a", buffering=1) as file:
        while not stopped and not over:
            for event in placement.poll():
                placed = isinstance(event, Placed)
                words = event.where if isinstance(event, Placed) else event.how
                file.write(json.dumps([time.time(), "placed" if placed else "ended", event.group, words]) + "\n")
                if not isinstance(event, Placed):
                    over = over or event.fatal
                    if not event.fatal:
                        start(event.group)
            time.sleep(0.05)
    placement.close()


@contextlib.contextmanager
def machines() -> Iterator[Cluster]:
    directory = Path(tempfile.mkdtemp(prefix="dsrl-faults-"))
    cluster = Cluster(directory)
    try:
        yield cluster
    finally:
        cluster.close()


def main() -> None:
    if sys.argv[1:2] == ["drive"]:
        return drive(Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=[*FAULTS, WRONG_TOKEN], metavar="FAULT", default=[*FAULTS, WRONG_TOKEN]
    )
    parser.add_argument("--sleeping", action="store_true", help="groups that only sleep, and no learner")
    parser.add_argument("--keep", action="store_true", help="leave the files of the runs and of Ray where they are")
    arguments = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("ip") is None:
        sys.exit("this needs root, and iproute2's `ip`, for network namespaces")
    rows = []
    with machines() as cluster:
        for name in arguments.only:
            try:
                if name == WRONG_TOKEN:
                    rows.append(wrong_token(cluster))
                else:
                    rows.append(trial(cluster, name, FAULTS[name], Subject if arguments.sleeping else CountingRun))
            except Exception as error:
                rows.append(Row(name, "", "", "", "", f"not run: {error}"))
            print(*rows[-1], sep=" | ", flush=True)
        if not arguments.keep:
            shutil.rmtree(cluster.directory, ignore_errors=True)
    print("\n| fault | found after | all there again after | left over | rows checked | |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
