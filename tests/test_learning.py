"""The promise of the README, in small: the base policy succeeds now and then, the steered one nearly always."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.commands import call
from support.launched import Launched


def evaluate(*arguments: str) -> dict[str, Any]:
    return call("evaluate", "--seed", "77", *arguments).result


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_default_run_learns_to_steer_from_the_image(tmp_path: Path) -> None:
    base = evaluate("--episodes", "60")
    assert 0.15 <= base["success_rate"] <= 0.60
    run = Launched(tmp_path / "run", "--stop-at-success", "0.85", "--max-minutes", "10", "--log.console", "off")
    result = run.finish(timeout_s=720)
    assert result["exit_reason"] == "stop_at_success", result
    assert result["replay_ratio"] == pytest.approx(1.0, rel=0.05)
    steered = evaluate("--episodes", "80", "--checkpoint", str(run.run_dir))
    assert steered["success_rate"] >= 0.75
    assert steered["ci95_low"] > base["ci95_high"]
