"""All that is worth knowing of this project on a GPU, in ten minutes:

    python scripts/gpu_report.py --out gpu_report            # again with --compile, to another directory

Each section is a process of its own with a limit on its time (`gpu_report_sections.py` has what they measure). What it
finds is appended to `results.jsonl` at once, and `report.md` grows section by section, so that a crash or a time limit
costs one section and not the report; `log.txt` has what the sections printed. The report ends with a table that holds
what the documents claim against what was measured. Weights are random and of real size, since time does not depend on
them.

A section that needs a package which is not installed says so and is no failure. The exit status is 0 only if every
other section came to its end without a problem, and if policy or learner was captured in CUDA graphs: so it is 1 on the
CPU, where `--device cpu --size toy` rehearses the same code.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsrl_async.host.command import guard

PROGRAM = Path(__file__).resolve().with_name("gpu_report_sections.py")
MISSING = 3
"""Exit status of a section that needs a package which is not installed."""
REPORT, RESULTS, LOG = "report.md", "results.jsonl", "log.txt"
"""The files that are written."""
LEAST_S = 5.0
"""A section is not begun with less time than this."""
LOG_LINES = 15
"""How much of a failed section's log the report shows."""


PLANTS = {
    "crash": "import os; print('Planted: crash.', flush=True); os.abort()",
    "hang": "import time; print('Planted: hang.', flush=True); time.sleep(3600)",
}
"""Programs that take the place of a section, to see that the others do not suffer."""


class Section(NamedTuple):
    """A part of the report."""

    name: str
    title: str
    limit_s: float


SECTIONS = (
    Section("machine", "The machine", 40),
    Section("sampler_pi0", "Sampler of Pi0: captures, memory, replays", 75),
    Section("goldens", "openpi's actions", 60),
    Section("learner", "The learner's update, and its mirror of the ring", 75),
    Section("serve_pi0", "Batches of the inference server, Pi0", 60),
    Section("fallback", "A capture that fails", 25),
    Section("launches", "Launches of graphs", 25),
    Section("copies", "Copies up to the device", 30),
    Section("attention", "Attention by shape and backend", 45),
    Section("kernels", "The costliest kernels of a sample", 50),
    Section("triton", "Triton's kernels beside torch's", 60),
    Section("serve_pi05", "Batches of the inference server, Pi0.5 with the state in its prompt", 60),
    Section("sharing", "Policy and learner on one GPU", 60),
    Section("mps", "Policy and learner on one GPU, with MPS", 75),
    Section("sampler_pi05", "Sampler of Pi0.5", 60),
    Section("tests", "Tests marked gpu", 90),
    Section("end_to_end", "A run: its processes, a checkpoint of full size, simulated environments", 150),
)
"""In this order, since the limit on the whole report may leave out what comes last."""


class Claim(NamedTuple):
    """What a document, or the code, says of a GPU, and between which numbers it holds."""

    text: str
    place: str
    figure: str
    low: float
    high: float


