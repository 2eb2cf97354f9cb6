"""The pictures of a report, as SVG to be put into the page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dsrl_async.report.records import RunRecord
from dsrl_async.telemetry.profile.report import draw_phases


def as_svg(figure: Figure) -> str:
    """The picture as an `<svg>` element, with text as text."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dsrl_async"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :]


def curve(run: RunRecord, x: str, y: str, factor: float = 1.0) -> tuple[list[float], list[float]]:
    """The points of a run's lines that have both numbers; x is multiplied with `factor`."""
    lines = [line for line in run.lines if all(isinstance(line.get(name), int | float) for name in (x, y))]
    return [line[x] * factor for line in lines], [line[y] for line in lines]


def learning(runs: Sequence[RunRecord]) -> str:
    """Success of the last episodes, and evaluated success with its 95 % interval, over decisions and over minutes."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    by_decisions, by_minutes = figure.subplots(1, 2, sharey=True)
    for axes, key, factor in ((by_decisions, "decisions", 1.0), (by_minutes, "wall_s", 1 / 60)):
        for number, run in enumerate(runs):
            axes.plot(*curve(run, key, "success_rate", factor), color=f"C{number}", label=run.name)
            if run.evaluations:
                x = [point[key] * factor for point in run.evaluations]
                y = [point["success_rate"] for point in run.evaluations]
                below = [point["success_rate"] - point["ci95_low"] for point in run.evaluations]
                above = [point["ci95_high"] - point["success_rate"] for point in run.evaluations]
                style = {"fmt": "o--", "capsize": 3, "color": f"C{number}", "label": f"{run.name}, evaluated"}
                axes.errorbar(x, y, (below, above), **style)
        axes.grid(alpha=0.3)
    by_decisions.set(xlabel="decisions", ylabel="success rate", ylim=(-0.02, 1.02))
    by_minutes.set(xlabel="minutes")
    by_decisions.yaxis.set_major_formatter(PercentFormatter(1.0))
    by_decisions.legend(fontsize=8)
    return as_svg(figure)


def throughput(runs: Sequence[RunRecord]) -> str:
    """Decisions and updates per second over minutes."""
    figure = Figure(figsize=(11, 3), layout="constrained")
    decisions, updates = figure.subplots(1, 2)
    for axes, key, name in ((decisions, "decisions_per_s", "decisions/s"), (updates, "updates_per_s", "updates/s")):
        for number, run in enumerate(runs):
            axes.plot(*curve(run, "wall_s", key, 1 / 60), color=f"C{number}", label=run.name)
        axes.set(xlabel="minutes", ylabel=name, ylim=(0, None))
        axes.grid(alpha=0.3)
    decisions.legend(fontsize=8)
    return as_svg(figure)


def phases(figures: Mapping[str, Any]) -> str:
    """What the time of each kind of process went to; empty if it is not known."""
    of_kind = figures.get("phases")
    if not isinstance(of_kind, dict) or not of_kind:
        return ""
    figure = Figure(figsize=(11, 0.6 + 0.6 * len(of_kind)), layout="constrained")
    axes = figure.subplots()
    draw_phases(axes, {"environment workers" if kind == "actor" else kind: of_kind[kind] for kind in of_kind})
    axes.set(xlabel="share of a process's time; grey is waiting")
    return as_svg(figure)
