"""The report that a GPU user makes, gone through on the CPU: sections that end, crash, hang and lack packages."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.paths import CONFIGS, ROOT, SCRIPTS

from dsrl_async.run.inference import copies
from dsrl_async.run.inference.copies import Gather, Way
from dsrl_async.shm.counters import Uploads

SCRIPT = SCRIPTS / "gpu_report.py"
TOY = [
    *("--device", "cpu", "--size", "toy", "--dtype", "float32", "--config", str(CONFIGS / "tabletop.yaml")),
    *("--batch-sizes", "1", "2", "--repeats", "1", "--denoise-steps", "2", "--sections"),
]
ABSENT = ("pydantic", "mujoco", "zmq", "tokenizers", "safetensors", "rich", "tensorboard", "psutil")


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


script, program = load_script("gpu_report"), load_script("gpu_report_sections")


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
        return rows(self.lines, section, table)


def rows(lines: list[dict[str, Any]], section: str, table: str) -> list[dict[str, Any]]:
    return [line["row"] for line in lines if line["section"] == section and line.get("table") == table]


# --- the report, as a process that starts others ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """All that the tests below look at is from one call, without packages, in which a section crashes and one hangs."""
    stubs = tmp_path_factory.mktemp("stubs")
    for name in ABSENT:
        (stubs / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name='{name}')\n")
    plants = ["--plant", "copies=crash", "attention=hang", "--limits", "attention=1"]
    out = tmp_path_factory.mktemp("gpu") / "report"
    return Report(out, "sampler_pi0", "learner", "copies", "attention", *plants, PYTHONPATH=str(stubs))


def test_a_crash_and_a_hang_cost_one_section_each(report: Report) -> None:
    """Sections that need none of the missing packages run; the others name the first that they lack."""
    expected = {"sampler_pi0": "whole", "learner": "missing", "copies": "failed", "attention": "timed out"}
    assert report.status == expected
    assert "Planted: crash." in report.text
    assert "Planted: hang." in report.text
    assert "this needs the package `pydantic`, which is not installed" in report.text


def test_the_last_line_and_the_status_say_what_is_wrong(report: Report) -> None:
    last = report.done.stdout.splitlines()[-1]
    assert last.startswith("FAILED: 1 of 4 sections are whole; ")
    assert "copies (failed), attention (timed out)" in last
    assert "a package is missing for learner" in last
    assert "NOTHING WAS CAPTURED" in last
    assert report.text.rstrip().endswith(f"**{last}.**")
    assert report.done.returncode == 1


def test_replays_have_their_times_and_differences(report: Report) -> None:
    found = report.rows("sampler_pi0", "replays")
    assert [row["B"] for row in found] == [1, 2]
    assert all(float(row["time over bound"]) > 1 for row in found), "faster than the bound"
    assert {"section": "sampler_pi0", "figure": "pi0 replay difference", "value": 0.0} in report.lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(tmp_path / "report")])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "no CUDA device" in capsys.readouterr().err


# --- its sections, in this process ------------------------------------------------------------------------------------

OPTIONS = {
    **{"device": "cpu", "size": "toy", "dtype": "float32", "batch_sizes": [1, 2], "denoise_steps": 2, "repeats": 1},
    **{"compile": False, "config": str(CONFIGS / "tabletop.yaml")},
}


def section(name: str, path: Path) -> list[dict[str, Any]]:
    """The lines that a section has written."""
    program.SECTIONS[name](program.Results(name, path), program.Options(**OPTIONS))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert not any("problem" in line for line in lines), lines
    return lines


def test_every_precision_of_the_learner_has_a_row(tmp_path: Path) -> None:
    lines = section("learner", tmp_path / "lines")
    found = rows(lines, "learner", "updates")
    assert [row["precision"] for row in found] == ["ieee", "tf32", "bf16"]
    assert all(float(row["replayed ms"]) > 0 and row["captured"] == "no" for row in found)
    differences = rows(lines, "learner", "a replay against an eager update")
    assert [float(row["max difference"]) for row in differences] == [0, 0, 0]


def test_prompts_that_hold_the_state_are_served(tmp_path: Path) -> None:
    lines = section("serve_pi05", tmp_path / "lines")
    assert [row["B"] for row in rows(lines, "serve_pi05", "batches")] == [1, 2]
    assert {"section": "serve_pi05", "figure": "pi05 served", "value": 1.0} in lines


@pytest.mark.parametrize(
    ("name", "said"),
    [("machine", "matrix product"), ("launches", "host us"), ("attention", "prefill, batch 2"),
     ("fallback", "nothing can fail"), ("mps", "MPS is not there"), ("sharing", "policy beside a learner"),
     ("sampler_pi05", "time over bound"), ("serve_pi0", "pi0 served")],
)  # fmt: skip
def test_short_sections(name: str, said: str, tmp_path: Path) -> None:
    section(name, tmp_path / "lines")
    assert said in (tmp_path / "lines").read_text()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("wrong", [False, True])
def test_triton_kernels_are_compared_with_torchs(wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's in the place of Triton's, which only a GPU or the interpreter runs."""

    class Sampler(program.Sampler):  # type: ignore[name-defined]  # of a module that is loaded by its path
        def __init__(self, *arguments: Any, kernels: str = "torch") -> None:
            super().__init__(*arguments)
            self.wrong = wrong and kernels == "triton"

        def denoise(self) -> None:
            super().denoise()
            if self.wrong:
                self.actions.mul_(1.1)

    monkeypatch.setattr(program, "Sampler", Sampler)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = tmp_path / "lines"
    program.SECTIONS["triton"](program.Results("triton", path), program.Options(**OPTIONS))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    problems = [line["problem"] for line in lines if "problem" in line]
    assert [problem.partition(":")[0] for problem in problems] == (["pi0", "pi05"] if wrong else [])
    found = rows(lines, "triton", "a sample by kernels")
    assert [(row["B"], row["kernels"]) for row in found] == [(1, "torch"), (1, "triton"), (2, "torch"), (2, "triton")]
    assert all(float(row["denoise ms"]) > 0 for row in found)
    figures = {line["figure"]: line["value"] for line in lines if "figure" in line}
    assert figures["triton over torch, denoise at batch 1"] > 0
    assert (figures["pi0 triton float32 difference"] > 1e-3) is wrong


