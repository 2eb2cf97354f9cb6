"""What a decision is worth to the agent."""

from __future__ import annotations

import math

from dsrl_async.envs.protocol import ChunkOutcome


def decision_reward(outcome: ChunkOutcome, reward_rule: str, use_step_penalty: bool) -> float:
    """Return the reward of a decision: -1, or 0 if it succeeds; without the step penalty 0, or 1 if it succeeds.

    By the `reward_rule` `chunk_success` a decision succeeds if any of its steps does, else only if its first step does.
    """
    success = outcome.success_step >= 0 if reward_rule == "chunk_success" else outcome.success_step == 0
    return float(success) - float(use_step_penalty)


def environment_reward(outcome: ChunkOutcome, step_discount: float) -> float:
    """Return the environment's own rewards of a decision: the sum over its steps k of step_discount^k reward_k.

    Raises ValueError if one of them is not finite.
    """
    if not outcome.rewards:
        return step_discount**outcome.success_step if outcome.success_step >= 0 else 0.0
    total = float(sum(step_discount**step * reward for step, reward in enumerate(outcome.rewards)))
    if not math.isfinite(total):
        raise ValueError(f"the environment's rewards must be finite numbers, not {list(outcome.rewards)}")
    return total
