"""The replay ratio's two functions: never ahead, never stuck, within tolerance."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsrl_async.run.replay_ratio import decisions_allowed, updates_due

ratios = st.floats(0.01, 50)


def test_hand_computed_values() -> None:
    assert updates_due(decisions=399, updates=0, ratio=1.0, warmup=400) == 0
    assert updates_due(decisions=410, updates=4, ratio=1.0, warmup=400) == 6
    assert updates_due(decisions=410, updates=4, ratio=0.5, warmup=400) == 1
    assert updates_due(decisions=410, updates=25, ratio=2.0, warmup=400) == 0
    assert decisions_allowed(updates=0, ratio=1.0, warmup=400, tolerance=0.02, round_size=16) == 418
    assert decisions_allowed(updates=10_000, ratio=1.0, warmup=400, tolerance=0.02, round_size=16) == 10_600


@given(ratio=ratios, warmup=st.integers(1, 1000), updates=st.integers(0, 10**6), tolerance=st.floats(0.001, 0.5))
def test_learner_is_due_whenever_the_actors_must_wait(
    ratio: float, warmup: int, updates: int, tolerance: float
) -> None:
    actors = 16
    allowed = decisions_allowed(updates, ratio, warmup, tolerance, actors)
    # The worst case: a whole round has been handed out and died with its actors before it was completed.
    assert updates_due(allowed - actors, updates, ratio, warmup) >= 1


@given(ratio=ratios, actors=st.integers(1, 64), learner_speed=st.floats(0.05, 20), seed=st.integers(0, 99))
def test_any_relative_speed_ends_within_the_tolerance(
    ratio: float, actors: int, learner_speed: float, seed: int
) -> None:
    """Simulates both sides taking turns in random order, the learner `learner_speed` times as often."""
    rng, warmup, tolerance = np.random.default_rng(seed), 50, 0.02
    decisions, updates = 0, 0
    for learner_turn in rng.random(4000) < learner_speed / (1 + learner_speed):
        if learner_turn:
            updates += min(updates_due(decisions, updates, ratio, warmup), max(1, round(ratio)))
        else:
            allowed = decisions_allowed(updates, ratio, warmup, tolerance, actors)
            decisions += max(0, min(actors, allowed - decisions))
    target = max(0.0, (decisions - warmup) * ratio)
    assert updates <= target
    lead = max(tolerance * updates, (actors + 2) * ratio + 2)
    assert updates >= target - lead - 1


@given(decisions=st.integers(0, 10**6), saved=st.integers(0, 10**4))
def test_resuming_gives_no_burst(decisions: int, saved: int) -> None:
    """Counters come back as they were saved, so exactly what was due then is due again."""
    updates = max(0, decisions - 400 - saved)
    assert updates_due(decisions, updates, 1.0, 400) == min(saved, max(0, decisions - 400))
