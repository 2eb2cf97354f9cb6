"""Draw the learning curve of one or several runs (seeds): success rate against minutes and environment steps.

    python scripts/plot_learning_curve.py runs/a runs/b --out curve.png --evaluation base.json a.json b.json

Points with their 95 % interval are the evaluations during a run (`evaluation.every_decisions`), if there were any.

Needs matplotlib (`pip install "dsrl_async[plot]"`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, PercentFormatter

from dsrl_async.host.command import guard

MIN_EPISODES = 20  # a success rate of fewer episodes is noise and is not drawn
AXES = {"wall_s": (1 / 60, "minutes"), "env_steps": (1.0, "environment steps"), "decisions": (1.0, "decisions")}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, without those that a resume undid or a crash cut short.

    Raises ValueError if there is nothing to draw.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run} is not a run directory: it has no metrics.jsonl")
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        while lines and lines[-1]["decisions"] > line["decisions"]:
            lines.pop()
        lines.append(line)
    lines = [line for line in lines if line["success_rate"] is not None and line["success_episodes"] >= MIN_EPISODES]
    if not lines:
        raise ValueError(f"{path} has no success rate over {MIN_EPISODES} or more episodes yet; let the run go on")
    return lines


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """What the evaluations of the agent during a run found, each with the moment at which it began."""
    found = []
    for path in sorted(run.glob("evaluation/*/result.json")):
        result = json.loads(path.read_text())
        if result["policy"] == "agent":
            found.append(json.loads((path.parent / "evaluation.json").read_text()) | result)
    return found


def draw_points(axes: Axes, runs: list[list[dict[str, Any]]], key: str, scale: float) -> None:
    """Draw the evaluations of each run in the colour of its line."""
    for number, found in enumerate(runs):
        rate = np.array([result["success_rate"] for result in found])
        error = [[result[end] for result in found] for end in ("ci95_low", "ci95_high")]
        if found:
            x = np.array([result[key] for result in found]) * scale
            spread = np.clip([rate - error[0], error[1] - rate], 0, None)
            axes.errorbar(x, rate, spread, fmt="o", markersize=4, capsize=2, linewidth=1, color=f"C{number}")


def draw_runs(axes: Axes, runs: dict[str, list[dict[str, Any]]], key: str, scale: float) -> None:
    """Draw a line per run and, for several runs, their mean as far as all of them reach."""
    several = len(runs) > 1
    curves = []
    for name, lines in runs.items():
        x = np.array([line[key] for line in lines]) * scale
        y = np.array([line["success_rate"] for line in lines])
        axes.plot(x, y, linewidth=1.2 if several else 2.0, alpha=0.6 if several else 1.0, label=name)
        curves.append((x, y))
    if several:
        grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 400)
        mean = np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)
        axes.plot(grid, mean, color="black", linewidth=2.2, label="mean")


def draw_evaluations(axes: Axes, evaluations: dict[str, dict[str, Any]]) -> None:
    """Draw a bar with its 95 % confidence interval for each named evaluation."""
    rates, low, high = (
        np.array([result[key] for result in evaluations.values()]) for key in ("success_rate", "ci95_low", "ci95_high")
    )
    colours = ["0.7", *(f"C{index}" for index in range(len(evaluations)))][: len(evaluations)]
    at = np.arange(len(evaluations))
    error = np.clip([rates - low, high - rates], 0, None)
    axes.bar(at, rates, width=0.6, color=colours, yerr=error, capsize=4, ecolor="0.25")
    for x, rate, top in zip(at, rates, high, strict=True):
        axes.annotate(f"{rate:.0%}", (x, top), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(at, list(evaluations), fontsize=8)
    counts = "/".join(sorted({str(result["episodes"]) for result in evaluations.values()}))
    axes.set_title(f"evaluation, {counts} episodes (95 % interval)", fontsize=10)


def draw(
    runs: list[Path],
    evaluations: list[Path],
    title: str | None,
    out: Path,
    against: Sequence[str] = ("wall_s", "env_steps"),
) -> None:
    """Write the picture, with a panel for each of `against`, which are keys of `AXES`.

    Raises ValueError if a run or an evaluation cannot be drawn.
    """
    names = [run.resolve().name for run in runs]
    labels = names if len(set(names)) == len(names) else [str(run) for run in runs]
    metrics = {label: read_metrics(run) for label, run in zip(labels, runs, strict=True)}
    points = [read_evaluations(run) for run in runs]
    results = {}
    for path in evaluations:
        try:
            results[path.stem] = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not an evaluation result: {error}") from error
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
    widths = [3.0] * len(against) + ([0.8 + 0.5 * len(results)] if results else [])
    figure, rows = plt.subplots(
        1,
        len(widths),
        sharey=True,
        squeeze=False,
        figsize=(1.5 * sum(widths), 3.8),
        width_ratios=widths,
        layout="constrained",
    )
    panels = rows[0]
    for axes, key in zip(panels, against, strict=False):
        scale, label = AXES[key]
        draw_runs(axes, metrics, key, scale)
        draw_points(axes, points, key, scale)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        if scale == 1:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if results:
        draw_evaluations(panels[-1], results)
        panels[-1].grid(axis="x", visible=False)
    panels[0].set_ylabel("success rate, last 100 episodes")
    panels[0].set_ylim(0, 1.06)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    if title:
        figure.suptitle(title)
    figure.savefig(out, dpi=160)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the learning curve of one or several runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory with metrics.jsonl")
    parser.add_argument("--out", required=True, type=Path, help="picture to write, such as curve.png")
    parser.add_argument("--title", help="text above the picture")
    parser.add_argument(
        "--evaluation",
        nargs="*",
        type=Path,
        default=[],
        metavar="JSON",
        help="evaluation results to show as bars, named by their files",
    )
    parser.add_argument(
        "--against", nargs="+", choices=AXES, default=["wall_s", "env_steps"], help="what the panels show it against"
    )
    arguments = parser.parse_args()
    try:
        draw(arguments.runs, arguments.evaluation, arguments.title, arguments.out, arguments.against)
    except ValueError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    sys.exit(guard(main))
