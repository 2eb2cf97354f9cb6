"""What is said of episodes that were played to evaluate a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsrl_async.run.evaluation.files import Played


def wilson_interval(successes: int, episodes: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % confidence interval of a success rate (Wilson score; sensible also at 0 % and 100 %)."""
    rate = successes / episodes
    centre = (rate + z * z / (2 * episodes)) / (1 + z * z / episodes)
    half = z / (1 + z * z / episodes) * (rate * (1 - rate) / episodes + z * z / (4 * episodes**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def count_successes(successes: Sequence[bool]) -> dict[str, float]:
    """How many episodes there were, how many succeeded, and the success rate with its 95 % interval."""
    low, high = wilson_interval(sum(successes), len(successes))
    return {
        "episodes": len(successes),
        "successes": sum(successes),
        "success_rate": sum(successes) / len(successes),
        "ci95_low": low,
        "ci95_high": high,
    }


def summarise(played: Sequence[Played]) -> dict[str, Any]:
    """The figures of some episodes: counts, success rate with its interval, mean return and length (env steps)."""
    episodes = len(played)
    return {
        **count_successes([episode.success for episode in played]),
        "return": sum(episode.episode_return for episode in played) / episodes,
        "episode_len": sum(episode.steps for episode in played) / episodes,
    }
