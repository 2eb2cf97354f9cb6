"""A run in lock step, as in programs with vectorised environments, with which `bench end_to_end` compares.

`python -m dsrl_async.bench.systems.lock_step` takes the options of `launch` and does the same with the same supervisor,
environment workers and memory, but with `lock_step_process` in place of the inference process and the learner. It is
for measuring only: it writes no checkpoint at the end.
"""

from __future__ import annotations

import sys

from dsrl_async.host.command import guard
from dsrl_async.host.processes import Program
from dsrl_async.launch import command
from dsrl_async.run.supervisor.child import Kind
from dsrl_async.run.worker.template import WORKER

PROGRAMS = {Kind.INFERENCE: Program("dsrl_async.bench.systems.lock_step_process"), Kind.WORKER: WORKER}


if __name__ == "__main__":
    sys.exit(guard(lambda: command.main(sys.argv[1:], PROGRAMS)))
