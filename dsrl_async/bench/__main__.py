"""The command: `python -m dsrl_async.bench NAME [options]`; one JSON object per figure on stdout."""

from __future__ import annotations

import argparse
import signal
import sys

from dsrl_async.bench import denoise, end_to_end, env, learner, pipeline, scale, transport

BENCHMARKS = {
    "denoise": denoise,
    "end_to_end": end_to_end,
    "env": env,
    "learner": learner,
    "pipeline": pipeline,
    "scale": scale,
    "transport": transport,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dsrl_async.bench", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.__doc__ is not None
        command = commands.add_parser(
            name,
            help=benchmark.__doc__.split("\n")[0],
            description=benchmark.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        benchmark.add_arguments(command)
    arguments = parser.parse_args()
    try:
        BENCHMARKS[arguments.benchmark].run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
