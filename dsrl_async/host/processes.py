"""Child processes: started as modules with one JSON argument, inheriting the descriptors they need."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import setproctitle

from dsrl_async.host import logs, tether

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
WAIT_POLICY = {"OMP_WAIT_POLICY": "PASSIVE"}
"""A thread that waits for others of its team sleeps. By default it spins on a core that the one it waits for may need:
other processes want the cores, too (docs/measurements/threads.md)."""
LAST_BYTES, LONGEST_MESSAGE = 1 << 16, 2000
"""How much of a log is read for its last line, and how long that may be."""
PR_SET_NAME = 15
REAP_S = 5.0
"""A killed process that is still there after this many seconds is stuck in the kernel, and left to it."""


FATAL = 3
"""Exit code of a child whose successor would fail likewise; the last line of its log says why."""


class Program(NamedTuple):
    """What a child process runs."""

    module: str
    settings: Mapping[str, Any] = {}
    """Values of JSON that the process is told beside its job."""
    fds: Sequence[int] = ()
    """Descriptors that it inherits beside those of its job."""


class Process(Protocol):
    """A child process: a `subprocess.Popen`, or one that was forked (`template.Forked`)."""

    pid: int
    returncode: Any  # int | None; but a protocol's attribute must have the very type of theirs

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


def start(module: str, job: dict[str, Any], fds: Iterable[int], log: Path, threads: int) -> subprocess.Popen[bytes]:
    """Run `python -m module '<json>'`, see `start_tied`; what it is told are the `job`, `parent` and `threads`.

    `threads` limits the process's numeric libraries, whose `WAIT_POLICY` the user's environment can override.
    """
    environment = WAIT_POLICY | os.environ | {name: str(threads) for name in THREAD_VARIABLES}
    argument = json.dumps({**job, "parent": os.getpid(), "threads": threads})
    return start_tied(["-m", module, argument], fds, log, environment)


def start_tied(
    arguments: Sequence[str], fds: Iterable[int], log: Path, environment: Mapping[str, str], stdin: int | None = None
) -> subprocess.Popen[bytes]:
    """Run Python with `arguments` in a session of its own, so that Ctrl-C reaches only the supervisor.

    Its output is appended to `log`, and it reads `stdin`, a descriptor, if there is one. From its first moment on, the
    process is tied to this one, see `tether`.
    """
    tied = [sys.executable, "-I", "-S", tether.__file__, str(os.getpid())]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, tether.LEFT_TO_THE_PARENT)  # until the child ignores them
    output = logs.open_log(log)
    try:
        return subprocess.Popen(
            [*tied, sys.executable, *arguments],
            pass_fds=tuple(fds),
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=environment,
        )
    finally:
        os.close(output)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def begin_child(argument: str, name: str) -> dict[str, Any]:
    """Prepare a child process that `start` has started, its name and its log; returns its job."""
    job: dict[str, Any] = json.loads(argument)
    prepare_child(job["parent"])
    name_process(name, name)
    logs.set_up()
    return job


def prepare_child(parent: int, answers_signals: bool = False) -> None:
    """Tie this process to the process `parent`, see `tether`, and have its log say all there is to say.

    Unless it `answers_signals` itself, it leaves them to the parent.

    A process that `start` has started is tied already; one that was forked, or started otherwise, is from here on.
    """
    for output in (sys.stdout, sys.stderr):  # what one process prints is not printed again by those forked from it
        cast(io.TextIOWrapper, output).reconfigure(line_buffering=True)
    faulthandler.enable()  # what crashes in C code leaves the Python lines that led there
    tether.tie_to(parent)
    if not answers_signals:
        tether.leave_to_the_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def name_process(name: str, title: str) -> None:
    """Call this process `name`, of at most 15 letters, in `top`, and `dsrl_async: TITLE` in `ps`, `htop` and
    `nvidia-smi`, which show how a process was started otherwise: "python" is no help to who looks for the busy one.
    """
    # The title takes the place of the arguments, and not of the environment as well, which batch systems may look at.
    os.environ.setdefault("SPT_NOENV", "1")
    setproctitle.setproctitle(f"dsrl_async: {title}")
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())  # which setproctitle has set to the title's beginning


def be_killed_like_others() -> None:
    """Have this process no likelier to be killed than others where memory runs out: Ray marks those it starts."""
    adjustment = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError, ValueError):
        if int(adjustment.read_text()) > 0:
            adjustment.write_text("0")


def raise_descriptor_limit() -> int:
    """Allow this process as many open files as the system does; returns how many."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def wait_all(children: Iterable[Process], deadline: float) -> bool:
    """Wait until all have ended; returns False if some still ran at `deadline` (as of time.monotonic)."""
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
    return True


def kill_all(children: Iterable[Process]) -> None:
    """Send SIGKILL to all of them, then reap them."""
    children = list(children)
    for child in children:
        child.kill()
    wait_all(children, time.monotonic() + REAP_S)


def how_ended(code: int) -> str:
    """A process's return code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # most real-time signals have no name
        return f"killed by signal {-code}"


def last_line(log: Path, since: int = 0, otherwise: str = "it left no message") -> str:
    """The last line of a log file after its first `since` bytes, for a message; cut where it is very long."""
    text = ""
    with contextlib.suppress(OSError):
        fd = os.open(log, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            file.seek(max(since, os.fstat(fd).st_size - LAST_BYTES))
            text = file.read(LAST_BYTES).decode(errors="replace").strip()
    return text.splitlines()[-1].strip()[-LONGEST_MESSAGE:] if text else otherwise
