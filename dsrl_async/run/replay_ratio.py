"""The ratio of learning to acting, as two pure functions over the same two counters.

`replay_ratio` is gradient updates per decision, counted from the end of the warm-up. The learner asks
`updates_due`, the inference process asks `decisions_allowed`. Both see the same counters and the learner is due
whenever the environment workers must wait, so they cannot wait for each other.
"""

from __future__ import annotations

import math


def updates_due(decisions: int, updates: int, ratio: float, warmup: int) -> int:
    """How many gradient updates the learner may do now; 0 when it is level with or ahead of the workers."""
    return max(0, math.floor((decisions - warmup) * ratio) - updates)


def decisions_allowed(updates: int, ratio: float, warmup: int, tolerance: float, round_size: int) -> int:
    """Total decisions that may have been handed out when `updates` have been done.

    The workers may lead by the tolerance, and always by one round (a decision of each of `round_size` workers) plus
    what makes an update due: even if a whole round is lost with its workers, the learner has work when they wait.
    """
    lead = max(tolerance * updates / ratio, round_size + math.ceil(1 / ratio) + 1)
    return warmup + math.floor(updates / ratio + lead)
