"""The command: `python -m dsrl_async.plan [--measure] [option ...] [any option of launch]`.

Predicts decisions, environment steps and gradient updates per second against the number of environment workers (of
each of `--groups`), says how many are enough and what bounds them, and what many machines would do. Times come from a
short measurement of this machine (--measure), from the options below, or from both: an option overrides what was
measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from dsrl_async.config.command_line import Parser, add_help_all, add_sections, program
from dsrl_async.config.load import leaf_fields
from dsrl_async.config.settings import ConfigError
from dsrl_async.plan.capacity import Link, curve, judge, machines
from dsrl_async.plan.gpus import ABOVE_BOUND, GPUS
from dsrl_async.plan.report import plot, show
from dsrl_async.plan.resolve import read

GIGABIT = 1e9 / 8
"""Bytes."""
PLAIN_WIDTH = 120
"""Columns of the tables where there is no terminal."""


def build_parser(all_settings: bool = False) -> Parser:
    """The options of a prediction. Those of a run are left to `load_config`; `--help` shows them if asked to."""
    assert __doc__ is not None
    parser = Parser(
        prog=program("plan"),
        usage="%(prog)s [--measure] [option ...] [any option of launch]",
        description=__doc__.split("\n\n", 1)[1],
        epilog=None if all_settings else "All other options are those of a run; --help-all shows them.",
    )
    add_help_all(parser, lambda: build_parser(all_settings=True))
    add = parser.add_argument
    add("--measure", action="store_true", help="measure here: step the environment, sample the policy, do updates")
    add("--seconds", type=float, default=30.0, metavar="S", help="how long to measure, beside loading (default 30)")
    add("--env-ms", type=float, metavar="MS", help="mean time that a chunk takes, with rendering")
    add("--reset-s", type=float, metavar="S", help="time that a reset takes (default 0)")
    add("--episode-decisions", type=float, metavar="N", help="mean number of decisions in an episode (default 25)")
    device = parser.add_mutually_exclusive_group()
    device.add_argument(
        "--device-ms", nargs="+", metavar="SIZE:MS", help="times of the policy by batch size, such as 1:7 8:38 32:153"
    )
    device.add_argument(
        "--gpu", choices=sorted(GPUS), help=f"take {ABOVE_BOUND} times the bound of published Pi0 on this GPU"
    )
    add(
        "--update-ms",
        type=float,
        metavar="MS",
        help="time that a gradient update takes (default: the learner is left out)",
    )
    add("--cores", type=float, metavar="N", help="cores that the run can have (default: this machine's)")
    add(
        "--memory-gib", type=float, metavar="GIB", help="memory that the run can have (default: what is available here)"
    )
    add(
        "--nodes",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16, 32],
        metavar="N",
        help="numbers of machines to extrapolate to (default 1 2 4 8 16 32)",
    )
    add(
        "--network-gbit",
        type=float,
        default=10.0,
        metavar="GBIT",
        help="bandwidth of the learner's machine (default 10)",
    )
    add("--plot", type=Path, metavar="FILE", help="draw the curve to this file, such as plan.png")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    if all_settings:
        add_sections(parser, dict(leaf_fields()), shown=True)
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the prediction; returns 0. Raises ValueError, of which ConfigError is one, for what cannot be used."""
    own, rest = build_parser().parse_known_args(list(argv))
    try:
        config, inputs, payload, policy_settings = read(own, rest)
        points = curve(inputs)
        verdict = judge(inputs, points)
        link = Link(own.network_gbit * GIGABIT, config.learner.publish_interval, config.group.publish_s)
        network = machines(inputs, own.nodes, payload, link)
        if own.plot:
            plot(own.plot, points, verdict)
    except OSError as error:  # a policy's files cannot be read, or the picture cannot be written: give others
        raise ConfigError(str(error)) from error
    if own.json:
        content = {
            "figures": asdict(inputs),
            "curve": [point._asdict() for point in points],
            "enough": verdict.enough._asdict(),
            "bound": verdict.bound,
            "payload": payload._asdict(),
            "machines": [one._asdict() for one in network],
        }
        print(json.dumps(content))
        return 0
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    show(console, inputs, payload, points, verdict, network, policy_settings)
    return 0
