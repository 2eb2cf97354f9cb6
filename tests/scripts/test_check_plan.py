"""The study that compares a plan's prediction with what `bench pipeline` measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.paths import SCRIPTS


def check_plan(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "studies" / "check_plan.py"), str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def pipeline_file(directory: Path, rates: dict[str, float]) -> Path:
    """Lines such as `bench pipeline` writes, of two systems; `rates` are decisions/s by case."""
    path = directory / "pipeline.jsonl"
    basis = {"benchmark": "pipeline", "unit": "", "repeats": 3, "load": 0.1}
    lines = [
        basis | {"case": case, "system": system, "metric": metric, "value": value}
        for case, rate in rates.items()
        for system, metric, value in (
            ("dsrl_async", "decisions_per_s", rate),
            ("dsrl_async", "cpu_wait", 0.01),
            ("lock step", "decisions_per_s", 1.0),
        )
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_check_prints_ratios_and_fails_where_one_is_off(tmp_path: Path) -> None:
    """Environments that take 60 ms and the 50 ms of the device: 1 / 0.11 s for one actor, 3 % more or less."""
    near, far = "flat 1 actors chunk 60 ms reset 0 ms", "flat 2 actors chunk 60 ms reset 0 ms"
    done = check_plan(pipeline_file(tmp_path, {near: 8.7}))
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1].split("|")
    assert row[1].strip() == near
    assert float(row[2]) == pytest.approx(9.1, abs=0.1)
    assert float(row[3]) == 8.7
    assert float(row[4]) == pytest.approx(9.1 / 8.7, abs=0.01)
    low = near.replace("60", "60.0")  # the same case by another name
    done = check_plan(pipeline_file(tmp_path, {near: 9.1, far: 30.0, low: 8.0}))
    assert done.returncode == 1
    assert far in done.stderr
    assert low in done.stderr
    assert near not in done.stderr


def test_groups_and_one_machine_are_compared_with_their_own_predictions(tmp_path: Path) -> None:
    """A worker does 1 / 0.11 s; two groups of 2 have two devices for it, and the learner ends at 25 updates/s."""
    basis: dict[str, Any] = {"benchmark": "pipeline", "metric": "decisions_per_s", "value": 1}
    case = "flat 2 groups of 2 actors chunk 60 ms reset 0 ms update {} ms"
    lines = [
        {**basis, "case": case.format(update), "system": system}
        for update in (0, 40)
        for system in ("groups", "one machine")
    ]
    path = tmp_path / "groups.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = check_plan(path)
    assert done.returncode == 1
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == [f"{line['case']}: {line['system']}" for line in lines]
    groups, alone, *bounded = (float(row[1]) for row in rows)
    assert alone <= groups <= 4 / 0.11
    assert groups > 30
    assert bounded == [25.0, 25.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json\n", "does not hold"),
        ("[1]\n", "does not hold"),
        ("", "no figures of dsrl_async"),
        ('{"benchmark": "scale", "system": "dsrl_async"}\n', "no figures of dsrl_async"),
        (None, "cannot be read"),
    ],
)
def test_check_of_another_file_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    if content is not None:
        path.write_text(content)
    done = check_plan(path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
