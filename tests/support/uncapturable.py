"""A run whose inference process believes that it has a GPU, and where no capture succeeds.

python -m support.uncapturable ARGUMENTS-OF-LAUNCH
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch

from dsrl_async.host import graphs
from dsrl_async.host.command import guard
from dsrl_async.host.processes import Program
from dsrl_async.launch import command
from dsrl_async.run.inference import policies, server
from dsrl_async.run.inference.steering import SteeredPolicy
from dsrl_async.run.supervisor.child import Kind
from dsrl_async.run.supervisor.supervisor import PROGRAMS


@contextmanager
def graphs_of_a_gpu(setting: Literal["auto", "off"], device: torch.device, state: np.ndarray) -> Iterator[bool]:
    with graphs.graphs_of(setting, torch.device("cuda"), state) as wanted:
        yield wanted


def capture(policy: SteeredPolicy, pool: object) -> None:
    raise graphs.CaptureError("no CUDA graphs of anything could be captured: planted")


if __name__ == "__main__":
    if sys.argv[1].startswith("{"):  # the job of a child
        policies.graphs_of = graphs_of_a_gpu
        SteeredPolicy.capture = capture  # type: ignore[method-assign, assignment]
        server.main(sys.argv[1])
    else:
        programs = {**PROGRAMS, Kind.INFERENCE: Program("support.uncapturable")}
        sys.exit(guard(lambda: command.main(sys.argv[1:], programs)))
