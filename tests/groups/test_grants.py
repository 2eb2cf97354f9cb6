"""Grants: under any schedule of loss, delay and death, no group waits for good, and the lead is at most doubled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from dsrl_async.groups.grants import grant, least_rows, room, slack
from dsrl_async.run.replay_ratio import decisions_allowed, updates_due

WARMUP = 40


class Sight(NamedTuple):
    """What a grant is made of."""

    arrived: int
    """Decisions of this group's incarnation."""
    lanes: int
    all_arrived: int
    all_lanes: int
    allowed: int
    """By `decisions_allowed`."""
    slack: int


Grant = Callable[[Sight], int]


def by_the_rules(sight: Sight) -> int:
    return grant(sight.arrived, sight.lanes, sight.slack, sight.all_lanes)


class Stuck(AssertionError):
    """A group waits though nobody else can do anything."""


class Ahead(AssertionError):
    """Groups are further ahead of the learner than promised."""


class Case(NamedTuple):
    """What a schedule is made of."""

    lanes: list[int]
    """Of each group."""
    ratio: float
    tolerance: float
    learner: float
    """How often the learner has its turn."""
    loss: float
    """How often a message of grants is lost."""
    death: float
    skew: float
    """How seldom the later groups have their turns; 1: all alike."""
    seed: int


cases = st.builds(
    Case,
    lanes=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    ratio=st.floats(0.1, 20),
    tolerance=st.floats(0.001, 0.3),
    learner=st.floats(0.05, 0.95),
    loss=st.floats(0, 0.9),
    death=st.floats(0, 0.02),
    skew=st.floats(1, 8),
    seed=st.integers(0, 2**32 - 1),
)


class Group:
    """A group's incarnation: what it has handed out, and what of that has arrived, in decisions."""

    def __init__(self, lanes: int) -> None:
        self.lanes, self.handed_out, self.arrived, self.granted = lanes, 0, 0, -1
        self.under_way: list[int] = []  # grants


def play(case: Case, granting: Grant, events: int) -> int:
    """Let groups, network and learner act in random order; returns the decisions that arrived.

    Raises Stuck or Ahead where a promise is broken.
    """
    rng = np.random.default_rng(case.seed)
    groups, all_lanes = [Group(lanes) for lanes in case.lanes], sum(case.lanes)
    buried = updates = 0  # decisions of dead incarnations that arrived

    def arrived() -> int:
        return buried + sum(group.arrived for group in groups)

    def granted_now(group: Group) -> int:
        total, ratio = arrived(), (case.ratio, WARMUP, case.tolerance, all_lanes)
        allowed, spare = decisions_allowed(updates, *ratio), slack(total, updates, *ratio)
        return granting(Sight(group.arrived, group.lanes, total, all_lanes, allowed, spare))

    for draw, other in rng.random((events, 2)):
        group = groups[int(other**case.skew * len(groups))]
        kind = rng.integers(5)
        if draw < case.death:
            buried += group.arrived
            groups[groups.index(group)] = Group(group.lanes)
        elif kind == 0 and rng.random() < case.learner:
            updates += min(updates_due(arrived(), updates, case.ratio, WARMUP), int(rng.integers(1, 40)))
        elif kind == 1:
            if rng.random() >= case.loss:
                group.under_way.append(granted_now(group))
        elif kind == 2 and group.under_way:  # any of them comes next
            group.granted = max(group.granted, group.under_way.pop(int(rng.integers(len(group.under_way)))))
        elif kind == 3 and group.arrived < group.handed_out:
            group.arrived += int(rng.integers(1, group.handed_out - group.arrived + 1))
        else:
            wanted = int(rng.integers(1, group.lanes + 1))
            if group.handed_out + wanted <= group.granted:
                group.handed_out += wanted
        if group.arrived == group.handed_out and updates_due(arrived(), updates, case.ratio, WARMUP) == 0:
            may = max(group.granted, granted_now(group))
            if may < group.handed_out + group.lanes:
                raise Stuck(f"{group.handed_out} handed out, {may} granted, {group.lanes} lanes")
        lead = max(case.tolerance * updates / case.ratio, all_lanes + math.ceil(1 / case.ratio) + 1)
        ahead = buried + sum(group.handed_out for group in groups) - WARMUP - updates / case.ratio
        if ahead > 2 * lead:
            raise Ahead(f"{ahead} ahead, the lead is {lead}")
    return arrived()


