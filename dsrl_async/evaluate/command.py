"""The command: `python -m dsrl_async.evaluate [--checkpoint RUN] [--suite NAME] [--episodes N] [--out DIR]`.

Plays episodes with a fixed policy: the base policy (every action slot starts from independent N(0, I) noise), or the
steered policy of a run's checkpoint. Several environment workers step the scenes, and this process runs the policy.
Scenes and noise depend only on the seed and the episode's number, and are never those of training. The last line on
stdout is the result as one JSON object: `episodes, successes, success_rate, ci95_low, ci95_high, policy`, the same
figures for each task in `tasks`, and in `settings` and `versions` all that identifies the evaluation.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dsrl_async.config.command_line import Parser, add_help_all, add_sections, program
from dsrl_async.config.load import leaf_fields
from dsrl_async.envs import libero_files
from dsrl_async.evaluate.episodes import across_tasks
from dsrl_async.evaluate.films import Films
from dsrl_async.evaluate.play import evaluate
from dsrl_async.evaluate.resolve import SETTINGS, identity, resolve
from dsrl_async.evaluate.results import ResultDirectory, result_of, table
from dsrl_async.host.signals import StopRequest
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
    add("--base", action="store_true", help="play the base policy of --checkpoint's run")
    add(
        "--config",
        metavar="YAML",
        help="a file with the settings of environment and policy, if there is no --checkpoint",
    )
    add("--suite", choices=libero_files.SUITES, help="play all tasks of this suite of LIBERO (default: as configured)")
    add("--tasks", metavar="LIST", help="LIBERO: play only these tasks, such as 0,3 or 0-4")
    add("--init-states", metavar="LIST", help="LIBERO: start only from these initial states, such as 40-49")
    add(
        "--episodes",
        type=int,
        metavar="N",
        help="number of episodes, spread evenly over the tasks (default: every scene of LIBERO once, else 100)",
    )
    add("--seed", type=int, default=0, metavar="INT", help="seed of scenes and noise (default 0)")
    add(
        "--processes",
        type=int,
        metavar="N",
        help="number of environment workers (default: one for each episode, at most 16; LIBERO: at most one a core)",
    )
    add(
        "--noise",
        choices=("deterministic", "stochastic"),
        help="how the actor chooses noise (default: sac.evaluation_noise of the run)",
    )
    add(
        "--out",
        metavar="DIR",
        help="write episodes.jsonl and result.json to this directory; the same command again goes on where it ended",
    )
    add("--video", metavar="DIR", help="write films (mp4) of some successes and some failures to this directory")
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
    evaluation = resolve(options)
    for warning in evaluation.run.warnings:
        console.print(warning)
    settings = identity(evaluation)
    with contextlib.ExitStack() as stack:
        out = None
        if options.out:
            out = stack.enter_context(contextlib.closing(ResultDirectory(Path(options.out), settings)))
        films = None
        if options.video:
            numbers = [episode.number for episode in across_tasks(evaluation.episodes)]
            films = Films(Path(options.video), options.videos, numbers)
        try:
            outcomes = evaluate(evaluation, out, films, stop, console)
        except WorkerLost as error:
            raise RuntimeError(f"{error}: {program('doctor')} looks for the reason") from error
        result = result_of(evaluation, settings, outcomes, time.monotonic() - begin)
        if out is not None:
            out.finish(result)
    if evaluation.run.environment.suite is not None:
        console.print(table(result))
    print(json.dumps(result), flush=True)
    return 0
