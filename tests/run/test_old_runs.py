"""Run directories of earlier versions, which every later one resumes and evaluates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.commands import call
from support.launched import Launched, checkpoint_of, state_of
from support.paths import FIXTURES

DECISIONS, UPDATES, EPISODES = 100, 84, 10
"""What the run had counted when it ended; all of its decisions are in its replay ring."""


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "run_beb78af", tmp_path / "run"))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", [[], ["--serial"]], ids=["asynchronous", "serial"])
def test_it_goes_on_where_it_was(old_run: Path, mode: list[str]) -> None:
    before = metrics(old_run)
    assert not (old_run / "made_with.json").exists()
    run = Launched(old_run, "--resume", str(old_run), "--max-decisions", "130", *mode)
    result = run.finish()
    assert result["returncode"] == 0, result["stderr"]
    assert (result["exit_reason"], result["decisions"]) == ("max_decisions", 130)
    assert result["episodes"] >= EPISODES + 2
    assert UPDATES + 20 <= result["updates"] <= 130 - 16  # one for each decision after the warm-up
    log = (old_run / "logs" / "supervisor.log").read_text()
    assert "with which policy the run was made was not recorded; it goes on with" in log
    assert "resumed with changes: " in log
    assert "max_decisions 100 -> 130" in log
    assert json.loads((old_run / "made_with.json").read_text())["policy"].keys() >= {
        "weights",
        "norm_stats",
        "tokenizer",
    }
    lines = metrics(old_run)
    assert [line["decisions"] for line in lines] == sorted(line["decisions"] for line in lines)
    assert lines[: len(before)] == before
    resumed = lines[len(before) :]
    assert resumed
    assert min(line["replay_size"] for line in resumed) >= DECISIONS
    assert min(line["updates"] for line in resumed) >= UPDATES
    assert sum(state_of(old_run)["counters"]["actor_decisions"]) == 130
    assert len(list((checkpoint_of(old_run) / "replay").iterdir())) == 2


@pytest.mark.parametrize("options", [[], ["--base"]], ids=["steered", "base"])
def test_it_is_evaluated(old_run: Path, options: list[str]) -> None:
    arguments = ["--checkpoint", str(old_run), "--episodes", "2", "--processes", "1", "--env.max-episode-steps", "20"]
    result = call("evaluate", *arguments, *options).result
    assert result["episodes"] == 2
    assert result["policy"] == ("base" if options else str(checkpoint_of(old_run)))