CLAIMS = (
    Claim("float32 gives openpi's actions to 1e-5", "tests/pi0/test_parity.py", "goldens float32", 0, 1e-5),
    Claim(
        "bfloat16 is at most 1.5 times as far from float32 as openpi's own",
        "tests/pi0/test_parity.py",
        "goldens bfloat16 factor",
        0,
        1.5,
    ),
    Claim("each half of the policy is captured", "docs/design.md", "pi0 captures", 1, math.inf),
    Claim("a replay gives what an eager run gives (Pi0)", "docs/design.md", "pi0 replay difference", 0, 0.02),
    Claim("a replay gives what an eager run gives (Pi0.5)", "docs/design.md", "pi05 replay difference", 0, 0.02),
    Claim(
        "the largest batch takes what memory.py reckons, to a quarter",
        "dsrl_async/pi0/memory.py",
        "pi0 memory over memory.py",
        0.75,
        1.25,
    ),
    Claim("a batch takes 1.3 times its bound at most", "dsrl_async/plan/gpus.py", "pi0 batch 16 over bound", 1, 1.3),
    Claim("a batch of 16 costs less than 16 of 1", "docs/design.md", "pi0 batch 16 over batch 1", 0.5, 16),
    Claim(
        "a small kernel inside a graph takes 1.5 microseconds",
        "docs/measurements/pi0.md",
        "us per kernel in a graph",
        1.0,
        2.25,
    ),
    Claim(
        "while the host gathers and scatters, 1.5 % of a batch's time at most is lost",
        "docs/throughput.md",
        "pi0 gap share at batch 16",
        -0.01,
        0.015,
    ),
    Claim(
        "Triton's kernels give what torch's do, in float32",
        "docs/gpu.md",
        "pi0 triton float32 difference",
        0,
        2e-5,
    ),
    Claim("in bfloat16, no further from float32 than torch's", "docs/gpu.md", "pi0 triton bfloat16 factor", 0, 1.1),
    Claim("Triton's kernels denoise faster than torch's", "docs/gpu.md",
          "triton over torch, denoise at batch 1", 0, 0.7),
    Claim("an update is at most 400 kernels", "docs/learner.md", "kernels of an update", 1, 400),
    Claim("a captured update gives what an eager one gives", "docs/learner.md", "update difference", 0, 1e-4),
    Claim("a mirror takes 12.5 kB per row", "docs/learner.md", "mirror bytes per row", 12_000, 13_500),
    Claim("TF32 makes an update faster", "docs/learner.md", "update tf32 over ieee", 0, 0.98),
    Claim(
        "copies run from registered memory at full speed",
        "dsrl_async/host/device.py",
        "registered over page-locked",
        0.9,
        1.2,
    ),
    Claim(
        "one launch takes observations up in less time than 64 copies of rows",
        "docs/gpu.md",
        "one launch over 64 copies",
        0,
        0.95,
    ),
    Claim("prompts that hold the state are served", "docs/pi0.md", "pi05 served", 1, 1),
    Claim("a failed capture leaves its stream, and the next process has no graphs", "docs/design.md",
          "fallback works", 1, 1),
    Claim(
        "without MPS policy and learner take turns: a batch waits for the learner",
        "docs/learner.md",
        "batch beside a learner over alone",
        1.05,
        math.inf,
    ),
    Claim("policy and learner of a run are both captured", "docs/design.md", "run captures", 2, 2),
    Claim("the tests marked gpu pass", "docs/design.md", "status of the gpu tests", 0, 0),
)  # fmt: skip
CAPTURES = (
    *("pi0 captures", "pi05 captures", "learner captures"),
    *("pi0 server captures", "pi05 server captures", "run captures"),
)
"""Figures of which at least one must be positive."""


class Outcome(NamedTuple):
    """How a section ended."""

    section: Section
    status: str
    """`whole`, `missing` (a package), `problem`, `failed`, `timed out` or `left out`."""
    seconds: float
    lines: list[dict[str, Any]]
    """Its results."""
    tail: list[str]
    """The end of what it printed."""

    @property
    def good(self) -> bool:
        return self.status in ("whole", "missing")


def run_section(
    section: Section, options: Mapping[str, object], out: Path, limit_s: float, plant: str | None = None
) -> Outcome:
    """Run a section, or the program of `PLANTS`, in a process group of its own, which is killed at its limit."""
    results, log = out / RESULTS, out / LOG
    before, logged, begin = results.stat().st_size, log.stat().st_size, time.monotonic()
    program = ["-c", PLANTS[plant]] if plant else [str(PROGRAM), section.name, json.dumps(options), str(results)]
    command = [sys.executable, *program]
    root = str(PROGRAM.parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    with log.open("ab") as output:
        child = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = child.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # and whatever it started
            child.wait()
    lines = list(whole_lines(results.read_bytes()[before:]))
    tail = log.read_bytes()[logged:].decode(errors="replace").splitlines()[-LOG_LINES:]
    if status is None:
        outcome = "timed out"
    elif status == MISSING:
        outcome = "missing"
    elif status != 0:
        outcome = "failed"
    else:
        outcome = "problem" if any("problem" in line for line in lines) else "whole"
    return Outcome(section, outcome, time.monotonic() - begin, lines, tail)


def whole_lines(text: bytes) -> Iterable[dict[str, Any]]:
    """The lines of JSON; the last one may have been cut short."""
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A table in Markdown, of rows that have the same columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(columns), "|" + "---|" * len(columns), *(line(row.get(name, "") for name in columns) for row in rows)]


def section_text(outcome: Outcome) -> str:
    """A section of the report in Markdown."""
    section = outcome.section
    text = [f"## {section.title}", "", f"`{section.name}`: {outcome.status}, {outcome.seconds:.1f} s.", ""]
    tables: dict[str, list[dict[str, Any]]] = {}
    for line in outcome.lines:
        if "table" in line:
            tables.setdefault(line["table"], []).append(line["row"])
    for name, rows in tables.items():
        text += [f"**{name}**", "", *table(rows), ""]
    text += [f"* {line['note']}" for line in outcome.lines if "note" in line]
    text += [f"* **Problem: {line['problem']}.**" for line in outcome.lines if "problem" in line]
    if not outcome.good and outcome.tail:
        text += ["", "The last that it printed:", "", "```", *outcome.tail, "```"]
    return "\n".join([*text, "", ""])


