"""The stream of rows from groups to the learner's ring: exactly once and in order, whatever the network loses, repeats
or rearranges, whoever is fenced, and wherever the downlink is killed.

Uplink and downlink are called in this process; the network is a list.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest
from support.mirrors import KINDS, TASKS, Player, assert_mirrored, make_arena

from dsrl_async.config.load import validate
from dsrl_async.groups import downlink as downlink_module
from dsrl_async.groups import reports, uplink, wire
from dsrl_async.groups.downlink import Downlink
from dsrl_async.groups.uplink import Refused, Uplink
from dsrl_async.shm import replay as replay_module
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters, Stop
from dsrl_async.shm.replay import ReplayRing

LANES, ROWS = 2, 32  # of a group
CONFIG = validate({"throttle_actors": False})


class Member:
    """An incarnation of a group, with its workers and its uplink."""

    def __init__(self, group: int, incarnation: int, of_learner: Arena, seed: int, kind: str = "sac") -> None:
        self.group, self.name = group, wire.identity(group, incarnation)
        counters, arena = Counters(of_learner), make_arena(LANES, ROWS, kind)
        groups = len(counters.group_started)
        counters.group_started[group] = incarnation
        plain = reports.counters_for(counters, group, groups)
        self.arena, self.ring, self.counters = arena, ReplayRing(arena), Counters(arena)
        reports.begin_with(self.counters, plain)
        self.before = sum(plain["actor_decisions"])
        self.players = [Player(arena, lane, seed + lane) for lane in range(LANES)]
        self.base = ReplayRing(of_learner).head[self.lanes].copy()
        self.restart()

    def restart(self) -> None:
        self.uplink = Uplink(self.arena, self.before, window_rows=16)

    @property
    def lanes(self) -> slice:
        return slice(self.group * LANES, (self.group + 1) * LANES)

    def play(self, rng: np.random.Generator) -> None:
        """Take some decisions, as far as there is room."""
        player = self.players[int(rng.integers(LANES))]
        unstored = int((self.ring.head - self.uplink.stored).max())
        if unstored < ROWS // 2:
            player.begin() if rng.random() < 0.05 else player.play(int(rng.integers(1, 4)))

    def messages(self) -> Iterator[list[bytes]]:
        """What its uplink sends now."""
        yield [wire.HELLO, self.uplink.hello()]
        if (rows := self.uplink.next_rows()) is not None:
            self.uplink.confirm(rows)
            yield [wire.ROWS, rows.tobytes()]
        yield [wire.REPORT, self.uplink.report()]


def make_learner(groups: int = 2, kind: str = "sac") -> tuple[Arena, Downlink]:
    arena = make_arena(groups * LANES, 3 * ROWS, kind, groups)
    return arena, Downlink(CONFIG, arena, groups, TASKS)


def check(learner: Arena, member: Member) -> None:
    """All that the member has played is in the learner's ring and counters, once."""
    ring, counters = ReplayRing(learner), Counters(learner)
    for lane in range(LANES):
        other = member.lanes.start + lane
        assert_mirrored(member.ring, lane, ring, other, int(member.base[lane]))
        for name in ("decisions", "env_steps", "started_episodes", "episodes", "successes"):
            mine, theirs = getattr(member.counters, f"actor_{name}")[lane], getattr(counters, f"actor_{name}")[other]
            assert mine == theirs, name
        ended = np.arange(max(0, int(counters.actor_episodes[other]) - 5), int(counters.actor_episodes[other])) % 64
        ended = ended[-min(5, member.players[lane].ended) :] if member.players[lane].ended else ended[:0]
        for name in reports.EPISODE_COLUMNS:
            assert (getattr(member.counters, name)[lane, ended] == getattr(counters, name)[other, ended]).all()


