"""The report that a GPU user makes, gone through on the CPU: sections that end, crash, hang and lack packages."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import CONFIGS, ROOT, SCRIPTS

SCRIPT = SCRIPTS / "gpu_report.py"
TOY = [
    *("--device", "cpu", "--size", "toy", "--dtype", "float32"),
    *(
        "--config",
        str(CONFIGS / "tabletop.yaml"),
        "--batch-sizes",
        "1",
        "2",
        "--repeats",
        "1",
        "--denoise-steps",
        "2",
        "--sections",
    ),
]
SECTIONS = ["machine", "learner", "launches", "copies", "attention", "serve_pi05", "fallback"]
ABSENT = ("pydantic", "mujoco", "zmq", "tokenizers", "safetensors", "rich", "tensorboard", "psutil")


class Report:
    """What a call of the script left."""

    def __init__(self, out: Path, *options: str, **environment: str) -> None:
        command = [sys.executable, str(SCRIPT), "--out", str(out), *TOY, *options]
        self.done = subprocess.run(
            command, capture_output=True, text=True, timeout=240, env={**os.environ, **environment}
        )
        self.text = (out / "report.md").read_text()
        self.lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        self.status = dict(re.findall(r"^`(\w+)`: ([\w ]+), [\d.]+ s\.$", self.text, re.MULTILINE))

    def rows(self, section: str, table: str) -> list[dict[str, Any]]:
        return [line["row"] for line in self.lines if line["section"] == section and line.get("table") == table]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """All that the tests below look at is from one call, in which a section crashes and one hangs."""
    plants = ["--plant", "copies=crash", "attention=hang", "--limits", "attention=8"]
    return Report(tmp_path_factory.mktemp("gpu") / "report", *SECTIONS, *plants)


def test_a_crash_and_a_hang_cost_one_section_each(report: Report) -> None:
    others = dict.fromkeys(SECTIONS, "whole")
    assert report.status == {**others, "copies": "failed", "attention": "timed out"}
    assert "Planted: crash." in report.text


def test_the_last_line_and_the_status_say_what_is_wrong(report: Report) -> None:
    last = report.done.stdout.splitlines()[-1]
    assert last.startswith("FAILED: 5 of 7 sections are whole; ")
    assert "copies (failed), attention (timed out)" in last
    assert "NOTHING WAS CAPTURED" in last
    assert report.text.rstrip().endswith(f"**{last}.**")
    assert report.done.returncode == 1


def test_every_precision_of_the_learner_has_a_row(report: Report) -> None:
    rows = report.rows("learner", "updates")
    assert [row["precision"] for row in rows] == ["ieee", "tf32", "bf16"]
    assert all(float(row["replayed ms"]) > 0 and row["captured"] == "no" for row in rows)
    differences = report.rows("learner", "a replay against an eager update")
    assert [float(row["max difference"]) for row in differences] == [0, 0, 0]


def test_prompts_that_hold_the_state_are_served(report: Report) -> None:
    rows = report.rows("serve_pi05", "batches")
    assert [row["B"] for row in rows] == [1, 2]
    assert {"section": "serve_pi05", "figure": "pi05 served", "value": 1.0} in report.lines


def test_claims_have_verdicts(report: Report) -> None:
    rows = report.text[report.text.index("## Claims") :].splitlines()
    (held,) = [row for row in rows if row.startswith("| prompts that hold the state")]
    assert held.endswith("| 1 | holds |")
    (unknown,) = [row for row in rows if row.startswith("| copies run from registered")]
    assert unknown.endswith("|  | not measured |")


def test_sections_say_which_package_is_missing(tmp_path: Path) -> None:
    """Sections that need none of these packages run; the others name the first that they lack."""
    for name in ABSENT:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name='{name}')\n")
    report = Report(tmp_path / "out", "sampler_pi0", "learner", PYTHONPATH=str(tmp_path))
    assert report.status == {"sampler_pi0": "whole", "learner": "missing"}
    assert "this needs the package `pydantic`, which is not installed" in report.text
    rows = report.rows("sampler_pi0", "replays")
    assert [row["B"] for row in rows] == [1, 2]
    assert all(float(row["time over bound"]) > 1 for row in rows), "faster than the bound"
    assert {"section": "sampler_pi0", "figure": "pi0 replay difference", "value": 0.0} in report.lines
    assert "a package is missing for learner" in report.done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_other_sections(tmp_path: Path) -> None:
    others = ["goldens", "kernels", "sharing", "sampler_pi05", "serve_pi0", "end_to_end", "tests"]
    report = Report(tmp_path / "out", *others)
    assert report.status == dict.fromkeys(others, "whole"), report.text
    figures = {line["figure"]: line["value"] for line in report.lines if "figure" in line}
    assert figures["goldens float32"] <= 1e-5
    assert figures["run decisions"] > 0
    assert len(report.rows("kernels", "denoise, batch 2")) == 25


def test_each_claim_names_a_place_and_a_figure_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source = (SCRIPTS / "gpu_report_sections.py").read_text()
    names = re.findall(r'\.figure\(f?"([^"]+)"', source)
    patterns = [re.compile(re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(name))) for name in names]
    for claim in module.CLAIMS:
        assert (ROOT / claim.place).is_file(), claim
        assert any(pattern.fullmatch(claim.figure) for pattern in patterns), claim
    assert len(module.CLAIMS) > 10
    listed = [section.name for section in module.SECTIONS]
    assert set(re.findall(r'^    "(\w+)": \w+,$', source, re.MULTILINE)) == set(listed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "report")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
