"""Who is there and who is missing, without processes: children, and the workers that a pretended template forks."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from dsrl_async.config.load import validate
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.host import processes
from dsrl_async.host.processes import Program
from dsrl_async.run.channel import Channel
from dsrl_async.run.supervisor import workers
from dsrl_async.run.supervisor.child import Child, Kind
from dsrl_async.run.supervisor.starting import wait_of
from dsrl_async.run.supervisor.supervisor import LOADING_S, PROGRAMS, Supervisor
from dsrl_async.run.supervisor.workers import Workers
from dsrl_async.shm.counters import Counters, Start
from dsrl_async.shm.memory import create_memory


class PretendedProcess:
    def __init__(self, pid: int, returncode: int | None = None) -> None:
        self.pid, self.returncode = pid, returncode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        return 0 if self.returncode is None else self.returncode

    def kill(self) -> None:
        self.returncode = -9


class PretendedTemplate:
    """Forks at once while `answers` is set; notes what it was asked for."""

    asked: ClassVar[list[tuple[int, int]]] = []
    answers = True
    pids = itertools.count(100)

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.popen, self.prepared, self.problem, self.forked = PretendedProcess(next(self.pids)), True, None, 0
        self.refuses = False

    def ask(self, number: int, incarnation: int, log: Path, name: str) -> None:
        if self.refuses:
            raise RuntimeError("the template of the environment workers is of no use")
        self.asked.append((number, incarnation))

    def answer(self, wait_s: float, last: bool) -> PretendedProcess | None:
        return PretendedProcess(next(self.pids)) if self.answers else None

    def close(self) -> None:
        self.popen.kill()


@pytest.fixture
def session(tmp_path: Path, spec: EnvironmentSpec, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the supervisor takes from a session, of a run of five environments."""
    monkeypatch.setattr(workers, "Template", PretendedTemplate)
    monkeypatch.setattr(PretendedTemplate, "asked", [])
    monkeypatch.setattr(workers, "available_cpus", lambda: 1)
    config = validate({"actors": 5, "replay": {"capacity": 500}})
    arena = create_memory(config, spec, 10)
    (tmp_path / "logs").mkdir()
    run = SimpleNamespace(policy=SimpleNamespace(directory="policy"), horizon=10, spec=spec)
    return SimpleNamespace(config=config, run_dir=tmp_path, arena=arena, counters=Counters(arena), horizon=10, run=run)


def workers_of(run: Supervisor) -> Workers:
    assert isinstance(run.crew, Workers)
    return run.crew


def make_workers(session: Any) -> Workers:
    return Workers(session, [0] * 5, [], Program("nothing"))


def test_names_are_those_of_logs_and_metrics(session: Any) -> None:
    run = Supervisor(session)
    assert [child.name for child in run.children] == [
        *("inference", "learner", "template"),
        *(f"actor-{lane:03d}" for lane in range(5)),
    ]
    lanes = [(child.kind, child.number) for child in workers_of(run).by_lane]
    assert lanes == [(Kind.WORKER, lane) for lane in range(5)]
    assert run.children[-1].log == session.run_dir / "logs" / "actor-004.log"
    assert run.restarts == {"actor": 0, "inference": 0, "learner": 0, "template": 0}
    assert run.pids() == {}
    for pid, child in enumerate(run.children):
        child.popen = None if child.number == 3 else PretendedProcess(pid)
    assert run.pids() == {"inference": [0], "learner": [1], "template": [2], "actor": [3, 4, 5, 7]}


def test_what_a_model_process_is_told_for_all_to_see_holds_no_key(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[dict[str, Any], Channel]] = []

    def start(module: str, job: dict[str, Any], fds: list[int], log: Path, threads: int) -> PretendedProcess:
        assert job["channel_fd"] in fds
        told.append((job, Channel(*json.loads(os.pread(job["channel_fd"], 10_000, 0)))))
        return PretendedProcess(1)

    monkeypatch.setattr(processes, "start", start)
    run = Supervisor(session)
    run._start_missing()
    assert [end for _, end in told] == [run._channel.subscriber, run._channel.publisher]
    for job, end in told:
        everything = json.dumps(job) + json.dumps(dict(os.environ))
        assert not any(key in everything for key in end[1:])
        assert end.endpoint not in everything
    assert len({end.secret for _, end in told}) == 2  # and neither gets the other's
    path = run._sockets.path
    assert path.exists()
    run._sockets.close()
    assert not path.exists()
    for job, _ in told:
        with contextlib.suppress(OSError):  # closed, or another file by now
            assert "channel" not in os.readlink(f"/proc/self/fd/{job['channel_fd']}")


