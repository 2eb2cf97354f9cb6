"""The page about runs: its figures are those of the files, and what is damaged is left out and told."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.commands import call

from dsrl_async.report.records import read_run

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

SUMMARY = {
    "exit_reason": "max_decisions",
    "wall_s": 754.5,
    "env_steps": 29_630,
    "decisions": 6_001,
    "updates": 5_601,
    "episodes": 620,
    "success_rate": 0.9405,
    "decisions_per_s": 7.6389,
    "env_steps_per_s": 37.7236,
    "updates_per_s": 2.5463,
    "replay_ratio": 1.00019,
    "phases": {"actor": {"physics": 0.3, "wait_action": 0.5}, "learner": {"update": 0.9}},
}
RESULT = {
    "episodes": 200,
    "successes": 189,
    "success_rate": 0.945,
    "ci95_low": 0.9043,
    "ci95_high": 0.9689,
    "policy": "base",
    "tasks": [],
}


class Tables(HTMLParser):
    """The cells of the page's tables, row by row, by the table's id; and everything that the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.loaded: list[str] = []
        self._rows: list[list[str]] = []
        self._in_cell = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag == "table":
            self._rows = self.tables[str(given["id"])] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
            self._in_cell = True
        if tag in ("img", "video", "script", "link", "iframe", "source"):
            self.loaded.append(str(given.get("src") or given.get("href")))

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self._rows[-1][-1] += data


def read(page: Path) -> Tables:
    tables = Tables()
    tables.feed(page.read_text())
    return tables


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory as a finished run leaves it."""
    directory = tmp_path / "runs" / "a <run> & more"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("seed: 7\nsac: {gamma: 0.9}\n")
    (directory / "summary.json").write_text(json.dumps(SUMMARY))
    counts = {"env_steps": 10, "updates": 0}
    lines = [
        {"wall_s": float(n), "decisions": n, **counts, "success_rate": n / 2000, "decisions_per_s": 1.0}
        for n in range(1000)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_a_configuration_with_text_in_quotes_is_shown(run: Path, tmp_path: Path) -> None:
    """As every run writes it that was given `--log.console off`: YAML 1.1 would take that for false."""
    (run / "config.yaml").write_text("seed: 7\nsac: {gamma: 0.9}\nlog: {console: 'off'}\n")
    done = call("report", str(run), "--out", str(tmp_path / "report.html"))
    assert done.code == 0, done.stderr
    assert "log:\n  console: &#39;off&#39;\n" in (tmp_path / "report.html").read_text()


def test_its_figures_are_those_of_the_files(run: Path, tmp_path: Path) -> None:
    other = run.parent / "b"
    shutil.copytree(run, other)
    (other / "summary.json").unlink()  # it goes on
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    (evaluation / "result.json").write_text(
        json.dumps(RESULT | {"policy": str(run / "checkpoints/00005601-000006001")})
    )
    out = tmp_path / "page.html"
    done = call("report", str(run), str(other), "--evaluation", str(evaluation), "--out", str(out))
    assert done.result == {"out": str(out), "bytes": out.stat().st_size, "runs": 2, "notes": []}
    page = read(out)
    rows = {name: cells for name, *cells in page.tables["figures"]}
    assert rows[""] == [run.name, "b"]
    assert rows["minutes"] == ["12.6", "16.6"]
    assert rows["decisions"] == ["6,001", "999"]
    assert rows["success, last episodes of training"] == ["94.0%", "50.0%"]
    assert rows["replay ratio"] == ["1.000", "not known"]
    assert rows["ended because of"] == ["max_decisions", "no summary yet"]
    assert page.tables["evaluations"][1] == [
        f"{run.name}, 00005601-000006001",
        *("all", "189/200", "94.5%", "90.4% to 96.9%"),
    ]
    assert ["sac.gamma", "0.9", "0.9"] in page.tables["settings"]
    assert page.loaded == []
    assert len(re.findall("<svg", out.read_text())) == 3
    assert "<run>" not in out.read_text()


def test_runs_of_one_name_are_called_by_their_paths(run: Path, tmp_path: Path) -> None:
    other = tmp_path / run.name
    shutil.copytree(run, other)
    call("report", str(run), str(other), "--out", str(tmp_path / "page.html"))
    assert read(tmp_path / "page.html").tables["figures"][0][1:] == [str(run), str(other)]


def test_evaluations_during_training_are_a_curve_with_intervals(run: Path, tmp_path: Path) -> None:
    planned = {"policy": "agent", "noise": "deterministic", "seed": 0, "numbers": [0], "env_steps": 10, "wall_s": 60.0}
    for decisions in (100, 200, 300):
        directory = run / "evaluation" / f"{decisions:08d}"
        directory.mkdir(parents=True)
        (directory / "evaluation.json").write_text(json.dumps(planned | {"decisions": decisions}))
    for decisions, rate in ((100, 0.25), (200, "high")):  # the third one goes on
        result = json.dumps({"success_rate": rate, "ci95_low": 0.2, "ci95_high": 0.3})
        (run / "evaluation" / f"{decisions:08d}" / "result.json").write_text(result)
    record = read_run(run, 0)
    assert record.evaluations == [
        {"decisions": 100, "wall_s": 60.0, "success_rate": 0.25, "ci95_low": 0.2, "ci95_high": 0.3}
    ]
    done = call("report", str(run), "--out", str(tmp_path / "page.html"))
    (note,) = done.result["notes"]
    assert "00000200/result.json is damaged" in note
    assert ", evaluated" in (tmp_path / "page.html").read_text()


def test_films_are_in_the_page_and_large_ones_are_told(run: Path, tmp_path: Path) -> None:
    (run / "evaluation").mkdir()
    (run / "evaluation/small.mp4").write_bytes(b"\0film")
    (run / "evaluation/large.mp4").write_bytes(bytes(5 << 20))
    done = call("report", str(run), "--out", str(tmp_path / "page.html"))
    assert [source[:22] for source in read(tmp_path / "page.html").loaded] == ["data:video/mp4;base64,"]
    (note,) = done.result["notes"]
    assert "large.mp4" in note


def test_what_is_damaged_is_left_out_and_told(run: Path, tmp_path: Path) -> None:
    (run / "summary.json").write_text('{"decisions": 3.5, "success_rate": "high", "phases": {}}')
    (run / "made_with.json").write_text("{")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '{"wall_s": 1}\nnonsense\n{"wall_s": 5, "decisions": 1, "env_steps": 1, "updates": 1, "success_rate": []}\n'
        )
        file.write('{"wall')
    done = call("report", str(run), "--out", str(tmp_path / "page.html"))
    notes = done.result["notes"]
    assert len(notes) == 2
    assert "made_with.json" in notes[0] or "made_with.json" in notes[1]
    assert any("2 lines cannot be read" in note for note in notes)
    rows = {name: cells for name, *cells in read(tmp_path / "page.html").tables["figures"]}
    assert rows["decisions"] == ["3.5"]
    assert rows["success, last episodes of training"] == ["high"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: not a run directory"),
        (["RUN", "--evaluation", "nowhere"], "--evaluation nowhere: "),
        (["RUN", "--out", "report.pdf"], "--out report.pdf: the page is HTML"),
        (["RUN", "--out", "nowhere/report.html"], "--out nowhere/report.html: there is no directory"),
        (["RUN", "--films", "-1"], "--films must not be negative"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(run: Path, arguments: list[str], words: str) -> None:
    done = call("report", *(str(run) if word == "RUN" else word for word in arguments))
    assert done.code == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