def claims_text(figures: Mapping[str, float]) -> str:
    """The last table: what is claimed, and whether it holds."""
    rows = []
    for claim in CLAIMS:
        value = figures.get(claim.figure)
        if value is None:
            measured, verdict = "", "not measured"
        else:
            measured, verdict = f"{value:.4g}", "holds" if claim.low <= value <= claim.high else "DOES NOT HOLD"
        holds = f"{claim.low:g} to {claim.high:g}"
        rows.append({"claim": claim.text, "place": f"`{claim.place}`", "holds for": holds,
                     "measured": measured, "verdict": verdict})  # fmt: skip
    return "\n".join(["## Claims", "", *table(rows), ""])


def verdict(outcomes: list[Outcome], captured: bool) -> str:
    """The last line of the report and of the output."""
    bad = [f"{outcome.section.name} ({outcome.status})" for outcome in outcomes if not outcome.good]
    missing = [outcome.section.name for outcome in outcomes if outcome.status == "missing"]
    parts = [f"{sum(outcome.status == 'whole' for outcome in outcomes)} of {len(outcomes)} sections are whole"]
    if bad:
        parts.append(f"not whole: {', '.join(bad)}")
    if missing:
        parts.append(f"a package is missing for {', '.join(missing)}")
    if not captured:
        parts.append("NOTHING WAS CAPTURED in CUDA graphs")
    return ("FAILED: " if bad or not captured else "PASSED: ") + "; ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write, which must not have a report yet")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=["full", "toy"], default="full")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--denoise-steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--config", help="configuration with the learner's `sac` (default: the tabletop's)")
    parser.add_argument("--compile", action="store_true", help="use torch.compile, which takes minutes")
    parser.add_argument("--limit-s", type=float, default=480, help="limit on all sections together (default: 480)")
    parser.add_argument(
        "--limits", nargs="+", default=[], metavar="SECTION=SECONDS", help="limits on sections, instead of their own"
    )
    names = [section.name for section in SECTIONS]
    parser.add_argument("--sections", nargs="+", choices=names, default=names, metavar="SECTION", help=", ".join(names))
    parser.add_argument(
        "--plant",
        nargs="+",
        default=[],
        metavar="SECTION=crash|hang",
        help="let sections fail, to see that the others do not suffer",
    )
    args = parser.parse_args()
    report = args.out / REPORT
    if report.exists():
        parser.error(f"{report} exists; give another directory")
    if args.device.startswith("cuda") and not cuda_is_there():
        parser.error("torch finds no CUDA device here; --device cpu --size toy rehearses the report without one")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, LOG):
        (args.out / name).write_text("")
    shared = ("device", "size", "dtype", "batch_sizes", "denoise_steps", "repeats", "compile", "config")
    options = {name: getattr(args, name) for name in shared}
    plants, limits = (dict(pair.split("=", 1) for pair in pairs) for pairs in (args.plant, args.limits))
    command = f"python scripts/gpu_report.py {' '.join(sys.argv[1:])}"
    report.write_text(f"# dsrl_async on a GPU\n\n`{command}`, {time.strftime('%Y-%m-%d %H:%M')}.\n\n")
    end, outcomes, figures = time.monotonic() + args.limit_s, [], dict[str, float]()
    for section in (section for section in SECTIONS if section.name in args.sections):
        left = end - time.monotonic()
        if left < LEAST_S:
            outcome = Outcome(section, "left out", 0.0, [], [])
        else:
            limit_s = float(limits.get(section.name, section.limit_s * (4 if args.compile else 1)))
            outcome = run_section(section, options, args.out, min(left, limit_s), plants.get(section.name))
        outcomes.append(outcome)
        figures |= {line["figure"]: line["value"] for line in outcome.lines if "figure" in line}
        append(report, section_text(outcome))
        print(f"{section.name}: {outcome.status}, {outcome.seconds:.1f} s", flush=True)
    last = verdict(outcomes, captured=any(figures.get(name, 0) > 0 for name in CAPTURES))
    append(report, claims_text(figures) + f"\n**{last}.**\n")
    print(report)
    print(last)
    return 0 if last.startswith("PASSED") else 1


def append(path: Path, text: str) -> None:
    """Write to the end of a file, and to the disk."""
    with path.open("a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def cuda_is_there() -> bool:
    """Asked in a process of its own, so that this one never takes memory of the device."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


if __name__ == "__main__":
    sys.exit(guard(main))