def test_kernels_are_listed(tmp_path: Path) -> None:
    lines = section("kernels", tmp_path / "lines")
    assert len(rows(lines, "kernels", "denoise, batch 2")) == 25


def test_actions_are_openpi_s(tmp_path: Path) -> None:
    lines = section("goldens", tmp_path / "lines")
    figures = {line["figure"]: line["value"] for line in lines if "figure" in line}
    assert 0 < figures["goldens float32"] <= 1e-5


def test_a_run_is_measured_from_its_start_on(tmp_path: Path) -> None:
    lines = section("end_to_end", tmp_path / "lines")
    assert {line["figure"]: line["value"] for line in lines if "figure" in line}["run decisions"] > 0
    start = [float(row["s after the start"]) for row in rows(lines, "end_to_end", "the start of a run")]
    assert len(start) == 3
    assert 0 < start[0] <= start[1] <= start[2]
    (run,) = rows(lines, "end_to_end", "a run with simulated environments")
    assert 0 < float(run["answer p50 ms"]) <= float(run["answer p99 ms"])


def test_of_the_tests_those_marked_gpu_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another tree than this one, whose tests would all have to be imported."""
    (tmp_path / "tests").mkdir()
    marked = "import pytest\n\n@pytest.mark.gpu\ndef test_one():\n    pass\n\ndef test_two():\n    assert False\n"
    (tmp_path / "tests" / "test_marked.py").write_text(marked)
    (tmp_path / "tests" / "test_without.py").write_text("assert False\n")
    monkeypatch.setattr(program, "ROOT", tmp_path)
    lines = section("tests", tmp_path / "lines")
    assert {"section": "tests", "figure": "status of the gpu tests", "value": 0.0} in lines
    assert any("1 passed, 1 deselected" in line.get("note", "") for line in lines)
    (tmp_path / "tests" / "test_broken.py").write_text("import nothing\n@pytest.mark.gpu\n")
    path = tmp_path / "of the broken one"
    program.gpu_tests(program.Results("tests", path), program.Options(**OPTIONS))
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert {"section": "tests", "problem": "pytest ended with status 1, 1 passed"} in found


@pytest.mark.parametrize("wrong", [False, True])
def test_one_launch_is_compared_with_copies_of_rows(
    wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a kernel that is one call of numpy for each field."""

    def launch(fields: int, lanes: int, count: int, number: int) -> None:
        table = np.ctypeslib.as_array(ctypes.cast(fields, ctypes.POINTER(ctypes.c_longlong)), (number, 3))
        for source, target, size in table.tolist():
            ctypes.memmove(target, source + wrong, count * size)

    way = Way(Uploads.GATHERED, Gather(launch, lambda address: address))
    monkeypatch.setattr(copies, "prepare_uploads", lambda *_: way)
    path = tmp_path / "lines"
    program.SECTIONS["copies"](program.Results("copies", path), program.Options(**OPTIONS))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (ratio,) = [line["value"] for line in lines if line.get("figure") == "one launch over 64 copies"]
    found = {(row["memory"], row["how"]): float(row["done ms"]) for row in rows(lines, "copies", "copies up")}
    one, many = found["registered", "one launch"], found["registered", "64 rows"]
    assert ratio == pytest.approx(one / many, rel=0.2, abs=0.05)
    assert any("does not gather" in line.get("problem", "") for line in lines) is wrong


