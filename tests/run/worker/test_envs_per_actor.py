"""Several environments in one process: they take turns, and whatever is a process's stays a process's."""

from __future__ import annotations

import json
import signal
import time
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.launched import SMALL, Launched, checkpoint_of, state_of

from dsrl_async.config.load import validate
from dsrl_async.config.settings import MIN_LANE_ROWS, ConfigError
from dsrl_async.doctor import checks
from dsrl_async.envs import TABLETOP, ChunkOutcome
from dsrl_async.evaluate.__main__ import build_parser
from dsrl_async.evaluate.resolve import resolve
from dsrl_async.plan import __main__ as plan
from dsrl_async.run import preflight
from dsrl_async.run.inference.batching import batch_sizes
from dsrl_async.run.worker import worker
from dsrl_async.run.worker.template import lanes_of
from dsrl_async.shm.counters import ACTOR_PHASES
from dsrl_async.shm.memory import create_memory
from dsrl_async.telemetry.profile.trace import FIRST_ACTOR

HORIZON = 10
SEVERAL = ("--actors", "2", "--envs-per-actor", "2")


class Environment:
    """Ends an episode with every third decision; `meanwhile(lane)` is called while it executes one."""

    def __init__(self, lane: int, meanwhile) -> None:  # type: ignore[no-untyped-def]
        self.spec, self.lane, self.meanwhile, self.decisions = TABLETOP, lane, meanwhile, 0

    def reset(self, seed: int, number: int = 0) -> int:
        time.sleep(0.001)
        return 0

    def step_chunk(self, action_chunk: np.ndarray) -> ChunkOutcome:
        self.decisions += 1
        time.sleep(0.001)
        self.meanwhile(self.lane)
        return ChunkOutcome(len(action_chunk), -1, False, truncated=self.decisions % 3 == 0)

    def observe(self, images: np.ndarray, sac_image: np.ndarray, state: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 4), data=st.data())
def test_whoever_has_an_answer_acts_and_the_process_waits_only_when_nobody_has(count: int, data: st.DataObject) -> None:
    """Answers come while the process waits and, in any order, while one of its environments executes."""
    config = validate({"actors": 1, "envs_per_actor": count, "replay": {"capacity": 400}})
    arena = create_memory(config, TABLETOP, HORIZON)
    waits, notified = [0], [0]
    passed_over: dict[int, list[int]] = {}  # lane with an answer -> who has acted before it since then

    def answer(pending: list[int], fewest: int) -> None:
        chosen = data.draw(st.lists(st.sampled_from(pending), min_size=fewest, unique=True) if pending else st.just([]))
        if chosen:
            lanes = np.array(chosen)
            rows = len(chosen)
            answered = slots.answer(
                lanes, slots.request_id[lanes], np.zeros((rows, HORIZON, 7)), np.zeros((rows, 32)), policy_version=0
            )
            assert answered.tolist() == chosen
            passed_over.update({lane: [] for lane in chosen})

    def meanwhile(lane: int) -> None:
        del passed_over[lane]
        for others in passed_over.values():
            others.append(lane)
            assert max(others.count(other) for other in others) <= 2, "one environment goes again and again"
        answer(slots.ready().tolist(), 0)

    def wait(fd: int, timeout_s: float) -> bool:
        assert fd == 7
        pending = slots.ready().tolist()
        assert sorted(pending) == list(range(count)), "it waits though an environment has its action chunk"
        waits[0] += 1
        time.sleep(0.002)
        if waits[0] == 6:
            counters.control_stop[0] = 1
        else:
            answer(pending, 1)
        return True

    actors = [
        worker.Actor(lane, 1, 0, config.env.model_dump(), arena, Environment(lane, meanwhile)) for lane in range(count)
    ]
    slots, counters = actors[0].slots, actors[0].counters
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.events, "wait", wait)
        patch.setattr(worker.events, "notify", lambda fd: notified.__setitem__(0, notified[0] + (fd == 8)))
        begin = time.perf_counter()
        worker.play(actors, 7, [8, 9])
        wall_s = time.perf_counter() - begin
    assert counters.actor_decisions.tolist() == [actor.env.decisions for actor in actors]  # type: ignore[attr-defined]
    assert notified[0] == count + counters.decisions()
    phase_s = dict(zip(ACTOR_PHASES, counters.actor_phase_s.T.tolist(), strict=True))
    assert counters.actor_phase_s.sum() <= wall_s
    assert phase_s["wait_action"][0] >= 6 * 0.002
    assert phase_s["wait_action"][1:] == [0.0] * (count - 1)
    assert sum(phase_s["physics"]) >= 0.001 * counters.decisions()
    assert counters.actor_heartbeat_ns[0] > 0
    arena.close()


