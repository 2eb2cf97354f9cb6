"""The log of a process."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from dsrl_async.host.files import open_to_append


def set_up(*handlers: logging.Handler, level: int = logging.INFO) -> None:
    """Log from `level` on: to `handlers`, or to stderr, which is the log file of a child process."""
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(message)s", handlers=list(handlers) if handlers else None
    )


def open_log(path: Path) -> int:
    """Open a log to append to it, or /dev/null where that cannot be: no process waits for its log, or ends without it.

    Its directory is made anew if it is missing.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        return open_to_append(path)
    except OSError:
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)


class LogFile(logging.StreamHandler):
    """Appends messages to a file. Those that cannot be written, as on a full disk, are missing, and nothing else."""

    def __init__(self, path: Path) -> None:
        super().__init__(os.fdopen(open_log(path), "a", encoding="utf-8"))

    def handleError(self, record: logging.LogRecord) -> None:
        pass
