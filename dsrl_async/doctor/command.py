"""The command: `python -m dsrl_async.doctor [--config YAML] [any option of launch]`.

Checks what a run with that configuration needs of this machine, and says what to do about what is missing. Exit codes:
0 when nothing stops the run, 1 when something does, 2 for a wrong option of its own, 130 after Ctrl-C.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsrl_async.config.command_line import Parser, add_help_all, add_sections, load_config, program
from dsrl_async.config.load import leaf_fields
from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.doctor.checks import Finding, Options, examine
from dsrl_async.doctor.questions import asked, in_lines

WIDEST = 100
"""Columns of an answer at most."""
COLOURS = {"ok": "green", "warning": "yellow", "problem": "red", "skipped": "dim"}


def build_parser(all_settings: bool = False) -> Parser:
    """The options of an examination. Those of a run are left to `load_config`; `--help` shows them if asked to."""
    assert __doc__ is not None
    parser = Parser(
        prog=program("doctor"),
        usage="%(prog)s [--measure] [--json] [--config YAML] [any option of launch]",
        description=__doc__.split("\n\n")[1],
        epilog=None if all_settings else "All other options are those of a run; --help-all shows them.",
    )
    add_help_all(parser, lambda: build_parser(all_settings=True))
    parser.add_argument(
        "--measure", action="store_true", help="start one environment worker and measure its start and memory"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and no table")
    parser.add_argument(
        "--time-limit-s",
        type=float,
        default=60.0,
        metavar="S",
        help="how long a process may try something (default 60)",
    )
    if all_settings:
        add_sections(parser, dict(leaf_fields()), shown=True)
    return parser


def findings(argv: Sequence[str], options: Options) -> Iterator[Finding]:
    try:
        config: Config = load_config(argv)
    except ConfigError as error:
        yield Finding("configuration", "problem", str(error))
    else:
        yield from examine(config, options)


def verdict(found: Sequence[Finding]) -> str:
    count = {status: sum(finding.status == status for finding in found) for status in COLOURS}
    if count["problem"]:
        return f"This run cannot start before {'a problem is' if count['problem'] == 1 else 'the problems are'} solved."
    return "This run can start" + ("; the warnings say what would make it better." if count["warning"] else ".")


def main(argv: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
    own, rest = build_parser().parse_known_args(list(argv))
    if own.time_limit_s <= 0:
        raise ConfigError("--time-limit-s must be positive")
    found = list(findings(rest, Options(own.measure, own.time_limit_s)))
    stopped = any(finding.status == "problem" for finding in found)
    about = asked(finding.message for finding in found if finding.status == "problem" or not stopped)
    if own.json:
        content = {
            "ok": not stopped,
            "verdict": verdict(found),
            "findings": [finding._asdict() for finding in found],
            "questions": [question.question for question in about],
        }
        print(json.dumps(content))
        return int(stopped)
    console = Console()
    if console.is_terminal:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in found:
            table.add_row(Text(finding.status, COLOURS[finding.status]), finding.check, Text(finding.message))
        console.print(table)
    else:  # one line each, to be searched
        for finding in found:
            print(f"{finding.status:8} {finding.check:14} {finding.message}")
    for question in about:
        print("", *in_lines(question, min(console.width, WIDEST)), sep="\n")
    print(*([""] if about else []), verdict(found), sep="\n")
    return int(stopped)
