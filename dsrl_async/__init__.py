"""Asynchronous Diffusion Steering via Reinforcement Learning (DSRL) for flow-matching robot policies."""

import sys
from types import TracebackType

__version__ = "0.1.0"


def _say(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What an uncaught exception says: Ctrl-C, while a command imports its modules for instance, is no mistake."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if sys.argv[:1] == ["-m"]:  # so it is called while `python -m dsrl_async.COMMAND` looks for the command
    sys.excepthook = _say
