"""What it takes to learn the embedded task with either update order, and with one environment or sixteen.

    python scripts/studies/compare_update_order.py

Makes serial runs, in which the machine's speed and load have no say: with `sac.critic_in_actor_loss` before and after,
each number of `--actors`, and each seed from 0 on, until 90 % of the last 100 episodes are successes, or for
`--max-decisions`. Prints decisions and seconds until then as a Markdown table: the median, and behind it each seed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import tempfile
from pathlib import Path

from dsrl_async.bench.end_to_end import SERIAL, measure
from dsrl_async.host.command import guard
from dsrl_async.host.signals import StopRequest

ORDERS = ("before", "after")


def described(values: list[float]) -> str:
    """`1264 (1240, 1264, 1301)`; runs that did not get there count as the longest."""
    each = ["never" if math.isinf(value) else f"{value:.0f}" for value in values]
    median = statistics.median_high(values)
    return f"{'never' if math.isinf(median) else f'{median:.0f}'} ({', '.join(each)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--success", type=float, default=0.9)
    parser.add_argument("--max-decisions", type=int, default=4000)
    arguments = parser.parse_args()
    stop = StopRequest()
    print("| actors | critic in the actor's loss | decisions | seconds |\n|---|---|---|---|")
    for actors, order in itertools.product(arguments.actors, ORDERS):
        decisions, seconds = [], []
        for seed in range(arguments.seeds):
            options = ["--actors", str(actors), "--sac.critic_in_actor_loss", order, "--log.console", "off"]
            options += ["--max-decisions", str(arguments.max_decisions), "--stop-at-success", str(arguments.success)]
            with tempfile.TemporaryDirectory(prefix="dsrl_async-") as directory:
                try:
                    run = measure(SERIAL, options, seed, Path(directory, "run"), arguments.success, stop)
                except ValueError as error:
                    sys.exit(f"{parser.prog}: {error}")
            decisions.append(run["decisions_to_success"])
            seconds.append(run["seconds_to_success"])
        print(f"| {actors} | {order} | {described(decisions)} | {described(seconds)} |", flush=True)


if __name__ == "__main__":
    sys.exit(guard(main))
