"""The command: `python -m dsrl_async.bench NAME [options]`.

Measures what NAME says, beside other ways to do the same. Each figure is a JSON object on a line of stdout.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dsrl_async.bench import denoise, end_to_end, env, groups, learner, paper, pipeline, scale, transport
from dsrl_async.config.command_line import HelpFormatter, Parser, program

BENCHMARKS = {
    "denoise": denoise,
    "end_to_end": end_to_end,
    "env": env,
    "groups": groups,
    "learner": learner,
    "paper": paper,
    "pipeline": pipeline,
    "scale": scale,
    "transport": transport,
}


class _VerbatimDescription(argparse.RawDescriptionHelpFormatter, HelpFormatter):
    """A benchmark's description is its docstring, which has a table."""


def build_parser() -> Parser:
    """The names of the benchmarks, each with the options of its own."""
    assert __doc__ is not None
    parser = Parser(prog=program("bench"), description=__doc__.split("\n\n")[1])
    commands = parser.add_subparsers(dest="benchmark", metavar="NAME", required=True)
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.__doc__ is not None
        command = commands.add_parser(
            name,
            help=benchmark.__doc__.split("\n")[0],
            description=benchmark.__doc__,
            formatter_class=_VerbatimDescription,
        )
        benchmark.add_arguments(command)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the benchmark that is named; returns 0, since what goes wrong is raised."""
    arguments = build_parser().parse_args(list(argv))
    BENCHMARKS[arguments.benchmark].run(arguments)
    return 0