def test_without_a_program_there_is_no_learner(session: Any) -> None:
    run = Supervisor(session, {kind: program for kind, program in PROGRAMS.items() if kind is not Kind.LEARNER})
    assert [child.kind for child in run.models] == [Kind.INFERENCE]


@pytest.mark.parametrize(
    ("seconds_ago", "killed"),
    [
        ({"started": LOADING_S - 5}, False),
        ({"started": LOADING_S + 5}, True),
        ({"started": 4000, "loading": LOADING_S - 5}, False),  # the policy is compiled for many batch sizes
        ({"started": 4000, "loading": LOADING_S + 5}, True),
        ({"started": 300, "loading": 400}, False),  # of the incarnation before
        ({"started": 4000, "loading": 200, "heartbeat": 100}, False),
        ({"started": 4000, "loading": 100, "heartbeat": 130}, True),  # it is loaded: heartbeat_timeout_s counts
    ],
)
def test_loading_may_take_long_but_not_in_silence(
    session: Any, monkeypatch: pytest.MonkeyPatch, seconds_ago: dict[str, float], killed: bool
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)  # the supervisor has been awake since then
    run, now = Supervisor(session), 10_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    child, popen = run.models[0], PretendedProcess(1)
    child.begin()
    child.popen, child.started = popen, now - seconds_ago["started"]
    for name in ("loading", "heartbeat"):
        if name in seconds_ago:
            getattr(session.counters, f"inference_{name}_ns")[0] = int(1e9 * (now - seconds_ago[name]))
    assert bool(run._kill_if_silent(child, popen)) is killed
    assert popen.returncode == (-9 if killed else None)


def test_an_incarnation_knows_where_its_output_begins(tmp_path: Path) -> None:
    child = Child(Kind.LEARNER, tmp_path)
    child.begin()
    assert (child.incarnation, child.log_start) == (1, 0)
    first = child.started
    child.log.write_text("first\n")
    child.begin()
    assert (child.incarnation, child.log_start) == (2, len("first\n"))
    assert child.started > first


def test_workers_come_up_two_at_a_time_where_there_is_one_core(session: Any) -> None:
    run = make_workers(session)
    run.start_missing()
    run.start_missing()
    assert PretendedTemplate.asked == [(0, 1), (1, 1)]
    run._slots.request(1, incarnation=1, count=1)
    run.start_missing()
    assert PretendedTemplate.asked == [(0, 1), (1, 1), (2, 1)]
    assert [worker.popen is not None for worker in run.by_lane] == [True, True, True, False, False]


def test_a_worker_that_died_is_replaced_by_its_next_incarnation(session: Any) -> None:
    run = make_workers(session)
    run.start_missing()
    for lane in (0, 1):
        run._slots.request(lane, incarnation=1, count=1)
    run.start_missing()
    session.counters.actor_episodes[1] = 7
    assert run.got_somewhere(run.by_lane[1])
    run.by_lane[1].popen = None
    PretendedTemplate.asked.clear()
    run._slots.request(2, incarnation=1, count=1)
    run.start_missing()  # what the first one has asked for is not the second one's request
    run.start_missing()
    assert PretendedTemplate.asked == [(1, 2)]
    assert not run.got_somewhere(run.by_lane[1])
    session.counters.actor_episodes[1] = 8
    assert run.got_somewhere(run.by_lane[1])


def test_one_worker_is_asked_for_at_a_time(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PretendedTemplate, "answers", False)
    run = make_workers(session)
    run.start_missing()
    run.start_missing()
    assert PretendedTemplate.asked == [(0, 1)]
    assert run.by_lane[0].popen is None
    monkeypatch.setattr(PretendedTemplate, "answers", True)
    run.start_missing()
    assert PretendedTemplate.asked == [(0, 1), (1, 1)]


def test_a_template_of_no_use_is_killed_and_replaced(session: Any) -> None:
    run = make_workers(session)
    run.start_missing()
    old: Any = run._forker
    old.refuses = True
    run._slots.request(0, incarnation=1, count=1)
    run.start_missing()
    assert old.popen.returncode == -9
    assert run.template.popen is old.popen
    run.template.popen = None
    run.start_missing()
    assert run.template.incarnation == 2
    assert run._forker is not old
    assert PretendedTemplate.asked[-1][0] == 2


