"""The study of the update order: which runs it makes, and what it says of those that do not get there."""

from __future__ import annotations

import math
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
from support.paths import SCRIPTS

from dsrl_async.config.command_line import load_config


@pytest.fixture(scope="module")
def study() -> Any:
    loader = SourceFileLoader("compare_update_order", str(SCRIPTS / "studies" / "compare_update_order.py"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_table_has_every_order_and_number_of_actors(
    study: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def measure(
        system: str, options: list[str], seed: int, run_dir: Path, success: float, stop: Any
    ) -> dict[str, float]:
        config = load_config(options)
        assert (system, config.stop_at_success, success, run_dir.exists()) == ("serial", 0.8, 0.8, False)
        seen.append((config.actors, config.sac.critic_in_actor_loss, seed))
        reached = math.inf if seed == 1 and config.actors == 1 else 100.0 * config.actors + seed
        return {"decisions_to_success": reached, "seconds_to_success": reached / 10}

    monkeypatch.setattr(study, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["x", "--actors", "1", "4", "--seeds", "2", "--success", "0.8"])
    study.main()
    assert seen == [(actors, order, seed) for actors in (1, 4) for order in ("before", "after") for seed in (0, 1)]
    one, many = capsys.readouterr().out.splitlines()[2:][1::2]
    assert one == "| 1 | after | never (100, never) | never (10, never) |"
    assert many == "| 4 | after | 401 (400, 401) | 40 (40, 40) |"
