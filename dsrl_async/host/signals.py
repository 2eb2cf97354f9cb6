"""Turns signals into a wish to stop."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hangup"}


class StopRequest:
    """Once it is made, SIGINT, SIGTERM and SIGHUP no longer end the process but set `reason`."""

    def __init__(self) -> None:
        self.reason: str | None = None
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup is to be respected
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or SIGNALS[signal.Signals(number)]