@pytest.mark.parametrize("kind", [Kind.WORKER, Kind.INFERENCE, Kind.LEARNER, Kind.TEMPLATE])
def test_whoever_died_is_counted_by_kind_and_missing(
    session: Any, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    run = Supervisor(session)
    workers_of(run).start_missing()
    victim = next(child for child in run.children if child.kind is kind)
    victim.begin()
    victim.popen = PretendedProcess(1, returncode=-11)
    assert run._give_up_dead() is None
    assert victim.popen is None
    assert run.restarts == {"actor": 0, "inference": 0, "learner": 0, "template": 0} | {kind.value: 1}
    assert f"{victim.name} ended (killed by SIGSEGV) after 0 s" in caplog.text


def test_silence_is_measured_by_the_heartbeat_of_ones_own_kind(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counters, now = session.counters, [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    run = Supervisor(session)
    beats = {
        "inference": counters.inference_heartbeat_ns[0:1],
        "learner": counters.learner_heartbeat_ns[0:1],
        "template": counters.template_heartbeat_ns[0:1],
        **{f"actor-{lane:03d}": counters.actor_heartbeat_ns[lane : lane + 1] for lane in range(5)},
    }
    for pid, child in enumerate(run.children):
        child.begin()
        child.popen = PretendedProcess(pid)
    now[0] += 1.0
    for beat in beats.values():
        beat[0] = round(now[0] * 1e9)
    late = now[0] + session.config.heartbeat_timeout_s + 1.0
    for silent in beats:
        now[0] = late
        for name, beat in beats.items():
            if name != silent:
                beat[0] = round(now[0] * 1e9)
        gone = [child.name for child in run.children if child.popen and run._kill_if_silent(child, child.popen)]
        assert gone == [silent]
        beats[silent][0] = round(now[0] * 1e9)
        late = now[0] + session.config.heartbeat_timeout_s + 1.0


# ---- what is waited for


def started(session: Any, monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    """A supervisor whose model processes are started, and pretended."""
    monkeypatch.setattr(processes, "start", lambda *arguments: PretendedProcess(1))
    run = Supervisor(session)
    run._start_missing()
    return run


def as_words(run: Supervisor) -> dict[str, str]:
    return {wait.who: ", ".join(filter(None, (wait.doing, wait.detail))) for wait in run._waits()}


def test_what_is_waited_for_is_what_the_processes_say(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PretendedTemplate, "answers", False)
    run, counters = started(session, monkeypatch), session.counters
    template: Any = workers_of(run)._forker
    template.prepared = False
    assert as_words(run) == {
        "inference": "importing PyTorch",
        "learner": "importing PyTorch",
        "template": "starting Python",
        "workers": "waiting for the template, 0 of 5 ready",
    }
    counters.note_start(Start.LOADING, counters.inference_start)
    counters.note_start(Start.PREPARING, counters.template_start)
    counters.learner_heartbeat_ns[0] = time.monotonic_ns()  # which is at work
    assert as_words(run) == {
        "inference": "loading the policy",
        "template": "making the environment, compiling its scene",
        "workers": "waiting for the template, 0 of 5 ready",
    }
    counters.note_start(Start.PREPARING, counters.inference_start)
    counters.inference_prepared[:] = 3, 20
    template.prepared = True
    monkeypatch.setattr(PretendedTemplate, "answers", True)
    run._start_missing()
    counters.note_start(Start.PREPARING, counters.actor_start[0])
    assert as_words(run) == {
        "inference": "compiling or capturing the policy, 3 of 20 sizes",
        "workers": "first reset, 0 of 5 ready",
    }
    counters.inference_heartbeat_ns[0] = time.monotonic_ns()
    for lane in range(4):
        run._start_missing()
        workers_of(run)._slots.request(lane, workers_of(run).by_lane[lane].incarnation, 1)
    assert as_words(run) == {"workers": "starting, 4 of 5 ready"}
    workers_of(run)._slots.request(4, workers_of(run).by_lane[4].incarnation, 1)
    assert as_words(run) == {}


def test_a_successor_does_not_take_over_what_its_predecessor_did(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, counters = started(session, monkeypatch), session.counters
    counters.note_start(Start.LOADING, counters.learner_start)
    assert as_words(run)["learner"] == "making the agent"
    assert run.learner is not None
    run.learner.popen = PretendedProcess(1, returncode=-9)
    run._give_up_dead()
    run._start_missing()
    assert as_words(run)["learner"] == "importing PyTorch, try 2 of 3"


def test_a_start_that_takes_long_says_when_it_is_given_up(session: Any) -> None:
    child = Child(Kind.TEMPLATE, session.run_dir)
    child.started = time.monotonic() - 50
    wait = wait_of(child, session.counters.template_start, 120.0, 3)
    assert (round(wait.seconds), wait.detail) == (50, "120 s are allowed")
    assert wait_of(child, session.counters.template_start, 1000.0, 3).detail == ""