def settle(learner: Downlink, member: Member) -> None:
    """Exchange messages, none of which is lost, until all is stored."""
    for _ in range(100):
        for message in member.messages():
            if (answer := learner.take(member.name, message)) is not None:
                member.uplink.take(list(answer))
        tell(learner, member)
        member.uplink._moved = min(member.uplink._moved, 0.0)  # what is under way is lost
        if member.uplink.drained():
            return
    raise AssertionError("not all was stored")


def tell(learner: Downlink, member: Member) -> None:
    for group in learner.groups:
        group.told_at = 0.0
    for name, state in learner.states():
        if name == member.name:
            member.uplink.take([wire.STATE, state])


def run_schedule(seed: int, kind: str = "sac", make: Callable[..., Downlink] = Downlink) -> None:
    """Let two groups, whose incarnations die, and a lossy network act in random order."""
    rng, groups = np.random.default_rng(seed), 2
    learner_arena = make_learner(groups, kind)[0]
    learner = make(CONFIG, learner_arena, groups, TASKS)
    members = [Member(group, 1, learner_arena, seed, kind) for group in range(groups)]
    old: list[Member] = []
    network: list[tuple[Member, list[bytes]]] = []
    loss, repetition, disorder = rng.random(3) * (0.4, 0.3, 0.5)
    for step in range(60):
        member = members[int(rng.integers(groups))]
        for _ in range(2):
            member.play(rng)
        for sender in (member, *old):
            for message in sender.messages():
                if rng.random() >= loss:
                    network.append((sender, message))
                if rng.random() < repetition:
                    network.append((sender, message))
        if rng.random() < disorder:
            rng.shuffle(network)
        for sender, message in network[:8]:
            answer = learner.take(sender.name, message)
            if sender in old:
                assert answer == (wire.FENCED,)
        network = network[8:] if rng.random() < 0.9 else []
        if rng.random() >= loss:
            tell(learner, member)
        if rng.random() < 0.3:
            member.uplink._moved = 0.0  # time passes
        if rng.random() < 0.03:
            learner = make(CONFIG, learner_arena, groups, TASKS)  # the downlink was replaced
        if rng.random() < 0.03:
            member.restart()
        if step in (20, 40):
            settle_counts(learner_arena)
            old.append(member)
            members[member.group] = Member(member.group, step, learner_arena, seed + step, kind)
    for member in members:
        settle(learner, member)
        check(learner_arena, member)
    for member in old:
        for message in member.messages():
            assert learner.take(member.name, message) == (wire.FENCED,)
        member.uplink.take([wire.FENCED])
        assert member.uplink.fenced
        assert member.uplink.stop


def settle_counts(arena: Arena) -> None:
    """What the learner's machine counts is what its ring holds, while nothing was overwritten."""
    counters, ring = Counters(arena), ReplayRing(arena)
    for lane in range(ring.lanes):
        head = int(ring.head[lane])
        if head <= ring.rows_per_lane:
            assert int(ring.rows["complete"][lane, :head].sum()) == counters.actor_decisions[lane]
            complete = ring.rows["complete"][lane, :head]
            assert ring.rows["steps"][lane, :head][complete].sum() == counters.actor_env_steps[lane]


SCHEDULES = int(os.environ.get("DSRL_STREAM_SCHEDULES", "60"))


