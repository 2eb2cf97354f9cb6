"""Child processes: started as modules with one JSON argument, inheriting the descriptors they need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def start(module: str, job: dict[str, Any], fds: Iterable[int], log: Path, threads: int) -> subprocess.Popen[bytes]:
    """Run `python -m module '<json>'` in a session of its own, so that Ctrl-C reaches the supervisor only.

    `threads` limits the process's numeric libraries; its output is appended to `log`.
    """
    environment = os.environ | {name: str(threads) for name in THREAD_VARIABLES}
    argument = json.dumps({**job, "parent": os.getpid(), "threads": threads})
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, argument],
            pass_fds=tuple(fds),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=environment,
        )


def wait_all(children: Iterable[subprocess.Popen[bytes]], deadline: float) -> bool:
    """Wait until all have ended; False if some still ran at `deadline` (of time.monotonic)."""
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
    return True


def kill_all(children: Iterable[subprocess.Popen[bytes]]) -> None:
    """SIGKILL and reap; at once."""
    children = list(children)
    for child in children:
        child.kill()
    for child in children:
        child.wait()


def last_lines(log: Path, count: int = 3) -> str:
    """The end of a log file in one line, for an error message."""
    lines = log.read_text(errors="replace").strip().splitlines()[-count:] if log.is_file() else []
    return " | ".join(line.strip() for line in lines)
