"""The command: `python -m dsrl_async.evaluate [--checkpoint RUN] [--suite NAMES] [--episodes N] [--out DIR]`.

Plays episodes with a fixed policy: the base policy (every action slot starts from independent N(0, I) noise), or the
steered policy of a run's checkpoint. Several environment workers step the scenes, and this process runs the policy.
Scenes and noise depend only on the seed and the episode's number, and are never those of training. stderr ends with
three lines: what came out, where it is, what to do next. The last line on stdout, unless both are a terminal, is the
result as one JSON object: `episodes, successes, success_rate, ci95_low, ci95_high, policy`, the same
figures for each task in `tasks`, and in `settings` and `versions` all that identifies the evaluation. With several
suites, or with `--compare`, it is `{"suites": {SUITE: {"base": RESULT, "steered": RESULT}}, "wall_s": SECONDS}`, with
such a result for each policy that was played.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dsrl_async.config.command_line import Parser, add_help_all, add_sections, program
from dsrl_async.config.load import leaf_fields
from dsrl_async.evaluate.films import Films, check_films
from dsrl_async.evaluate.last_words import last_words
from dsrl_async.evaluate.play import evaluate
from dsrl_async.evaluate.resolve import SETTINGS, Evaluation, Part, identity, resolve_all
from dsrl_async.evaluate.results import ResultDirectory, check_parent, comparison, result_of, table, write_result
from dsrl_async.host.output import is_for_a_person, print_to_person
from dsrl_async.host.signals import StopRequest
from dsrl_async.run.evaluation.episodes import across_tasks
from dsrl_async.run.worker.pool import WorkerLost


def build_parser(all_settings: bool = False) -> Parser:
    """The options of an evaluation, and those settings of a run that it uses; `--help` shows the latter if asked to."""
    assert __doc__ is not None
    parser = Parser(
        prog=program("evaluate"),
        usage="%(prog)s [--checkpoint RUN] [--episodes N] [--out DIR] [option ...]",
        description=__doc__.split("\n\n")[1],
        epilog=None if all_settings else "--help-all shows the settings of a run that are options here, too.",
    )
    add_help_all(parser, lambda: build_parser(all_settings=True))
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="RUN",
        help="a run directory (its last checkpoint counts) or one of its checkpoints; without, the base policy plays",
    )
    add("--best", action="store_true", help="play the best agent of the evaluations during --checkpoint's run")
    add("--base", action="store_true", help="play the base policy of --checkpoint's run")
    add("--compare", action="store_true", help="play the base policy of --checkpoint's run, then the steered one")
    add(
        "--config",
        metavar="YAML",
        help="settings, without --checkpoint: a file, or a shipped one's name",
    )
    add(
        "--suite",
        action="extend",
        type=lambda text: [name.strip() for name in text.split(",")],
        metavar="NAMES",
        help="play all tasks of these suites of LIBERO, such as libero_spatial,libero_goal or 'libero_spatial*' "
        "(default: as configured)",
    )
    add("--tasks", metavar="LIST", help="LIBERO: play only these tasks, such as 0,3 or 0-4")
    add("--init-states", metavar="LIST", help="LIBERO: start only from these initial states, such as 40-49")
    add(
        "--episodes",
        type=int,
        metavar="N",
        help="number of episodes of a suite, spread evenly over its tasks (default: every scene of LIBERO once, else "
        "100)",
    )
    add("--seed", type=int, default=0, metavar="INT", help="seed of scenes and noise (default 0)")
    add(
        "--processes",
        type=int,
        metavar="N",
        help="number of environment workers (default: one for each episode, at most 16; LIBERO: at most one a core)",
    )
    add(
        "--groups",
        type=int,
        default=1,
        metavar="N",
        help="deal the episodes out to N policies, each with a GPU and --processes of its own (default 1)",
    )
    add("--ray", metavar="ADDRESS", help="have the groups on the machines of a Ray cluster; auto: the one at hand")
    add(
        "--noise",
        choices=("deterministic", "stochastic"),
        help="how the actor chooses noise (default: sac.evaluation_noise)",
    )
    add(
        "--out",
        metavar="DIR",
        help="write episodes.jsonl and result.json to this directory, with several suites to SUITE/POLICY in it; the "
        "same command again goes on where it ended",
    )
    add(
        "--video",
        metavar="DIR",
        help="write films (mp4) of some successes and failures to this directory, which takes long; needs the "
        "extra video",
    )
    add("--videos", type=int, default=4, metavar="N", help="number of films (default 4)")
    add_sections(parser, {key: field for key, field in leaf_fields() if key.startswith(SETTINGS)}, shown=all_settings)
    return parser


def main(argv: Sequence[str]) -> int:
    stop = StopRequest()
    begin = time.monotonic()
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 120
    options = build_parser().parse_args(list(argv))
    if options.video:
        check_films(options.videos)
    parts, warnings = resolve_all(options)
    for warning in warnings:
        console.print(warning)
    several = len(parts) > 1
    suites: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        if several and options.out:
            check_parent(Path(options.out))
        # All directories are opened before anything is played, which may take hours.
        plays = [(part, *open_directories(part, options, stack, several)) for part in parts]
        for part, out, films in plays:
            if several:
                console.print(f"{part.suite}, {part.policy} policy")
            played = play_part(part.evaluation, out, films, stop, console)
            suites.setdefault(part.suite, {})[part.policy] = result = played
    if several:
        result = {"suites": suites, "wall_s": round(time.monotonic() - begin, 2)}
        if options.out:
            write_result(Path(options.out), result)
        console.print(comparison(suites))
    elif parts[0].evaluation.run.environment.suite is not None:
        console.print(table(result))
    print_to_person(last_words(options, suites, time.monotonic() - begin))
    if not is_for_a_person():
        print(json.dumps(result), flush=True)
    return 0


def open_directories(
    part: Part, options: argparse.Namespace, stack: contextlib.ExitStack, several: bool
) -> tuple[ResultDirectory | None, Films | None]:
    """Open the directories of `--out` and `--video`, those of several parts in a folder for each suite and policy.

    Raises ConfigError if they cannot be used.
    """
    out = films = None
    inner = Path(part.suite, part.policy) if several else Path()
    if options.out:
        directory = ResultDirectory(Path(options.out) / inner, identity(part.evaluation))
        out = stack.enter_context(contextlib.closing(directory))
    if options.video:
        numbers = [episode.number for episode in across_tasks(part.evaluation.episodes)]
        films = Films(Path(options.video) / inner, options.videos, numbers)
    return out, films


def play_part(
    evaluation: Evaluation, out: ResultDirectory | None, films: Films | None, stop: StopRequest, console: Console
) -> dict[str, Any]:
    """Play an evaluation, and return its result."""
    begin = time.monotonic()
    try:
        outcomes = evaluate(evaluation, out, films, stop, console)
    except WorkerLost as error:
        raise RuntimeError(f"{error}: {program('doctor')} looks for the reason") from error
    result = result_of(evaluation, identity(evaluation), outcomes, time.monotonic() - begin)
    if out is not None:
        out.finish(result)
    return result
