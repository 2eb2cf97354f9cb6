"""A child process of the supervisor and its history."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dsrl_async.host import processes


@dataclass
class Child:
    """A process and its history; an actor's name is `actor-NUMBER`."""

    name: str
    log: Path
    started: float
    log_start: int  # size of the log when this incarnation was started
    popen: processes.Process = field(init=False)
    incarnation: int = 1
    quick_failures: int = 0
    episodes: int = 0  # of an actor's lane, when this incarnation was started

    @property
    def is_actor(self) -> bool:
        return self.name.startswith("actor-")

    @property
    def number(self) -> int:
        """Of an actor."""
        return int(self.name.removeprefix("actor-"))
