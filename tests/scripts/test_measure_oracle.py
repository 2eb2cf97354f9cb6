"""The study of how far a frozen policy can be steered: its attempts, its figures, and the table made of them."""

from __future__ import annotations

import json
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.paths import SCRIPTS

from dsrl_async.config.settings import ConfigError
from dsrl_async.evaluate.resolve import resolve
from dsrl_async.run.evaluation.episodes import Episode
from dsrl_async.run.evaluation.results import wilson_interval


def load(path: Path) -> Any:
    loader = SourceFileLoader(path.stem, str(path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def study() -> Any:
    return load(SCRIPTS / "studies" / "measure_oracle.py")


@pytest.fixture(scope="module")
def player(study: Any) -> Any:
    return study.Player(resolve(study.parse(["--episodes", "1", "--env.max-episode-steps", "10"])))


def test_an_attempt_has_noise_of_its_own_on_the_same_scene(
    study: Any, player: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise, images = [], []
    observe = player.environment.observe

    def look(*arrays: Any) -> None:
        observe(*arrays)
        images.append(arrays[0].copy())

    monkeypatch.setattr(player.environment, "observe", look)
    first = []
    for scene, attempt in ((7, 0), (7, 1), (7, 0), (8, 0)):
        images.clear()
        player.play(study.Attempt("base", attempt, Episode(scene, 0, None)))
        noise.append(player.batch.noise.clone())
        first.append(images[0])
    assert (noise[0] == noise[2]).all(), "an attempt can be repeated"
    assert (noise[0] != noise[1]).all()
    assert (noise[0] != noise[3]).all()
    assert (first[0] == first[1]).all()
    assert (first[0] != first[3]).any()


def test_each_rule_draws_noise_as_it_says(study: Any, player: Any) -> None:
    noise = {}
    for rule in study.NOISE:
        player.play(study.Attempt(rule, 0, Episode(0, 0, None)))
        noise[rule] = player.batch.noise[0].numpy().copy()
    for rule in ("gaussian", "agent"):
        assert (noise[rule] == noise[rule][:1]).all(), "one vector in all slots"
    assert (noise["base"][0] != noise["base"][1]).all()
    magnitude = player.config.sac.action_magnitude
    assert magnitude / 2 < np.abs(noise["agent"]).max() <= magnitude < np.abs(noise["gaussian"]).max()


def outcome(study: Any, number: int, attempt: int, success: bool, task: int = 0, noise: str = "base") -> Any:
    return study.Outcome(noise, attempt, number, task, number, success, 10, 0.5)


def test_the_best_attempt_of_each_scene_counts(study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    successes = {(0, 0): True, (0, 1): False, (1, 0): False, (1, 1): False, (2, 0): True, (2, 1): True}
    played = [outcome(study, *scene, success, task=scene[0] // 2) for scene, success in successes.items()]
    result, _ = study.report([*played, outcome(study, 0, 0, True, noise="agent")], ["base", "agent"])
    assert [result["base"][of]["successes"] for of in ("attempts", "scenes")] == [3, 2]
    assert [result["base"][of]["number"] for of in ("attempts", "scenes")] == [6, 3]
    low, high = wilson_interval(1, 2)
    assert result["base"]["tasks"][0]["scenes"] == {
        **{"number": 2, "successes": 1, "rate": 0.5},
        **{"ci95_low": round(low, 4), "ci95_high": round(high, 4)},
    }

    table = load(SCRIPTS / "tabulate_evaluations.py")
    figures = {"episodes": 2, "successes": 1, "success_rate": 0.5, "ci95_low": 0.0945, "ci95_high": 0.9055}
    tasks = [{"task": task, "instruction": f"do {task}", **figures} for task in (0, 1)]
    (tmp_path / "seed-0.json").write_text(json.dumps({**figures, "tasks": tasks}))
    (tmp_path / "oracle.json").write_text(json.dumps(result))
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(tmp_path / "seed-0.json"), "--oracle", str(tmp_path / "oracle.json")]
        patch.setattr(sys, "argv", ["tabulate_evaluations.py", *paths])
        table.main()
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| task | seed-0 | oracle, noise base | oracle, noise agent |"
    assert rows[2] == "| 0, do 0 | 1 of 2 (9% to 91%) | 1 of 2 (9% to 91%) | 1 of 1 (21% to 100%) |"
    assert rows[3] == "| 1, do 1 | 1 of 2 (9% to 91%) | 1 of 1 (21% to 100%) |  |"
    assert rows[4].startswith("| all | **50.0%**, 1 of 2 (9% to 91%) | 2 of 3 (21% to 94%) |")


def test_it_goes_on_where_it_ended_with_the_same_settings_only(study: Any, tmp_path: Path) -> None:
    path = tmp_path / "oracle.jsonl"
    assert study.read_outcomes(path, {"seed": 0}) == []
    one = outcome(study, 4, 1, True)
    with path.open("a") as file:
        file.write(json.dumps(one._asdict()) + '\n{"noise": "base", "att')
    assert study.read_outcomes(path, {"seed": 0}) == [one]
    with path.open("a") as file:
        file.write(json.dumps(one._asdict()) + "\n")
    assert study.read_outcomes(path, {"seed": 0}) == [one, one]
    with pytest.raises(ConfigError, match="begun with other settings"):
        study.read_outcomes(path, {"seed": 1})
