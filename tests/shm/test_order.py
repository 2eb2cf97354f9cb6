"""The barriers of the shared memory: where they stand, that each is needed there, and what they are on ARM.

The arrays are instrumented: they note every load and store of theirs, and `order.barrier` notes itself. So what is
tested is the program's order of operations, which a machine that keeps it (x86-64) would never show to be wrong.
"""

from __future__ import annotations

import ast
import itertools
import logging
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.paths import ROOT

from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.host.signals import StopRequest
from dsrl_async.launch import command as launch
from dsrl_async.run import preflight
from dsrl_async.shm import events, order
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.assignments import NONE_LEFT, Assignments, assignment_fields
from dsrl_async.shm.counters import Counters, NoiseMode, Stop
from dsrl_async.shm.replay import ReplayRing
from dsrl_async.shm.slots import Slots
from dsrl_async.shm.spans import Spans, newest_spans, span_fields

Operation = tuple[str, str]
"""("load" or "store", name of the array), or ("barrier", "")."""


class Traced(np.ndarray):
    """A view of an array that notes what is done with it."""

    name = ""
    notes: list[Operation] = []  # noqa: RUF012 (the views of one array share it)

    def __array_finalize__(self, source: Any) -> None:
        self.name, self.notes = getattr(source, "name", ""), getattr(source, "notes", [])

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if isinstance(found, Traced) and np.may_share_memory(np.asarray(found), np.asarray(self)):
            return found  # a view, which has read nothing yet
        self.notes.append(("load", self.name))
        return np.asarray(found)[()]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.notes.append(("store", self.name))
        np.asarray(self)[key] = value

    def copy(self, order: Any = "C") -> Any:
        self.notes.append(("load", self.name))
        return np.asarray(self).copy(order)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **keywords: Any) -> Any:
        self.notes.extend(("load", array.name) for array in inputs if isinstance(array, Traced))
        return getattr(ufunc, method)(*map(np.asarray, inputs), **keywords)

    def __array_function__(self, function: Any, types: Any, inputs: Any, keywords: Any) -> Any:
        assert function is np.concatenate
        self.notes.extend(("load", array.name) for array in inputs[0] if isinstance(array, Traced))
        return function(list(map(np.asarray, inputs[0])), *inputs[1:], **keywords)


class Rule:
    """What a number covers, and whether its data are overwritten while readers look (a ring)."""

    def __init__(self, number: str, covers: str, ring: bool = False) -> None:
        self.number, self.covers, self.ring = number, re.compile(covers), ring

    def broken(self, trace: list[Operation]) -> list[tuple[Operation, Operation]]:
        """Pairs of operations of which the second must come after the first, with no barrier between them."""
        found, since_barrier = [], list[Operation]()
        for operation in trace:
            if operation[0] == "barrier":
                since_barrier.clear()
                continue
            found += [(earlier, operation) for earlier in since_barrier if self._must_follow(earlier, operation)]
            since_barrier.append(operation)
        return found

    def _must_follow(self, first: Operation, second: Operation) -> bool:
        numbers = [operation[1] == self.number for operation in (first, second)]
        covered = [self.covers.fullmatch(operation[1]) is not None for operation in (first, second)]
        if first[0] != second[0]:
            return False
        if first[0] == "store":  # the data, then the number; in a ring also the number, then what it lets go
            return (covered[0] and numbers[1]) or (self.ring and numbers[0] and covered[1])
        return (numbers[0] and covered[1]) or (self.ring and covered[0] and numbers[1])


RULES = [
    Rule("slot/request_id", "slot/(images|sac_image|state|task_index|standard_normal|request_ns)"),
    Rule("slot/response_id", "slot/(action_chunk|noise|policy_version)"),
    Rule("replay/head", "replay/(?!head).*", ring=True),
    Rule("assignment/given", "assignment/(episode|film)"),
    Rule("span/learner_count", "span/learner", ring=True),
    Rule("actor/episodes", "actor/episode_(return|len|success)"),
    Rule("learner/metrics_update", "learner/metrics"),
    Rule("control/stop", "replay/.*"),
    Rule("control/snapshots", "control/evaluation_decisions"),
    Rule("control/evaluation", "control/evaluation_(decisions|mode)"),
]


def broken(trace: list[Operation]) -> list[tuple[Operation, Operation]]:
    return [pair for rule in RULES for pair in rule.broken(trace)]


IMAGE, STATE = np.zeros((64, 64, 3), np.uint8), np.zeros(8, np.float32)
ZERO = np.array([0])