def test_mps_is_started_for_its_section_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended daemon, which notes where it was told to be, and is there until it is ended."""
    control = tmp_path / "nvidia-cuda-mps-control"
    control.write_text(
        f'#!/bin/sh\necho "$1" > {tmp_path}/called\ntrap "echo ended >> {tmp_path}/called; exit" TERM\n'
        'touch "$CUDA_MPS_PIPE_DIRECTORY/control"\nwhile :; do sleep 0.05; done\n'
    )
    control.chmod(0o755)
    shared: list[tuple[str, bool]] = []

    def sharing(results: object, options: object, how: str) -> None:
        shared.append((how, Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"], "control").exists()))

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(program, "sharing", sharing)
    for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
        monkeypatch.setenv(name, "elsewhere")
    results = program.Results("mps", tmp_path / "lines")
    program.mps(results, program.Options(**{**OPTIONS, "device": "cuda"}))
    assert shared == [(", with MPS", True)]
    assert (tmp_path / "called").read_text().split() == ["-f", "ended"]
    control.write_text("#!/bin/sh\nexit 3\n")
    program.mps(results, program.Options(**{**OPTIONS, "device": "cuda"}))
    assert "MPS did not start (status 3)" in (tmp_path / "lines").read_text()
    assert len(shared) == 1


# --- claims -----------------------------------------------------------------------------------------------------------


def test_claims_have_verdicts() -> None:
    text = script.claims_text({"pi05 served": 1.0, "one launch over 64 copies": 1.5})
    lines = text.splitlines()
    (held,) = [line for line in lines if line.startswith("| prompts that hold the state")]
    assert held.endswith("| 1 | holds |")
    (broken,) = [line for line in lines if line.startswith("| one launch takes")]
    assert broken.endswith("| 1.5 | DOES NOT HOLD |")
    (unknown,) = [line for line in lines if line.startswith("| copies run from registered")]
    assert unknown.endswith("|  | not measured |")


def test_each_claim_names_a_place_and_a_figure_that_there_are() -> None:
    source = (SCRIPTS / "gpu_report_sections.py").read_text()
    names = re.findall(r'\.figure\(f?"([^"]+)"', source)
    patterns = [re.compile(re.sub(r"\\\{\w+\\\}", r"\\w*", re.escape(name))) for name in names]
    for claim in script.CLAIMS:
        assert (ROOT / claim.place).is_file(), claim
        assert any(pattern.fullmatch(claim.figure) for pattern in patterns), claim
    assert len(script.CLAIMS) > 10
    assert set(program.SECTIONS) == {one.name for one in script.SECTIONS}
