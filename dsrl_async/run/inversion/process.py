"""The process that inverts a run's demonstrations before the others start: it has the policy to itself, and ends.

It writes `<run>/demonstrations.safetensors`, which the supervisor, who must not import torch, puts into shared memory.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import torch

from dsrl_async.config.load import validate
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.host.device import resolve_device
from dsrl_async.host.processes import FATAL, begin_child
from dsrl_async.policies.find import policy_record
from dsrl_async.run.inversion.rows import make_rows, write_rows

logger = logging.getLogger(__name__)


def main(argument: str) -> None:
    """`argument` is the JSON that `supervisor.demonstrations` wrote."""
    job = begin_child(argument, "inversion")
    torch.set_num_threads(job["threads"])
    config, spec = validate(job["config"]), EnvironmentSpec.of_plain(job["spec"])
    begin = time.monotonic()
    try:
        device = resolve_device(config.device)
        policy = policy_record(config.policy).load(config.policy, device, spec.prompts, lambda: None)
        write_rows(Path(job["run_dir"]), make_rows(config, spec, policy, job["rows"], logger.info))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(FATAL)
    logger.info("the demonstrations took %.0f s", time.monotonic() - begin)


if __name__ == "__main__":
    main(sys.argv[1])