def ask_and_answer(arena: Arena) -> None:
    slots = Slots(arena)
    slots.images[0], slots.state[0], slots.task_index[0] = 1, 2.0, 3
    number = slots.request(0, 1, 1)
    assert slots.ready().tolist() == [0]
    assert slots.numbers(ZERO) == number
    assert slots.state[0, 0] == 2.0
    slots.answer(ZERO, np.array([number]), np.ones((1, 10, 7), np.float32), np.ones((1, 32), np.float32), 5)
    assert slots.answered(0, number)
    assert slots.action_chunk[0, 0, 0] == 1.0


def write_rows(arena: Arena) -> None:
    ring = ReplayRing(arena)
    ring.begin_episode(0, IMAGE, STATE)
    for _ in range(3):
        ring.append(0, np.zeros(32, np.float32), 1.0, 10, False, 7, IMAGE, STATE)
    ring.begin_episode(0, IMAGE, STATE)


def read_rows(arena: Arena) -> None:
    ring = ReplayRing(arena)
    assert ring.heads()[0] == 5
    ring.rows["reward"][0, 1]
    assert ring.size() == 3
    assert len(ring.export_lane(0)["reward"]) == 5


def restore_rows(arena: Arena) -> None:
    ring = ReplayRing(arena)
    ring.import_rows(0, {name: np.asarray(rows)[1, :4] for name, rows in ring.rows.items()})


def give_episodes(arena: Arena) -> None:
    assignments, fd = Assignments(arena), events.create()
    assignments.give(0, 17, film=True)
    episodes = assignments.take(0, fd, [fd])
    assert next(episodes) == 17
    assert assignments.film[0]
    assignments.give(0, NONE_LEFT)
    assert list(episodes) == []
    events.close([fd])


def note_spans(arena: Arena) -> None:
    spans = Spans(arena, "learner")
    for number in range(3):
        spans.add(1, number, number + 1)
    assert len(newest_spans(arena, "learner")) == 3


def end_episodes(arena: Arena) -> None:
    counters = Counters(arena)
    counters.end_episode(0, 3.0, 20, True)
    assert counters.ended_episodes(0) == 1
    assert counters.actor_episode_len[0, 0] == 20
    counters.note_metrics(np.ones(3, np.float32), 10)
    counters.snapshot()


def stop(arena: Arena) -> None:
    counters, ring = Counters(arena), ReplayRing(arena)
    ring.begin_episode(0, IMAGE, STATE)
    counters.stop = Stop.EVERYONE
    assert counters.stop is Stop.EVERYONE
    assert ring.rows["complete"][0, 0]


def evaluate(arena: Arena) -> None:
    counters = Counters(arena)
    asked = counters.ask_snapshot(1650)
    assert counters.asked_snapshot(seen=0) == (asked, 1650)
    assert counters.asked_snapshot(seen=asked) is None
    begun = counters.begin_evaluation(1650, NoiseMode.SNAPSHOT_STOCHASTIC)
    assert counters.begun_evaluation(seen=0) == (begun, 1650, NoiseMode.SNAPSHOT_STOCHASTIC)
    assert counters.begun_evaluation(seen=begun) is None


SCENES = (ask_and_answer, write_rows, read_rows, restore_rows, give_episodes, note_spans, end_episodes, stop, evaluate)


NOT_NEEDED: dict[Callable[[Arena], None], list[int]] = {write_rows: [0], read_rows: [0, 7], note_spans: [0], stop: [0]}
"""Scene -> its barriers that no rule asks for: nothing was written or read before them, or nothing is after them."""


def traced(memory: Arena) -> tuple[Arena, list[Operation]]:
    """An arena like `memory`, with everything else that is ever shared, whose arrays note in one list."""
    arena, trace = Arena.create({**memory.fields, **assignment_fields(2), **span_fields(2)}), list[Operation]()
    for name, array in arena._arrays.items():
        view = array.view(Traced)
        view.name, view.notes = name, trace
        arena._arrays[name] = view
    return arena, trace


def play(
    scene: Callable[[Arena], None], memory: Arena, monkeypatch: pytest.MonkeyPatch, left_out: int = -1
) -> list[Operation]:
    """The operations of a scene, without the barrier of number `left_out`."""
    arena, trace = traced(memory)
    write_rows(arena)  # so that there is something to read
    trace.clear()
    barriers = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(order, "barrier", lambda: trace.append(("barrier", "")) if next(barriers) != left_out else None)
        scene(arena)
    return trace


