"""The report that a GPU user makes, gone through on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.paths import SCRIPTS

SCRIPT = SCRIPTS / "gpu_report.py"


def test_report_has_a_row_for_every_bucket(tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    options = ["--device", "cpu", "--size", "toy", "--batch-sizes", "1", "2", "--repeats", "1", "--denoise-steps", "2"]
    command = [sys.executable, str(SCRIPT), *options, "--dtype", "float32", "--no-tests", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in out.read_text().splitlines() if line.startswith(("| 1", "| 2"))]
    assert len(rows) == 2 * 2 * 2  # models, batch sizes, prompt lengths
    for row in rows:
        assert row[2].strip() == "no"
        assert float(row[3]) == 0  # eager against itself, since nothing can be captured here
        assert float(row[9]) > 1, "faster than the bound"
    heading = out.read_text().index("## An update of the learner")
    (row,) = [line.split("|")[1:-1] for line in out.read_text()[heading:].splitlines() if line.startswith("| 8")]
    assert float(row[2]) == 0
    assert all(float(milliseconds) > 0 for milliseconds in row[3:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "report.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
