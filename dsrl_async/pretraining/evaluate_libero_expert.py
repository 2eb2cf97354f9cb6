"""Measures how often the scripted LIBERO expert succeeds from all initial states, with its most reliable way of each
task and openpi's preset. It renders nothing."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dsrl_async.config.load import validate
from dsrl_async.envs import environment_record, libero_files
from dsrl_async.envs.libero import LiberoEnvironment
from dsrl_async.envs.shipped import libero_versions
from dsrl_async.host.command import guard
from dsrl_async.host.machine import available_cpus
from dsrl_async.pretraining.libero_demonstrations import spread
from dsrl_async.pretraining.libero_expert import SIDES, LiberoExpert, Way, situation
from dsrl_async.run.evaluation.results import wilson_interval


def play(job: tuple[int, int, float], advance: Callable[[], None]) -> list[tuple[bool, int]]:
    """Success and steps from each of the first initial states of a task. `job`: task, episodes, side."""
    task, episodes, side = job
    settings = {"name": "libero_spatial", "task_ids": [task], "preset": "openpi", "scene_order": "cycled"}
    config = validate({"env": settings | {"render_quality": "fast"}})
    environment = LiberoEnvironment(environment_record(config.env.model_dump()))
    outcomes = []
    for init_state in range(episodes):
        environment.reset(0, init_state)
        expert = LiberoExpert(Way(side))
        steps, ended, success = 0, False, False
        while not ended:
            outcome = environment.step_chunk(expert.action(situation(environment))[None])
            steps += 1
            success = outcome.terminated
            ended = outcome.terminated or outcome.truncated
        outcomes.append((success, steps))
        advance()
    environment.close()
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--init-states", type=int, default=50, help="number of initial states to start from")
    parser.add_argument("--tasks", type=int, nargs="+", default=list(SIDES), help="numbers of the tasks")
    parser.add_argument("--all-sides", action="store_true", help="play every known side of the bowl, not only the best")
    parser.add_argument("--processes", type=int, default=available_cpus(), help="worker processes")
    parser.add_argument("--out", type=Path, default=Path("libero_expert.json"), help="JSON file to write")
    options = parser.parse_args()
    try:
        libero_files.selected_tasks("libero_spatial", options.tasks)
    except ValueError as error:
        parser.error(str(error))
    if not 1 <= options.init_states <= 50 or options.processes < 1:
        parser.error("--init-states must be 1 to 50, --processes at least 1")

    ways = [(task, side) for task in options.tasks for side in SIDES[task][: None if options.all_sides else 1]]
    jobs = [(task, options.init_states, side) for task, side in ways]
    total = options.init_states * len(jobs)
    results = spread(play, jobs, min(options.processes, len(jobs)), total, "Playing")
    rows = []
    everything = [outcome for outcomes in results for outcome in outcomes]
    for (task, side), outcomes in [*zip(ways, results, strict=True), (("all", None), everything)]:
        episodes, successes = len(outcomes), sum(success for success, _ in outcomes)
        low, high = wilson_interval(successes, episodes)
        rows.append(
            {
                "task": task,
                "side": side,
                "episodes": episodes,
                "successes": successes,
                "ci95_low": round(low, 4),
                "ci95_high": round(high, 4),
                "mean_steps": round(sum(steps for _, steps in outcomes) / episodes, 1),
                "failed_init_states": [number for number, (success, _) in enumerate(outcomes) if not success]
                if task != "all"
                else [],
            }
        )
    table = Table("task", "side", "success", "95 % interval", "mean steps", "failed initial states")
    for row in rows:
        table.add_row(
            str(row["task"]),
            "" if row["side"] is None else f"{row['side']:g}°",
            f"{row['successes']}/{row['episodes']}",
            f"{row['ci95_low']:.1%} to {row['ci95_high']:.1%}",
            f"{row['mean_steps']:.1f}",
            " ".join(map(str, row["failed_init_states"])),
        )
    Console().print(table)
    versions = libero_versions()
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    options.out.write_text(json.dumps({"versions": versions, "preset": "openpi", "ways": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(guard(main))
