"""Finds out about an environment in a child process, so that the simulator and its OpenGL never enter this one.

What is known of an environment is asked for in the template of all environment workers, too, which then forks them, and
OpenGL does not survive a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from dsrl_async.envs.user import blamed
from dsrl_async.untrusted import in_one_line

PR_SET_PDEATHSIG = 1


def ask_in_a_child(function: Callable[[], Any], problem: str) -> Any:
    """What the function returns, which must be JSON-ready, when it is called in a fork of this process.

    Raises ValueError if it raises something there, or if the child ends without an answer: with the message of a
    ValueError that begins with `env.options`, else with `problem` and what happened.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or the child would have a copy of what is still to be written
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        _answer(function, problem, writing)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    ended = 0
    with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored, nobody can be waited for
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not said:
        how = f"was killed by {signal.Signals(-ended).name}" if ended < 0 else f"ended with exit status {ended}"
        raise ValueError(f"{problem}: the process that tried it {how}")
    answer = json.loads(said)
    if "refused" in answer:
        raise ValueError(answer["refused"])
    return answer["returned"]


def _answer(function: Callable[[], Any], problem: str, writing: int) -> None:
    """What the child does. It ends here, without what this process does at its end."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # if the parent is tired of waiting
        try:
            answer = {"returned": function()}
        except (Exception, SystemExit) as error:
            said = in_one_line(error)
            known = isinstance(error, ValueError) and said.startswith("env.options: ")
            answer = {"refused": said if known else f"{problem}: {blamed(error, __name__)}"}
            if not known:
                traceback.print_exception(error)
        with os.fdopen(writing, "w") as file:
            json.dump(answer, file)
        status = 0
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