@pytest.mark.parametrize("scene", SCENES)
def test_a_barrier_stands_between_every_number_and_what_it_covers(
    scene: Callable[[Arena], None], memory: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = play(scene, memory, monkeypatch)
    assert broken(trace) == []
    assert any(operation == ("barrier", "") for operation in trace)


def test_every_rule_meets_its_number_and_its_data_in_some_scene(memory: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    traces = [play(scene, memory, monkeypatch) for scene in SCENES]
    for rule in RULES:
        for kind in ("load", "store"):
            seen = {name for trace in traces for what, name in trace if what == kind}
            assert rule.number in seen, (rule.number, kind)
            assert any(rule.covers.fullmatch(name) for name in seen), (rule.number, kind)


@pytest.mark.parametrize("scene", SCENES)
def test_no_barrier_can_be_left_out(
    scene: Callable[[Arena], None], memory: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    barriers = sum(operation == ("barrier", "") for operation in play(scene, memory, monkeypatch))
    missed = [number for number in range(barriers) if not broken(play(scene, memory, monkeypatch, number))]
    assert missed == NOT_NEEDED.get(scene, [])


NUMBERS = (
    *("request_id", "response_id", "head", "given", "learner_metrics_update", "actor_episodes", "control_stop"),
    *("control_snapshots", "learner_snapshots", "control_evaluation"),
)
"""Attributes of the shared memory's classes that publish something."""
READ_ELSEWHERE = {
    "run/worker/pool.py: request_id": "whether all have asked; it reads nothing of what they asked",
    "run/inference/server.py: request_id": "how many decisions are being executed",
    "run/inference/server.py: response_id": "how many decisions are being executed",
    "run/supervisor/workers.py: actor_episodes": "whether a worker got anywhere",
    "run/learner/learner.py: learner_snapshots": "its own, or that of a predecessor that is dead",
    "evaluate/play.py: given": "written by the process itself",
    "evaluate/play.py: actor_episodes": "after `ended_episodes`",
    "plan/measure.py: actor_episodes": "one process",
    "plan/measure.py: head": "one process",
    "bench/groups.py: head": "written by the process itself, of rows that are all there",
    "groups/downlink.py: head": "written by the process itself",
    "groups/reports.py: actor_episodes": "read before the outcomes and written behind them, with barriers",
    "run/inversion/rows.py: head": "one process",
    "pretraining/training.py: head": "of a network",
}


def test_numbers_are_read_and_written_where_the_barriers_are() -> None:
    found = set()
    package = ROOT / "dsrl_async"
    for path in package.rglob("*.py"):
        if "shm" not in path.relative_to(package).parts:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr in NUMBERS:
                    found.add(f"{path.relative_to(package)}: {node.attr}")
    assert found == set(READ_ELSEWHERE)


def test_x86_needs_no_instruction_and_arm_gets_the_fence_of_libatomic() -> None:
    assert order.barrier_of("x86_64") is order.barrier_of("AMD64")
    for machine in ("aarch64", "arm64", "riscv64"):
        fence: Any = order.barrier_of(machine)
        assert fence.func.__name__ == "atomic_thread_fence"
        assert fence.args == (order.SEQ_CST,)
        assert fence() is None


def test_arm_without_its_fence_is_refused_in_one_sentence_before_anything_starts(
    small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = preflight.check_run(small_config)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(order, "LIBRARY", "libatomic-that-is-not-there.so.1")
    monkeypatch.setattr(order, "barrier", order.barrier_of("aarch64"))
    with pytest.raises(ConfigError, match=r"aarch64.* may reorder .*; install it \(Debian and Ubuntu: libatomic1;"):
        preflight.check_memory(run)
    with pytest.raises(ValueError, match="may reorder"):
        Arena.create({"a": ((1,), "int64")})


def test_a_run_on_arm_says_that_it_has_not_been_tried_there(
    small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Run:
        def __init__(self, *arguments: object) -> None: ...

        def run(self) -> dict[str, str]:
            return {"exit_reason": "max_decisions", "updates": ""}

    monkeypatch.setattr(launch, "Supervisor", Run)
    (tmp_path / "logs").mkdir()
    (tmp_path / "checkpoints").mkdir()
    checked = preflight.check_run(small_config)
    for machine, times in (("x86_64", 0), ("aarch64", 1)):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        with caplog.at_level(logging.WARNING):
            launch.run(checked, tmp_path, StopRequest())
        assert caplog.text.count("dsrl_async has not been tried on aarch64 yet") == times
