"""What signals ask of a command: to stop, or to save what there is."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "hangup",
    signal.SIGQUIT: "quit",
}
"""Signals that ask to stop, and what the reason is called."""
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""With these, batch systems announce that time is running out (`sbatch --signal=USR1@60`, `qsub -notify`)."""


class StopRequest:
    """Once it is made, the signals in `SIGNALS` and `WARNINGS` no longer end the process.

    Attributes:
        reason: of the first signal that asked to stop; None before.
        warnings: how many of `WARNINGS` have come.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.warnings = 0
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup is to be respected
                signal.signal(number, self._note_stop)
        for number in WARNINGS:
            signal.signal(number, self._note_warning)

    def _note_stop(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or SIGNALS[signal.Signals(number)]

    def _note_warning(self, number: int, frame: FrameType | None) -> None:
        self.warnings += 1


def survive_warnings() -> None:
    """Let a warning not end this process, which does not answer it, or not yet."""
    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN)
