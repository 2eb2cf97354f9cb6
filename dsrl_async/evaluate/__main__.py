"""The command: `python -m dsrl_async.evaluate [--checkpoint RUN] [--suite NAME] [--episodes N] [--out DIR]`.

Plays episodes with a fixed policy: the base policy (every action slot starts from independent N(0, I) noise), or the
steered policy of a run's checkpoint. Several environment processes, one policy in this process. Scenes and noise depend
on the seed and the episode's number only, and are never those of training. The last line on stdout is the result as
one JSON object: `episodes, successes, success_rate, ci95_low, ci95_high, policy`, the same for each task in `tasks`,
and in `settings` and `versions` all that identifies it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dsrl_async.config.command_line import Parser, add_setting_options
from dsrl_async.config.load import leaf_fields
from dsrl_async.config.settings import ConfigError
from dsrl_async.envs import environment_record, libero_files
from dsrl_async.evaluate.episodes import across_tasks
from dsrl_async.evaluate.films import Films
from dsrl_async.evaluate.play import evaluate
from dsrl_async.evaluate.resolve import SETTINGS, identity, resolve
from dsrl_async.evaluate.results import ResultDirectory, result_of, table
from dsrl_async.host.signals import StopRequest
from dsrl_async.run.worker.pool import WorkerLost


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m dsrl_async.evaluate", description=__doc__.split("\n\n")[1], allow_abbrev=False)
    parser.add_argument(
        "--checkpoint",
        help="a run directory (its last checkpoint) or a checkpoint directory; none: the base policy",
    )
    parser.add_argument("--base", action="store_true", help="evaluate the base policy of --checkpoint's run")
    parser.add_argument("--config", help="YAML file with the environment and policy, if there is no --checkpoint")
    parser.add_argument(
        "--suite", choices=libero_files.SUITES, help="all tasks of this suite of LIBERO (default: as configured)"
    )
    parser.add_argument("--tasks", metavar="LIST", help="LIBERO: only these tasks, such as 0,3 or 0-4")
    parser.add_argument("--init-states", metavar="LIST", help="LIBERO: only these initial states, such as 40-49")
    parser.add_argument(
        "--episodes",
        type=int,
        help="how many, spread evenly over the tasks (default: LIBERO all scenes once, else 100)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of scenes and noise (default 0)")
    parser.add_argument(
        "--processes",
        type=int,
        help="environment processes (default: as many as episodes, at most 16; LIBERO at most one for each core)",
    )
    parser.add_argument(
        "--noise", choices=("deterministic", "stochastic"), help="default: sac.evaluation_noise of the run"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="write episodes.jsonl and result.json there; the same command again goes on"
    )
    parser.add_argument("--video", metavar="DIR", help="write mp4 films of some successes and some failures there")
    parser.add_argument("--videos", type=int, default=4, help="how many films (default 4)")
    options = parser.add_argument_group("settings", "of the evaluated run or the defaults, as in dsrl_async.launch")
    add_setting_options(options, (field for field in leaf_fields() if field[0].startswith(SETTINGS)))
    return parser


def writable_directory(option: str, path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}: cannot write to {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise ConfigError(f"{option}: cannot write to {path}")
    return path


def main(argv: Sequence[str]) -> int:
    stop = StopRequest()
    begin = time.monotonic()
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 120
    try:
        options = build_parser().parse_args(list(argv))
        evaluation = resolve(options)
        settings = identity(evaluation)
        with contextlib.ExitStack() as stack:
            out = None
            if options.out:
                out = stack.enter_context(contextlib.closing(ResultDirectory(Path(options.out), settings)))
            films = None
            if options.video:
                numbers = [episode.number for episode in across_tasks(evaluation.episodes)]
                films = Films(writable_directory("--video", Path(options.video)), options.videos, numbers)
            outcomes = evaluate(evaluation, out, films, stop, console)
            result = result_of(evaluation, settings, outcomes, time.monotonic() - begin)
            if out is not None:
                out.finish(result)
    except ValueError as error:  # ConfigError, or what LIBERO or a checkpoint lacks
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkerLost as error:
        print(f"error: {error}: python -m dsrl_async.doctor looks for the reason", file=sys.stderr)
        return 1
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if environment_record(evaluation.config.env.model_dump()).suite is not None:
        console.print(table(result))
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
