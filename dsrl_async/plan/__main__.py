"""The command: `python -m dsrl_async.plan [--measure] [figures] [any option of launch]`.

Predicts decisions, environment steps and gradient updates per second against the number of actors, says how many are
enough and what bounds them, and what many machines would do. The times come from a short measurement of this machine
(--measure), from the options below, or from both: an option goes before what was measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from dsrl_async.config.command_line import Parser
from dsrl_async.plan.capacity import (
    curve,
    judge,
    machines,
)
from dsrl_async.plan.gpus import ABOVE_BOUND, GPUS
from dsrl_async.plan.report import plot, show
from dsrl_async.plan.resolve import read

GIGABIT = 1e9 / 8  # bytes
PLAIN_WIDTH = 120  # where there is no terminal


def build_parser() -> Parser:
    assert __doc__ is not None
    parser = Parser(prog="python -m dsrl_async.plan", description=__doc__.split("\n\n", 1)[1], allow_abbrev=False)
    parser.epilog = "All other options are those of a run: python -m dsrl_async.launch --help lists them."
    add = parser.add_argument
    add("--measure", action="store_true", help="step the environment, sample the policy, do updates, here")
    add("--seconds", type=float, default=30.0, help="of --measure, beside loading (default: 30)")
    add("--env-ms", type=float, help="mean of a chunk's time, with rendering")
    add("--reset-s", type=float, help="of a reset (default: 0)")
    add("--episode-decisions", type=float, help="mean of an episode (default: 25)")
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--device-ms", nargs="+", metavar="SIZE:MS", help="of a batch, by size: 1:7 8:38 32:153")
    device.add_argument("--gpu", choices=sorted(GPUS), help=f"{ABOVE_BOUND} times the bound of Pi0 as published on it")
    add("--update-ms", type=float, help="of a gradient update (default: the learner is left out)")
    add("--cores", type=float, help="of the CPU (default: this machine's)")
    add("--memory-gib", type=float, help="for the run (default: what is available here)")
    add("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="machines to extrapolate to")
    add("--network-gbit", type=float, default=10.0, help="link of the learner's machine (default: 10)")
    add("--plot", type=Path, metavar="FILE", help="draw the curve, such as plan.png")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def main(argv: Sequence[str]) -> int:
    try:
        own, rest = build_parser().parse_known_args(list(argv))
        plan = read(own, rest)
        config, figures = plan.config, plan.figures
        points = curve(figures)
        verdict = judge(figures, points)
        link = own.network_gbit * GIGABIT
        network = machines(figures, own.nodes, plan.payload, config.learner.publish_interval, link)
        if own.plot:
            plot(own.plot, points, verdict)
    except (OSError, ValueError) as error:  # ConfigError, a policy's files, or a picture that cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if own.json:
        content = {
            "figures": asdict(figures),
            "curve": [point._asdict() for point in points],
            "enough": verdict.enough._asdict(),
            "bound": verdict.bound,
            "payload": plan.payload._asdict(),
            "machines": [one._asdict() for one in network],
        }
        print(json.dumps(content))
        return 0
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    show(console, plan, points, verdict, network)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
