"""Draw the learning curve of one or several runs (seeds): success rate against minutes and environment steps.

    python scripts/plot_learning_curve.py runs/a runs/b --out curve.png --evaluation base.json a.json b.json

Needs matplotlib (`pip install "dsrl_async[plot]"`).
"""

from __future__ import annotations

import argparse
import json
import sys
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
AXES = (("wall_s", 1 / 60, "minutes"), ("env_steps", 1.0, "environment steps"))


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


def draw(runs: list[Path], evaluations: list[Path], title: str | None, out: Path) -> None:
    """Write the picture. Raises ValueError if a run or an evaluation cannot be drawn."""
    names = [run.resolve().name for run in runs]
    labels = names if len(set(names)) == len(names) else [str(run) for run in runs]
    metrics = {label: read_metrics(run) for label, run in zip(labels, runs, strict=True)}
    results = {}
    for path in evaluations:
        try:
            results[path.stem] = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not an evaluation result: {error}") from error
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
    widths = [3.0, 3.0] + ([0.8 + 0.5 * len(results)] if results else [])
    figure, panels = plt.subplots(
        1,
        len(widths),
        sharey=True,
        figsize=(1.5 * sum(widths), 3.8),
        width_ratios=widths,
        layout="constrained",
    )
    for axes, (key, scale, label) in zip(panels, AXES, strict=False):
        draw_runs(axes, metrics, key, scale)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
    panels[1].xaxis.set_major_formatter(EngFormatter(sep=""))
    if results:
        draw_evaluations(panels[2], results)
        panels[2].grid(axis="x", visible=False)
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
    arguments = parser.parse_args()
    try:
        draw(arguments.runs, arguments.evaluation, arguments.title, arguments.out)
    except ValueError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    sys.exit(guard(main))
