"""Records demonstrations of the scripted expert for LIBERO; see docs/libero_demonstrations.md.

Tasks that are complete in the output directory are skipped, so the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import json
import sys

from dsrl_async.demonstrations import hdf5
from dsrl_async.envs import libero_files
from dsrl_async.host.command import guard
from dsrl_async.host.machine import available_cpus
from dsrl_async.pretraining.libero_demonstrations import Request, make_demonstrations
from dsrl_async.run.evaluation.episodes import parse_numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--suite", default="libero_spatial", help="the only suite that the expert knows")
    parser.add_argument("--tasks", help="such as 0-3,7; all by default")
    parser.add_argument("--init-states", default="0-39", help="initial states to start from in turn")
    parser.add_argument("--episodes-per-task", type=int, default=60, help="successful episodes to keep")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--processes", type=int, default=available_cpus(), help="number of tasks at the same time")
    parser.add_argument("--image-size", type=int, default=128, help="height and width of the images")
    parser.add_argument("--render-quality", choices=("fast", "exact"), default="fast", help="as env.render_quality")
    parser.add_argument("--out", default="data/libero_spatial", help="directory for the files, one per task")
    options = parser.parse_args()
    try:
        chosen = parse_numbers("--tasks", options.tasks) if options.tasks else None
        tasks = libero_files.selected_tasks(options.suite, chosen)
        init_states = tuple(parse_numbers("--init-states", options.init_states))
        requests = [
            Request(
                options.suite,
                task,
                init_states,
                options.episodes_per_task,
                options.seed,
                options.image_size,
                options.render_quality,
                options.out,
            )
            for task in tasks
        ]
        paths = make_demonstrations(requests, options.processes)
    except ValueError as error:
        parser.error(str(error))
    for task, path in zip(tasks, paths, strict=True):
        with hdf5.opened(path) as data:
            size = path.stat().st_size / 1e6
            ways = json.loads(hdf5.attribute(data, "kept_and_attempted", str))
            total = hdf5.attribute(data, "total", int)
            kept, attempted = (sum(way[index] for way in ways.values()) for index in (0, 1))
            print(f"task {task}: {kept} kept of {attempted} attempted, {total} frames, {size:.0f} MB")
            for way, (kept, attempted) in ways.items():
                print(f"    {way}: {kept} of {attempted}")


if __name__ == "__main__":
    sys.exit(guard(main))