@pytest.mark.parametrize("kind", KINDS)
def test_lanes_are_mirrored_under_any_schedule(kind: str) -> None:
    for seed in range(SCHEDULES // len(KINDS)):
        run_schedule(seed, kind)


class TakesAnyRow(Downlink):
    def _store(self, group: downlink_module.Group, rows: np.ndarray) -> None:
        for row in rows:
            wire.replay(self.ring, group.lanes.start + int(row["lane"]), row)


class TakesLaterRows(Downlink):
    def _store(self, group: downlink_module.Group, rows: np.ndarray) -> None:
        taken = rows.copy()
        for index, lane in enumerate(taken["lane"].tolist()):
            due = int(
                self.ring.head[group.lanes.start + lane] - self.counters.group_base_head[group.lanes.start + lane]
            )
            taken["number"][index] = max(due, int(taken["number"][index]))
            super()._store(group, taken[index : index + 1])


class HearsOldIncarnations(Downlink):
    def _take(self, name: bytes, frames: list[bytes]) -> tuple[bytes, ...] | None:
        self.counters.group_started[wire.sender(name)[0]] = wire.sender(name)[1]
        return super()._take(name, frames)


class ForgetsItsBase(Downlink):
    def _begin(self, group: downlink_module.Group, incarnation: int) -> None:
        self.counters.group_incarnation[group.number] = incarnation


class CountsBesides(Downlink):
    def _intend(self, lane: int, row: np.void) -> None:
        super()._intend(lane, row)
        self.counters.group_intent[lane, 0] += row["number"] % 7 == 3


@pytest.mark.parametrize("planted", [TakesAnyRow, TakesLaterRows, HearsOldIncarnations, ForgetsItsBase, CountsBesides])
def test_another_downlink_is_found_out(planted: type[Downlink]) -> None:
    def all_schedules() -> None:
        for seed in range(20):
            run_schedule(seed, make=planted)

    with pytest.raises(AssertionError):
        all_schedules()


# ---- killed anywhere


class Killed(BaseException):
    """In place of a SIGKILL: no code of the downlink sees it."""


OWN_CODE = {module.__file__ for module in (downlink_module, replay_module, reports, wire)}


def killed_after(instructions: int, action: Callable[[], object]) -> bool:
    """Whether `action` was killed, before so many instructions of Python's own in the code that writes the memory."""
    left = instructions

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in OWN_CODE:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            left -= 1
            if left < 0:
                raise Killed
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except Killed:
        return True
    finally:
        sys.settrace(before)
    return False


def kill_at(instructions: int) -> bool:
    """Whether a downlink that is killed after so many instructions got to the end of its work before that."""
    arena, learner = make_learner(groups=1)
    first = Member(0, 1, arena, seed=5)
    first.players[0].play(4)
    settle(learner, first)
    first.players[1].play(2)
    member = Member(0, 2, arena, seed=9)  # from here on the first one is fenced
    for player in member.players:
        player.play(6)
    messages = [*member.messages()]
    member.uplink.take([wire.STATE, wire.State(0, 0, 0, 0, 0, np.zeros(LANES, np.int64)).encode()])
    messages += [*member.messages()]

    def work() -> None:
        for message in messages:
            learner.take(member.name, message)
        learner.take(first.name, [wire.ROWS, messages[-2][1]])

    killed = killed_after(instructions, work)
    successor = Downlink(CONFIG, arena, 1, TASKS)
    for message in first.messages():
        assert successor.take(first.name, message) == (wire.FENCED,)
    member.restart()
    settle(successor, member)
    check(arena, member)
    settle_counts(arena)
    return not killed


def test_a_downlink_that_is_killed_anywhere_stores_nothing_twice_and_counts_nothing_wrong() -> None:
    step = int(os.environ.get("DSRL_KILL_STEP", "61"))
    for instructions in range(0, 10**6, step):
        if kill_at(instructions):
            break
    assert instructions > 5000


@pytest.mark.parametrize(
    ("module", "name"), [(Downlink, "_intend"), (Downlink, "_begin")], ids=["counts first", "incarnation first"]
)
def test_another_order_of_writing_is_found_out(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def count_first(self: Downlink, lane: int, row: np.void) -> None:
        self.counters.actor_decisions[lane] += row["completes"]
        self.counters.actor_env_steps[lane] += row["steps"] * row["completes"]

    def incarnation_first(self: Downlink, group: downlink_module.Group, incarnation: int) -> None:
        self.counters.group_incarnation[group.number] = incarnation
        self.counters.group_base_head[group.lanes] = self.ring.head[group.lanes]
        self.counters.group_base_decisions[group.number] = self.counters.actor_decisions[group.lanes].sum()

    monkeypatch.setattr(module, name, count_first if name == "_intend" else incarnation_first)
    monkeypatch.setitem(globals(), "OWN_CODE", OWN_CODE | {__file__})

    def everywhere() -> None:
        for instructions in range(0, 8000, 37):
            kill_at(instructions)

    with pytest.raises(AssertionError):
        everywhere()


# ---- grants, warm-up and the end, as a group sees them


def test_a_group_gets_its_share_of_the_warm_up_and_its_successor_goes_on_from_the_learners_counts() -> None:
    arena, learner = make_learner()
    learner.config = validate({"replay": {"warmup_decisions": 400}})
    member, counters = Member(0, 1, arena, 1), Counters(arena)
    member.counters.control_granted[0] = -1
    settle(learner, member)
    assert member.counters.control_warmup[0] == 200
    assert member.counters.control_granted[0] == (4 + 1 + 1) // 2  # a lead of one round, and what makes an update due
    for player in member.players:
        player.play(30)
        settle(learner, member)
    taken = int(counters.actor_decisions.sum())
    assert member.counters.control_granted[0] == taken + 3
    assert member.counters.control_warmup[0] == taken + (400 - taken) // 2
    counters.learner_updates[0] = 7
    counters.actor_decisions[2] = 1000  # of the other group
    successor = Member(0, 2, arena, 2)
    successor.counters.control_granted[0] = -1
    assert successor.before == taken
    settle(learner, successor)
    assert successor.counters.learner_updates[0] == 7
    assert successor.counters.control_warmup[0] == taken  # none is left
    assert successor.counters.control_granted[0] == taken


def test_a_grant_is_limited_by_the_room_for_rows_and_never_0_nor_taken_back() -> None:
    arena, learner = make_learner(groups=1)
    member = Member(0, 1, arena, 1)
    member.counters.control_granted[0] = -1
    settle(learner, member)
    granted = int(member.counters.control_granted[0])
    assert granted == (ROWS - ROWS // 4) // 2
    member.players[0].play(8)
    tell(learner, member)
    assert member.counters.control_granted[0] == member.counters.decisions() + granted - 8 // 2
    before = int(member.counters.control_granted[0])
    member.players[0].begin()  # a worker's successor has a row that nobody granted
    member.players[0].begin()
    tell(learner, member)
    assert member.counters.control_granted[0] == before
    settle(learner, member)
    assert member.counters.control_granted[0] == member.counters.decisions() + granted
    fresh = Member(0, 2, make_learner(groups=1)[0], 1)
    fresh.counters.control_granted[0] = -1
    fresh.uplink.take([wire.STATE, wire.State(0, 0, 0, 0, 0, np.zeros(LANES, np.int64)).encode()])
    assert fresh.counters.control_granted[0] == -1


def test_the_end_of_the_run_reaches_the_group() -> None:
    arena, learner = make_learner(groups=1)
    member = Member(0, 1, arena, 1)
    settle(learner, member)
    assert not member.uplink.stop
    Counters(arena).stop = Stop.WORKERS
    tell(learner, member)
    assert member.uplink.stop
    assert not member.uplink.fenced


def test_the_last_report_of_a_group_is_waited_for_whoever_made_others_before() -> None:
    arena, learner = make_learner(groups=1)
    member = Member(0, 1, arena, 1)
    for _ in range(3):
        settle(learner, member)
    member.restart()
    learner.take(member.name, [wire.HELLO, member.uplink.hello()])
    tell(learner, member)
    assert member.uplink.linked
    assert not member.uplink.drained()  # the reports were its predecessor's
    settle(learner, member)
    assert member.uplink.drained()
    member.counters.end_episode(0, 1.0, 5, True)
    member.uplink.finish()
    assert not member.uplink.drained()  # the reports were made before the end
    settle(learner, member)
    assert Counters(arena).actor_episodes[0] == 1


def test_figures_of_groups_are_summed_and_a_successors_only_grow() -> None:
    arena, learner = make_learner()
    counters = Counters(arena)
    members = [Member(group, 1, arena, group) for group in range(2)]
    for member, batches in zip(members, (3, 5), strict=True):
        member.counters.inference_batches[0] = batches
        member.counters.inference_phase_s[:] = batches
        member.counters.inference_heartbeat_ns[0] = 1
        member.counters.inference_policy_version[0] = 10 * batches
        member.counters.actor_phase_s[:] = batches
        settle(learner, member)
    assert counters.inference_batches[0] == 8
    assert (counters.inference_phase_s == 8).all()
    assert counters.inference_policy_version[0] == 30
    assert counters.actor_phase_s[:, 0].tolist() == [3, 3, 5, 5]
    successor = Member(1, 2, arena, 9)
    settle(learner, successor)
    assert counters.inference_batches[0] == 8
    successor.counters.inference_batches[0] += 2
    settle(learner, successor)
    assert counters.inference_batches[0] == 10


# ---- those who do not belong


def test_whatever_comes_the_downlink_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    arena, learner = make_learner()
    member = Member(1, 1, arena, 1)
    member.players[0].play(5)
    settle(learner, member)
    good = [[wire.HELLO, member.uplink.hello()], [wire.REPORT, member.uplink.report()]]
    rng = np.random.default_rng(0)
    names = [member.name, b"", b"7.1", b"1.99", b"x" * 300]
    for _ in range(int(os.environ.get("DSRL_FUZZ_EXAMPLES", "50")) * 10):
        message = [bytes(frame) for frame in good[int(rng.integers(2))]]
        match int(rng.integers(4)):
            case 0:
                message[1] = rng.bytes(int(rng.integers(0, 3000)))
            case 1:
                message[0] = [wire.ROWS, wire.REPORT, b"", b"zz"][int(rng.integers(4))]
            case 2:
                message = [rng.bytes(int(rng.integers(0, 9))) for _ in range(int(rng.integers(0, 4)))]
            case 3 if len(message[1]) > 100:
                changed = bytearray(message[1])
                at = int(rng.integers(len(changed) // 8)) * 8
                changed[at : at + 8] = rng.bytes(8)
                message[1] = bytes(changed)
        before = Counters(arena).snapshot()
        name = names[int(rng.integers(len(names)))]
        learner.take(name, message)
        if name != member.name:
            after = Counters(arena).snapshot()
            assert all((before[key] == after[key]).all() for key in before)
        member.uplink.take(message)
    assert 3 <= caplog.text.count("it is dropped") <= 12  # one of each kind on both sides


@pytest.mark.parametrize("change", [{"task_index": TASKS}, {"policy_version": -(2**63)}])
def test_rows_that_would_be_read_from_where_nothing_is_are_not_stored(change: dict[str, int]) -> None:
    arena, learner = make_learner(kind="tasks")
    member = Member(1, 1, arena, 1, "tasks")
    settle(learner, member)
    head = ReplayRing(arena).head.copy()
    member.players[0].play(3)
    rows = member.uplink.next_rows()
    assert rows is not None
    for (name, value), row in zip(change.items(), rows[1:], strict=False):
        row[name] = value
    assert learner.take(member.name, [wire.ROWS, rows.tobytes()]) is None
    assert (ReplayRing(arena).head == head).all()


def test_a_group_of_another_version_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    arena, learner = make_learner()
    member = Member(1, 1, arena, 1)
    monkeypatch.setattr(uplink, "__version__", "9.9.9")
    answer = learner.take(member.name, [wire.HELLO, member.uplink.hello()])
    assert answer is not None
    with pytest.raises(
        Refused, match=r"group 1 runs dsrl_async '9.9.9' and .* install the same version on all machines"
    ):
        member.uplink.take(list(answer))
    assert Counters(arena).group_incarnation.tolist() == [0, 0]


def test_a_ring_that_is_too_short_is_refused_in_a_sentence() -> None:
    with pytest.raises(Refused, match="a group of 9 environments needs a ring of 35 rows for each, not of 32"):
        Uplink(make_arena(9, 32), 0, 16)
