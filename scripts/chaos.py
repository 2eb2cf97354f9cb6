"""Breaks real runs in every way that can be drawn, resumes them, and checks every row, end and report.

    python scripts/chaos.py --faults 100 --seed 1 --out chaos     # goes on where an earlier call with it ended
    python scripts/chaos.py --faults 60 --plant stale_answer      # a fault of the product, which must be found
    python scripts/chaos.py soak --rows 1e8                       # the replay ring alone, at full speed

The exit code is 1 if something was found, and 0 if not. `tests/support/chaos` is how it works. As root, each run gets a
small file system of its own, so that a full disk is a full disk; otherwise limits on the size of files stand for one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dsrl_async.host import output

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def main(arguments: Sequence[str]) -> int:
    return soak(arguments[1:]) if arguments[:1] == ["soak"] else chaos(arguments)


def soak(arguments: Sequence[str]) -> int:
    from support.chaos import soak

    parser = argparse.ArgumentParser(prog="chaos.py soak", description=str(soak.__doc__).partition("\n")[0])
    parser.add_argument("--rows", type=float, default=1e8, help="rows to write at least (default: %(default)g)")
    parser.add_argument("--drawn", type=float, help="rows to draw and check at least (default: a tenth of them)")
    parser.add_argument("--lanes", type=int, default=2, help="writers at the same time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws and the kills (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="end early after these (default: %(default)s)")
    given = parser.parse_args(arguments)
    drawn = given.rows / 10 if given.drawn is None else given.drawn
    return soak.run(given.rows, drawn, given.lanes, given.seed, given.minutes * 60, say)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def chaos(arguments: Sequence[str]) -> int:
    from support.chaos import harness
    from support.chaos.plants import PLANTS

    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--faults", type=int, default=100, help="how many to inject (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws them (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="directory of the log and of the evidence (default: a temporary one)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time (default: %(default)s)")
    parser.add_argument("--plant", choices=sorted(PLANTS), default="", help="stop when this fault is found")
    parser.add_argument("--heartbeat-timeout-s", type=float, default=5.0, help="of the runs (default: %(default)s)")
    parser.add_argument("--longest-stop-s", type=float, default=20.0, help="of a process (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=120.0, help="begin no fault later (default: %(default)s)")
    parser.add_argument(
        "--long-run", action="store_true", help="one run goes on to the end, so that its memory can be watched"
    )
    given = parser.parse_args(arguments)
    options = harness.Options(
        out=given.out or Path(tempfile.mkdtemp(prefix="dsrl_chaos-")),
        faults=given.faults,
        seed=given.seed,
        jobs=given.jobs,
        plant=given.plant,
        longest_stop_s=given.longest_stop_s,
        minutes=given.minutes,
        heartbeat_s=given.heartbeat_timeout_s,
        long_run=given.long_run,
    )
    return harness.run(options)


if __name__ == "__main__":
    output.open_missing()
    output.detach_stderr()
    sys.exit(main(sys.argv[1:]))  # without `guard`, which ignores signals, and so would the runs
