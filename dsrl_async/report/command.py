"""The command: `python -m dsrl_async.report RUN... [--evaluation DIR...] [--out report.html]`.

Writes one HTML page about runs, side by side: how they learned, their evaluations with intervals, what their time went
to, films, settings and versions, and the commands that repeat them. The page needs no other file and no network. A run
may still be going on. The last line on stdout is a JSON object: `out`, `bytes`, `runs`, and in `notes` what could not
be shown, and why.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dsrl_async.config.command_line import Parser, program
from dsrl_async.config.settings import ConfigError
from dsrl_async.host.files import write_text
from dsrl_async.host.output import is_for_a_person, print_to_person
from dsrl_async.host.waiting import waiting
from dsrl_async.report.page import write_page
from dsrl_async.report.records import read_evaluation, read_run, with_names


def build_parser() -> Parser:
    assert __doc__ is not None
    parser = Parser(
        prog=program("report"),
        usage="%(prog)s RUN [RUN ...] [--evaluation DIR ...] [--out FILE]",
        description=__doc__.split("\n\n")[1],
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    add(
        *("--evaluation", "-e"),
        action="append",
        type=Path,
        default=[],
        metavar="DIR",
        help="what `evaluate --out DIR` wrote; may be given several times",
    )
    add("--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page (default report.html)")
    add("--films", type=int, default=4, metavar="N", help="films of a run to put into the page (default 4)")
    return parser


def main(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(list(argv))
    if options.films < 0:
        raise ConfigError("--films must not be negative")
    out: Path = options.out
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {out}: the page is HTML; give a name that ends in .html")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no directory {out.absolute().parent}")
    with waiting("reading the runs") as say:
        evaluations = [read_evaluation(directory) for directory in options.evaluation]
        runs = with_names([read_run(directory, options.films) for directory in options.runs])
        say("drawing")
        page = write_page(runs, evaluations)
    try:
        write_text(out, page)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from error
    notes = [note for run in runs for note in run.notes]
    size = len(page.encode())
    count = f"{len(runs)} run{'s' * (len(runs) > 1)}"
    print_to_person([*notes, f"{out}: {count}, {size / 1e6:.1f} MB; open it in a browser, no other file is needed"])
    if not is_for_a_person():
        print(json.dumps({"out": str(out), "bytes": size, "runs": len(runs), "notes": notes}))
    return 0
