"""Records demonstrations of the scripted tabletop expert; see dsrl_async.pretraining.tabletop_demonstrations."""

from __future__ import annotations

import argparse
import sys

from dsrl_async.envs.tabletop import LAYOUTS
from dsrl_async.host.command import guard
from dsrl_async.host.machine import available_cpus
from dsrl_async.pretraining.tabletop_demonstrations import make_demonstrations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--episodes", type=int, default=1200, help="episodes to attempt")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--processes", type=int, default=available_cpus(), help="worker processes")
    parser.add_argument(
        "--task",
        choices=LAYOUTS,
        help="record the task with this layout, for replay.demonstrations, and not what a policy is pretrained on",
    )
    parser.add_argument("--out", default="data/tabletop_demonstrations.safetensors", help="file to write")
    options = parser.parse_args()
    try:
        episodes, frames = make_demonstrations(
            options.out, options.episodes, options.seed, options.processes, options.task
        )
    except ValueError as error:
        parser.error(str(error))
    print(f"{options.out}: {episodes} of {options.episodes} episodes kept, {frames} frames")


if __name__ == "__main__":
    sys.exit(guard(main))