@given(actors=st.integers(1, 50), envs_per_actor=st.integers(1, 50))
def test_each_lane_is_of_one_process(actors: int, envs_per_actor: int) -> None:
    rows = actors * envs_per_actor * MIN_LANE_ROWS
    config = validate({"actors": actors, "envs_per_actor": envs_per_actor, "replay": {"capacity": max(400, rows)}})
    lanes = [list(lanes_of(actor, envs_per_actor)) for actor in range(actors)]
    assert list(chain.from_iterable(lanes)) == list(range(config.lanes))
    assert {len(of_one) for of_one in lanes} == {envs_per_actor}


def test_all_environments_learn_and_come_back_with_their_process(tmp_path: Path) -> None:
    run = Launched(tmp_path / "run", *SMALL, *SEVERAL, "--profile")
    run.wait_learning(updates=20)
    assert len(run.children("worker")) == 2
    before = run.figures()["decisions"]
    run.children("worker")[0].kill()
    run.wait_for(lambda figures: figures["decisions"] > before + 300, timeout_s=120)
    assert len(run.children("worker")) == 2
    run.signal(signal.SIGINT)
    result = run.finish()
    assert result["exit_reason"] == "interrupted"
    assert result["restarts"] == {"actor": 1, "inference": 0, "learner": 0, "template": 0}
    assert result["replay_ratio"] == pytest.approx(1.0, abs=0.15)
    assert result["batch_size_mean"] > 2
    assert run.left_over() == []
    state = state_of(run.run_dir)
    counters = {name: np.array(values) for name, values in state["counters"].items()}
    assert state["lanes"] == 4
    assert counters["actor_decisions"].min() > before / 2
    unfinished = counters["actor_started_episodes"] - counters["actor_episodes"]  # those that go on, or were lost
    assert sorted([unfinished[:2].tolist(), unfinished[2:].tolist()]) == [[1, 1], [2, 2]]
    check_profile(run.run_dir / "profile")


def check_profile(directory: Path) -> None:
    actor = json.loads((directory / "report.json").read_text())["processes"]["actor"]
    assert actor["count"] == 2
    assert 0.5 < sum(actor["phases"].values()) <= 1.01
    spans: dict[tuple[int, int], list[tuple[float, float]]] = {}
    titles = {}
    for event in json.loads((directory / "trace.json").read_text())["traceEvents"]:
        if event["ph"] == "X" and event["pid"] >= FIRST_ACTOR:
            spans.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
            assert event["tid"] == 1 or event["name"] != "wait_action"
        elif event["name"] == "thread_name":
            titles[event["pid"], event["tid"]] = event["args"]["name"]
    assert {track: titles[track] for track in spans} == {
        (FIRST_ACTOR + process, 1 + number): f"environment {2 * process + number}"
        for process in range(2)
        for number in range(2)
    }
    for process in (FIRST_ACTOR, FIRST_ACTOR + 1):  # which does one thing at a time
        everything = sorted(spans[process, 1] + spans[process, 2])
        assert all(after[0] >= before[1] - 1e-3 for before, after in pairwise(everything))


