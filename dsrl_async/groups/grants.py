"""How many decisions a group may hand out: the replay ratio over groups that are told of it late, and room for rows.

Pure functions of counters. A grant is no lease: a group that is dead, slow or cut off keeps nothing from the others,
and a message that is lost or late does no harm. Two promises hold whatever happens:

* a group whose rows have arrived may hand out a decision of each of its lanes when no update is due;
* no more than twice the lead of `replay_ratio.decisions_allowed` is ever handed out ahead of the learner. It is twice,
  because a grant under way is older than the figures that the next one is made of.
"""

from __future__ import annotations

import math

from dsrl_async.run.replay_ratio import decisions_allowed


def slack(decisions: int, updates: int, ratio: float, warmup: int, tolerance: float, lanes: int) -> int:
    """Decisions that all groups together may have handed out beyond the `decisions` that have arrived.

    The arguments are those of `decisions_allowed`, `lanes` being all there are. It is never more than the lead: in the
    warm-up, too, a group that has been given its share of it may be late.
    """
    lead = decisions_allowed(updates, ratio, 0, tolerance, lanes) - math.floor(updates / ratio)
    return max(0, min(decisions_allowed(updates, ratio, warmup, tolerance, lanes) - decisions, lead))


def grant(arrived: int, lanes: int, slack: int, all_lanes: int) -> int:
    """Decisions that a group with `lanes` of `all_lanes` may have handed out, `arrived` of which have arrived."""
    return arrived + slack * lanes // all_lanes


def room(decisions: int, unstored: int, rows_per_lane: int) -> int:
    """Decisions that a group may have handed out, so that no row is overwritten before the learner's machine has it.

    `decisions` are completed, and no lane has more than `unstored` rows that are not stored over there. All further
    decisions may be of one lane, and each can bring the first row of another episode with its own. A quarter of the
    rows is left to the episodes that a worker's successors begin.
    """
    return decisions + max(0, rows_per_lane - rows_per_lane // 4 - unstored) // 2


def least_rows(lanes: int) -> int:
    """Rows that each lane of a group needs, so that `room` always lets all of them take a decision in the end."""
    return 3 * lanes + 8
