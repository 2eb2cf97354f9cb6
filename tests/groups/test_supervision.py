"""The learner's side of groups without processes: a pretended placement, and counters that a test moves by hand."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsrl_async.config.load import validate
from dsrl_async.config.settings import Config
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.groups import supervision
from dsrl_async.groups.member import config_of
from dsrl_async.groups.placing import Ended, Event, Placed
from dsrl_async.groups.supervision import AGAIN_S, Groups
from dsrl_async.groups.wire import make_link
from dsrl_async.run.supervisor.supervisor import LOADING_S, QUICK_S
from dsrl_async.shm.counters import Counters
from dsrl_async.shm.memory import create_memory


class PretendedPlacement:
    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.events: list[Event] = []
        self.ended: list[int] = []
        self.pending: dict[int, str] = {}
        self.closed = False

    def start(self, group: int, incarnation: int, job: dict[str, Any]) -> None:
        json.dumps(job)
        assert (job["group"], job["incarnation"]) == (group, incarnation)
        self.jobs.append(job)

    def place(self, group: int, incarnation: int = 1) -> None:
        self.events.append(Placed(group, incarnation, f"machine {group}"))

    def poll(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def waits(self) -> dict[int, str]:
        return self.pending

    def tell(self, group: int, line: str) -> None:
        raise AssertionError("nobody is told anything")

    def end(self, group: int) -> None:
        self.ended.append(group)

    def close(self) -> None:
        self.closed = True


class Run:
    """Two groups of three environments, and the time."""

    def __init__(self, run_dir: Path, spec: EnvironmentSpec, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.config = validate({"actors": 3, "groups": 2, "replay": {"capacity": 500}, **settings})
        whole = self.config.model_copy(update={"actors": 6})
        arena = create_memory(whole, spec, 10)
        self.counters, self.now = Counters(arena), 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        session: Any = SimpleNamespace(run_dir=run_dir, counters=self.counters, monitor=SimpleNamespace())
        self.placement = PretendedPlacement()
        self.groups = Groups(session, self.config, self.placement, make_link("ipc://a", "ipc://b")[1])

    def step(self, seconds: float = 0.1) -> str | None:
        self.now += seconds
        return self.groups.start_missing()

    def pass_time(self, seconds: float) -> None:
        """Let time pass for a supervisor that looks all the time."""
        until = self.now + seconds
        while self.now < until:
            assert self.step(1.0) is None

    def decide(self, group: int, decisions: int) -> None:
        self.counters.actor_decisions[group * 3] += decisions
        self.hear(group)

    def hear(self, group: int) -> None:
        self.counters.group_heard_ns[group] = int(self.now * 1e9)

    def end(self, group: int, how: str = "killed by SIGKILL", fatal: bool = False) -> str | None:
        incarnation = self.groups.by_number[group].incarnation
        self.placement.events.append(Ended(group, incarnation, how, fatal))
        return self.step()


@pytest.fixture
def run(tmp_path: Path, spec: EnvironmentSpec, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, spec, monkeypatch)


def test_each_group_is_asked_for_once_and_its_job_holds_what_is_its_own(run: Run, tmp_path: Path) -> None:
    run.counters.actor_decisions[:] = range(6)
    run.step()
    run.step()
    assert [(job["group"], job["incarnation"], job["run_dir"]) for job in run.placement.jobs] == [
        (0, 1, str(tmp_path / "groups" / "0")),
        (1, 1, str(tmp_path / "groups" / "1")),
    ]
    assert run.placement.jobs[1]["counters"]["actor_decisions"] == [3, 4, 5]
    assert run.counters.group_started.tolist() == [1, 1]
    assert [wait.doing for wait in run.groups.waits(120, 3)] == ["starting", "starting"]
    run.placement.pending = {1: "a GPU of the cluster"}
    run.placement.place(0)
    run.step()
    assert [wait.doing for wait in run.groups.waits(120, 3)] == [
        "starting on machine 0",
        "waiting for a GPU of the cluster",
    ]
    run.decide(0, 1)
    assert [wait.who for wait in run.groups.waits(120, 3)] == ["group-1"]


def test_a_group_that_worked_is_replaced_at_once_and_goes_on_with_its_counts(run: Run) -> None:
    run.step()
    run.placement.place(0)
    run.step()
    run.decide(0, 40)
    run.pass_time(QUICK_S + 1)
    assert run.end(0) is None
    run.step()
    assert [(job["group"], job["incarnation"]) for job in run.placement.jobs] == [(0, 1), (1, 1), (0, 2)]
    assert run.placement.jobs[-1]["counters"]["actor_decisions"] == [40, 0, 0]
    assert run.counters.group_started.tolist() == [2, 1]
    assert [group.restarts for group in run.groups.members] == [1, 0]
    run.placement.events.append(Ended(0, 1, "told late"))
    run.step()
    assert [group.restarts for group in run.groups.members] == [1, 0]  # what is said of an older incarnation is no news


def test_a_group_that_cannot_start_waits_longer_each_time_and_ends_the_run_with_its_sentence(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    why = "exit code 1: inference ended 3 times soon after its start: no room on the GPU"
    run.step()
    run.placement.place(1)
    run.step()
    for failure in (1, 2):
        run.decide(1, 100)  # the other one works
        run.placement.place(0, failure)
        run.step()
        assert run.end(0, why) is None
        (wait,) = run.groups.waits(120, 3)
        assert wait.doing == f"starting again after: {why}"
        assert wait.detail == f"try {failure + 1} of 3"
        run.step(AGAIN_S * 2 ** (failure - 1) - 0.5)
        assert len(run.placement.jobs) == failure + 1
        run.step(0.5)
        assert len(run.placement.jobs) == failure + 2
    reason = run.end(0, why)
    assert reason is not None
    assert reason.startswith(
        f"failed: group-0 ended 3 times soon after its start, at last on its way to a machine ({why})"
    )
    assert [record.getMessage().count(why) for record in caplog.records] == [1, 1]


def test_three_failures_of_different_groups_or_with_work_between_end_nothing(run: Run) -> None:
    run.step()
    for _ in range(5):
        for group in (0, 1):
            run.placement.place(group, run.groups.by_number[group].incarnation)
        run.step()
        run.decide(0, 10)
        run.decide(1, 10)
        run.pass_time(QUICK_S + 1)
        assert run.end(0) is None
        assert run.end(1) is None
        run.pass_time(2)
    assert [group.restarts for group in run.groups.members] == [5, 5]


def test_what_a_successor_would_meet_likewise_ends_the_run_at_once(run: Run) -> None:
    run.step()
    reason = run.end(1, "exit code 3: the policy's directory is not there", fatal=True)
    assert reason == "failed: group-1: exit code 3: the policy's directory is not there"


def test_a_silent_group_is_ended_after_its_patience_and_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.step()
    run.placement.place(0)
    run.placement.place(1)
    run.step()
    run.pass_time(LOADING_S - 10)  # it may load for long
    assert run.placement.ended == []
    run.hear(0)
    run.hear(1)
    run.pass_time(run.config.heartbeat_timeout_s - 5)
    run.hear(1)
    run.pass_time(20)
    assert run.placement.ended == [0]


def test_at_the_end_only_groups_that_are_somewhere_are_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.step()
    run.placement.place(0)
    run.step()
    monkeypatch.setattr(time, "sleep", lambda seconds: setattr(run, "now", run.now + seconds))
    assert not run.groups.wait(0.2)
    run.placement.events.append(Ended(0, 1, "exit code 0"))
    before = run.now
    assert run.groups.wait(5.0)
    assert run.now == before  # the other one is nowhere
    run.groups.kill()
    assert run.placement.closed


def test_the_settings_of_a_group_are_valid_and_differ_in_the_seed_alone() -> None:
    for settings in (
        {"actors": 3, "groups": 2, "max_decisions": 100, "stop_at_success": 0.5, "profile": True},
        {
            "actors": 48,
            "groups": 16,
            "ray": "auto",
            "replay": {"capacity": 200_000},
            "group": {"ports": [1, 2], "gpus": 0},
        },
        {"actors": 16, "groups": 2, "sac": {"algorithm": "na"}, "replay": {"warmup_decisions": 2000}},
    ):
        config = validate(settings)
        first, second = (validate(config_of(config, group)) for group in (0, 1))
        assert not first.grouped
        assert (first.max_decisions, first.stop_at_success, first.log.loggers) == (None, None, [])
        assert first.actors == config.actors
        assert first.seed != second.seed
        assert first.model_copy(update={"seed": second.seed}) == second
        assert first.device == ("cpu" if config.group.gpus == 0 else "auto")
        assert first.replay.warmup_decisions == config.replay.warmup_decisions
        assert config_of(config, 1)["seed"] != config_of(config.model_copy(update={"seed": 1}), 0)["seed"]


def test_ports_that_are_free_are_two() -> None:
    assert len(set(supervision.free_ports())) == 2


def refusal(**settings: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        validate(settings)
    return str(caught.value)


def test_what_does_not_go_with_groups_is_refused_in_a_sentence() -> None:
    assert "serial mode is one process" in refusal(groups=2, serial=True)
    assert "evaluate the checkpoints" in refusal(groups=2, evaluation={"every_decisions": 100})
    assert "more than 4096 environments" in refusal(groups=100, actors=100, replay={"capacity": 10_000_000})
    assert "each of the 32 actors" in refusal(groups=2, actors=16, replay={"capacity": 400})
    assert "give ray, too" in refusal(groups=2, group={"ports": [7001, 7002]})
    assert "group.gpus" in refusal(groups=2, device="cuda", group={"gpus": 0})
    assert "two different numbers" in refusal(group={"ports": [7001, 7001]})
    assert isinstance(validate({"groups": 1, "serial": True}), Config)