@pytest.mark.parametrize("shape", [("1", "2"), ("2", "3")])
def test_resume_with_other_numbers_of_processes_and_environments(tmp_path: Path, shape: tuple[str, str]) -> None:
    first = Launched(tmp_path / "run", *SMALL, *SEVERAL, "--max-decisions", "100").finish()
    assert first["decisions"] == 100
    arguments = ["--resume", str(tmp_path / "run"), "--max-decisions", "160"]
    second = Launched(tmp_path / "run", *arguments, "--actors", shape[0], "--envs-per-actor", shape[1])
    second.wait_for(lambda figures: figures.get("decisions", 0) >= 100 and figures.get("replay_size", 0) >= 100)
    result = second.finish()
    assert result["exit_reason"] == "max_decisions", result
    assert result["decisions"] == 160
    state = state_of(tmp_path / "run")
    assert state["lanes"] == int(shape[0]) * int(shape[1])
    assert min(state["counters"]["actor_decisions"]) > 0


def test_serial_run_does_not_depend_on_how_environments_would_be_spread(tmp_path: Path) -> None:
    weights = []
    for number, shape in enumerate((SEVERAL, ("--actors", "4"))):
        run_dir = tmp_path / str(number)
        result = Launched(run_dir, *SMALL, *shape, "--serial", "--max-decisions", "60").finish()
        assert result["updates"] == 60 - 16, result
        weights.append((checkpoint_of(run_dir) / "agent.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_every_environment_has_its_replay_rows() -> None:
    with pytest.raises(ConfigError, match=r"each of the 30 environments \(480\); raise it or lower actors or envs_per"):
        validate({"actors": 10, "envs_per_actor": 3, "replay": {"capacity": 479}})
    config = validate({"actors": 10, "envs_per_actor": 3, "replay": {"capacity": 480}})
    with pytest.raises(ConfigError, match="envs_per_actor"):
        validate({"envs_per_actor": 0})
    assert batch_sizes(config)[-1] == 32
    assert batch_sizes(config.model_copy(update={"envs_per_actor": 1}))[-1] == 12


def test_memory_is_reckoned_by_environment_and_by_process() -> None:
    def needed(actors: int, envs_per_actor: int, **env: Any) -> preflight.MemoryNeed:
        config = validate({"actors": actors, "envs_per_actor": envs_per_actor, "env": env})
        return preflight.memory_needed(config, TABLETOP, HORIZON)

    one, shared, apart = (needed(*shape).total for shape in ((2, 1), (2, 2), (4, 1)))
    assert one < shared < apart
    for tasks in (None, [0]):  # of LIBERO, each environment has its own scene and graphics
        suite = {"name": "libero_spatial", "task_ids": tasks}
        single, double = needed(2, 1, **suite), needed(2, 2, **suite)
        assert double.actor == 2 * single.actor
        assert (double.template > single.template) == (tasks is not None)


def test_evaluation_and_plan_have_one_environment_in_each_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("envs_per_actor: 3")
    found = resolve(build_parser().parse_args(["--config", str(tmp_path / "run.yaml"), "--episodes", "5"]))
    assert found.config.lanes == found.config.actors == 5
    planned = []
    for envs_per_actor in ("1", "4"):
        options = ["--env-ms", "60", "--gpu", "h100", "--cores", "8", "--memory-gib", "8", "--json"]
        assert plan.main([*options, "--envs-per-actor", envs_per_actor]) == 0
        planned.append(json.loads(capsys.readouterr().out))
    assert planned[0] == planned[1]


def test_doctor_measures_an_actor_with_all_its_environments() -> None:
    waited: list[int] = []
    original = checks.Slots

    def slots(arena):  # type: ignore[no-untyped-def]
        found = original(arena)
        waited.append(np.count_nonzero(found.request_id))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "Slots", slots)
        (finding,) = checks.check_actor(validate({"envs_per_actor": 3}), checks.Options(measure=True))
    assert finding.status == "ok"
    assert waited[-1] == 3
