"""What many groups would do, past the machines that there are: the prediction of `python -m dsrl_async.plan`, for 1 to
64 groups with a GPU each, three learners and two networks.

    python scripts/studies/groups_on_paper.py --picture docs/pictures/groups.svg

prints Markdown tables, and draws decisions per second and the age of the weights. Nothing is measured: a chunk takes
150 ms, a GPU 1.3 times its bound, and an update as long as is said.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from dsrl_async.host.command import guard
from dsrl_async.plan.capacity import Link, Machines, machines
from dsrl_async.plan.command import GIGABIT, build_parser
from dsrl_async.plan.resolve import read

GROUPS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
UPDATE_MS = [2.5, 5.0, 10.0]
GBIT = [1.0, 25.0]
RUN = [
    *("--config", "libero_spatial_pi0_suite", "--env-ms", "150", "--reset-s", "1", "--gpu", "h100"),
    *("--update-ms", "10", "--cores", "64", "--memory-gib", "512"),
]
OPEN = ["machines"]
"""Bounds where more groups give more."""


def knee(found: list[Machines]) -> str:
    """From how many groups on more of them give nothing, and why."""
    full = next((one for one in found if one.bound not in OPEN), None)
    return "beyond 64" if full is None else f"{full.nodes} ({full.bound})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, help="draw to this file")
    picture = parser.parse_args().picture
    config, inputs, payload, _ = read(*build_parser().parse_known_args(RUN))
    cases: dict[tuple[float, float], list[Machines]] = {}
    for update_ms in UPDATE_MS:
        for gbit in GBIT:
            link = Link(gbit * GIGABIT, config.learner.publish_interval, config.group.publish_s)
            learner = replace(inputs, update_s=update_ms / 1e3)
            cases[update_ms, gbit] = machines(learner, GROUPS, payload, link)
    print("| update, ms | network, Gbit/s | groups that are enough | decisions/s | updates/s | rows in, MB/s |")
    print("|---|---|---|---|---|---|")
    for (update_ms, gbit), found in cases.items():
        most = found[-1]
        print(
            f"| {update_ms:g} | {gbit:g} | {knee(found)} | {most.decisions_per_s:,.0f} | {most.updates_per_s:,.0f} "
            f"| {most.transition_bytes_per_s / 1e6:.1f} |"
        )
    print("\n| groups | " + " | ".join(f"weights every, s, {gbit:g} Gbit/s" for gbit in GBIT) + " |")
    print("|---|" + "---|" * len(GBIT))
    for index, groups in enumerate(GROUPS):
        ages = [cases[UPDATE_MS[0], gbit][index].weights_every_s for gbit in GBIT]
        print(f"| {groups} | " + " | ".join(f"{age:.2g}" for age in ages) + " |")
    if picture is not None:
        draw(picture, cases)


def draw(path: Path, cases: dict[tuple[float, float], list[Machines]]) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "groups"  # the same file each time
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rates, ages = figure.subplots(1, 2)
    for update_ms in UPDATE_MS:
        found = cases[update_ms, GBIT[-1]]
        rates.plot(GROUPS, [one.decisions_per_s for one in found], "o-", markersize=3, label=f"{update_ms:g} ms")
    rates.set(xlabel="groups", ylabel="decisions/s", ylim=(0, None), title="decisions, where an update takes")
    for gbit in GBIT:
        found = cases[UPDATE_MS[0], gbit]
        ages.plot(GROUPS, [one.weights_every_s for one in found], "o-", markersize=3, label=f"{gbit:g} Gbit/s")
    ages.set(xlabel="groups", ylabel="seconds", ylim=(0, None), title="from one publication of weights to the next")
    for axes in (rates, ages):
        axes.set(xscale="log", xticks=GROUPS, xticklabels=GROUPS)
        axes.minorticks_off()
        axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    sys.exit(guard(main))
