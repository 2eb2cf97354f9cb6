"""A child process of the supervisor and its history."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from dsrl_async.host import processes


class Kind(StrEnum):
    """What a child is. The values are the public names: in logs, metrics and the summary."""

    INFERENCE = "inference"
    LEARNER = "learner"
    TEMPLATE = "template"
    WORKER = "actor"
    """An environment worker of the training, of which there is one for each lane."""
    EVALUATION = "evaluation"
    """An environment worker of the evaluation."""
    GROUP = "group"
    """A group of environment workers with an inference process of its own (`groups`)."""
    DOWNLINK = "downlink"
    """Takes what groups send, where the learner is."""
    UPLINK = "uplink"
    """Sends what the learner needs, from where the group is. There is one process of each other kind."""


@dataclass(eq=False)
class Child:
    """A process that is started, watched and replaced, through all of its incarnations."""

    kind: Kind
    logs: Path
    """The directory of its log."""
    number: int = 0
    """Counts the environment workers of one kind; 0 for the other kinds."""
    popen: processes.Process | None = field(default=None, init=False)
    """None while there is none, and a successor is to be started."""
    incarnation: int = field(default=0, init=False)
    started: float = field(default=0.0, init=False)
    """When the start of this incarnation began, by time.monotonic."""
    log_start: int = field(default=0, init=False)
    """Size of the log at that time."""
    quick_failures: int = field(default=0, init=False)
    """How many incarnations in a row have failed soon after their start."""
    restarts: int = field(default=0, init=False)
    """How often it was replaced."""

    @property
    def name(self) -> str:
        """`actor-007` for the environment worker of lane 7, `evaluation-000`, and the kind for the others."""
        if self.kind is Kind.GROUP:
            return f"group-{self.number}"
        return f"{self.kind}-{self.number:03d}" if self.is_worker else self.kind.value

    @property
    def is_worker(self) -> bool:
        return self.kind in (Kind.WORKER, Kind.EVALUATION)

    @property
    def log(self) -> Path:
        return self.logs / f"{self.name}.log"

    def begin(self) -> None:
        """Begin a new incarnation, which is about to be started."""
        self.incarnation += 1
        self.started = time.monotonic()
        self.log_start = self.log.stat().st_size if self.log.is_file() else 0
