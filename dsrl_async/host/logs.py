"""The log of a process."""

from __future__ import annotations

import logging


def set_up(*handlers: logging.Handler, level: int = logging.INFO) -> None:
    """Log from `level` on: to `handlers`, or to stderr, which is the log file of a child process."""
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(message)s", handlers=list(handlers) if handlers else None
    )