@settings(max_examples=40, deadline=None, database=None)
@given(cases)
def test_no_group_waits_for_good_and_the_lead_is_at_most_doubled(case: Case) -> None:
    play(case, by_the_rules, 1000)


def test_groups_get_on() -> None:
    assert play(Case([4, 4], 1.0, 0.02, 0.9, 0.2, 0.001, 1.0, 0), by_the_rules, 5000) > 250


PLANTED: dict[str, tuple[Grant, type[AssertionError]]] = {
    "all for each": (lambda sight: sight.arrived + sight.slack, Ahead),
    "a share of its own": (lambda sight: sight.allowed * sight.lanes // sight.all_lanes, AssertionError),
    "one short": (lambda sight: by_the_rules(sight) - 2, Stuck),
    "less than a round": (lambda sight: by_the_rules(sight._replace(slack=max(0, sight.slack - 3))), Stuck),
    "the rows of others": (lambda sight: sight.allowed, Ahead),
    "the warm-up at once": (
        lambda sight: by_the_rules(sight._replace(slack=max(0, sight.allowed - sight.all_arrived))),
        Ahead,
    ),
}


def play_many(granting: Grant) -> None:
    for seed in range(100):
        ratio, tolerance, skew = (0.1, 1.0, 20.0)[seed % 3], (0.001, 0.1)[seed % 2], (1, 2, 4, 8)[seed // 2 % 4]
        play(Case([1, 6, 3][: 1 + seed % 3], ratio, tolerance, 0.5, 0.2, 0.002, skew, seed), granting, 1000)


@pytest.mark.parametrize("fault", PLANTED)
def test_another_rule_is_found_out(fault: str) -> None:
    granting, promise = PLANTED[fault]
    with pytest.raises(promise):
        play_many(granting)


# ---- room for rows

Room = Callable[[int, int, int], int]


def fill(lanes: int, favourite: float, seed: int, rule: Room) -> None:
    """Let workers, of which one may take nearly all, the network and the uplink act in random order."""
    rng = np.random.default_rng(seed)
    rows = least_rows(lanes)
    head, stored, executing = np.ones(lanes, np.int64), np.zeros(lanes, np.int64), np.zeros(lanes, bool)
    decisions = granted = begun_anew = 0
    for _ in range(800):
        lane = 0 if rng.random() < favourite else int(rng.integers(lanes))
        match rng.integers(5):
            case 0:
                granted = max(granted, rule(decisions, int((head - stored).max()), rows))
                if (head == stored).all():
                    assert granted >= decisions + lanes, "nobody may go on"
            case 1 if rng.random() < 0.3:
                stored[lane] += int(rng.integers(0, head[lane] - stored[lane] + 1))
            case 2 if begun_anew < rows // 4 - 2 and rng.random() < 0.1:  # a worker dies
                executing[lane] = False
                head[lane] += 1
                begun_anew += 1
            case _ if executing[lane]:
                executing[lane] = False
                head[lane] += 1 + (rng.random() < 0.5)
                decisions += 1
            case _ if decisions + executing.sum() + 1 <= granted:
                executing[lane] = True
        # What is sent next is row `stored`, with what came of the row before; one that is being written is lost.
        assert ((stored == 0) | (head + 1 - rows < stored)).all(), "overwritten"
        assert (head - stored < rows).all(), "overwritten"


rooms = given(lanes=st.integers(1, 12), favourite=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))


@settings(max_examples=30, deadline=None, database=None)
@rooms
@example(1, 1.0, 0)
def test_no_row_is_overwritten_before_it_is_stored(lanes: int, favourite: float, seed: int) -> None:
    fill(lanes, favourite, seed, room)


@pytest.mark.parametrize(
    "rule",
    [
        lambda decisions, unstored, rows: decisions + (rows - rows // 4) // 2,
        lambda decisions, unstored, rows: decisions + rows - rows // 4 - unstored,
        lambda decisions, unstored, rows: decisions + max(0, rows // 3 - unstored) // 2,
    ],
)
def test_another_rule_for_room_is_found_out(rule: Room) -> None:
    @settings(max_examples=300, deadline=None, database=None, phases=[Phase.generate])
    @rooms
    def search(lanes: int, favourite: float, seed: int) -> None:
        fill(lanes, favourite, seed, rule)

    with pytest.raises(AssertionError, match=r"overwritten|nobody"):
        search()


@given(lanes=st.integers(1, 200))
def test_the_least_rows_have_room_for_a_round(lanes: int) -> None:
    # A row of each lane is the first of its episode.
    assert room(0, 1, least_rows(lanes)) >= lanes
