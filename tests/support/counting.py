"""Environments that sleep and count their observations, so that a row which is missing, repeated or torn shows.

An observation's state holds who made it and its number; its picture follows from these. When the run ends as it should,
each environment says how many observations it has made.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsrl_async.config.load import validate
from dsrl_async.envs import ChunkOutcome, environment_spec
from dsrl_async.host.processes import Program
from dsrl_async.launch import command
from dsrl_async.run.supervisor.child import Kind
from dsrl_async.run.supervisor.supervisor import PROGRAMS
from dsrl_async.run.worker.worker import Lane, play
from dsrl_async.shm.arena import Arena

DECISION_S = 0.05
EPISODE_DECISIONS = 12
COUNTS = "counts.jsonl"
"""What the environments say at their end, in the directory that the variable `COUNTING` names."""
MARKS = 1000
"""Incarnations of a worker that are told apart within one of its group."""


def pictures(group: NDArray[Any], lane: NDArray[Any], mark: NDArray[Any], count: NDArray[Any]) -> NDArray[np.uint8]:
    """What the first pixels of observations are, [n, 8]."""
    columns = [
        group,
        lane,
        mark % 251,
        mark // 251 % 251,
        count % 251,
        count // 251 % 251,
        count * 7 % 253,
        mark * 3 % 253,
    ]
    return np.stack([np.asarray(column) % 256 for column in columns], axis=-1).astype(np.uint8)


class CountingEnvironment:
    def __init__(self, spec: Any, group: int, lane: int, mark: int) -> None:
        self.spec, self.group, self.lane, self.mark = spec, group, lane, mark
        self.count = self.decisions = 0

    def reset(self, seed: int, number: int = 0) -> int:
        self.decisions = 0
        return 0

    def step_chunk(self, action_chunk: NDArray[np.float32]) -> ChunkOutcome:
        time.sleep(DECISION_S)
        self.decisions += 1
        return ChunkOutcome(len(action_chunk), -1, False, truncated=self.decisions == EPISODE_DECISIONS)

    def observe(self, images: NDArray[np.uint8], sac_image: NDArray[np.uint8], state: NDArray[np.float32]) -> None:
        identity = self.group, self.lane, self.mark, self.count
        state[:4], state[4:] = identity, 0
        sac_image[:] = self.count % 256
        sac_image.reshape(-1)[:8] = pictures(*(np.array([number]) for number in identity))[0]
        self.count += 1

    def close(self) -> None:
        line = json.dumps([self.group, self.lane, self.mark, self.count]) + "\n"
        with open(Path(os.environ["COUNTING"]) / COUNTS, "a") as file:
            file.write(line)


def prepare(job: Mapping[str, Any]) -> None:
    """The workers share nothing."""


def main(job: Mapping[str, Any], prepared: None) -> None:
    arena, known = Arena.attach(job["arena"]), job["of_group"]
    mark = known["incarnation"] * MARKS + job["incarnation"]
    spec = environment_spec(validate({}).env.model_dump())
    environment = CountingEnvironment(spec, known["group"], job["number"], mark)
    lane = Lane(job["number"], job["incarnation"], job["seed"], job["env"], arena, environment)
    play(lane, job["wake_fd"], job["notify_fds"])


if __name__ == "__main__":
    sys.exit(command.main(sys.argv[1:], {**PROGRAMS, Kind.WORKER: Program("support.counting")}))
