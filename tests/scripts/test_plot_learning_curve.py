"""The picture of a run's learning curve."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.paths import FIXTURES, SCRIPTS

pytest.importorskip("matplotlib")


def plot(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "plot_learning_curve.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def write_run(directory: Path, decisions: Sequence[int]) -> None:
    """A run of which there were 50 episodes at each line of its metrics."""
    directory.mkdir(parents=True)
    basis = {"success_episodes": 50}
    lines = [
        basis | {"decisions": number, "wall_s": 10.0 * number, "env_steps": 5 * number, "success_rate": number / 100}
        for number in decisions
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def picture(*arguments: str, out: Path) -> bytes:
    done = plot(*arguments, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out.read_bytes()


def test_runs_and_evaluations_are_drawn(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, range(10, 100, 10))
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1')  # cut off by a crash
    result = {"policy": "base", "episodes": 50, "successes": 20, "success_rate": 0.4}
    (tmp_path / "base.json").write_text(json.dumps(result | {"ci95_low": 0.28, "ci95_high": 0.54}))
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    evaluation = ["--evaluation", str(tmp_path / "base.json"), "--title", "two seeds"]
    assert len(picture(*runs, *evaluation, out=tmp_path / "curve.png")) > 10_000


def test_what_a_resume_took_back_is_left_out(tmp_path: Path) -> None:
    kept = {"as it was": [10, 20, 30, 15, 25], "without": [10, 15, 25], "all": [10, 15, 20, 25, 30]}
    for name, decisions in kept.items():
        write_run(tmp_path / name / "run", decisions)
    drawn = {name: picture(str(tmp_path / name / "run"), out=tmp_path / f"{name}.png") for name in kept}
    assert drawn["as it was"] == drawn["without"] != drawn["all"]


def test_evaluations_during_a_run_are_points_of_its_curve(tmp_path: Path) -> None:
    for name, policy in (("without", None), ("with", "agent"), ("before it learned", "base")):
        run = tmp_path / name / "run"
        write_run(run, range(10, 100, 10))
        if policy is not None:
            (directory := run / "evaluation" / "00000050").mkdir(parents=True)
            figures = {"policy": policy, "success_rate": 0.6, "ci95_low": 0.4, "ci95_high": 0.8}
            (directory / "result.json").write_text(json.dumps(figures))
            planned = {"decisions": 50, "env_steps": 250, "wall_s": 500.0}
            (directory / "evaluation.json").write_text(json.dumps(planned))
    against = ["--against", "decisions"]
    drawn = {path.name: picture(str(path / "run"), *against, out=path / "curve.png") for path in tmp_path.iterdir()}
    assert drawn["without"] == drawn["before it learned"] != drawn["with"]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    for run, message in ((tmp_path, "has no metrics.jsonl"), (FIXTURES / "run_beb78af", "has no success rate over 20")):
        done = plot(str(run), "--out", str(tmp_path / "curve.png"))
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
