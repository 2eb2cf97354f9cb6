"""Policy and learner of a run in lock step, in one process: all environments step, it learns, it answers all of them.

Everything but the order is the run's own: `worker`, `inference.InferenceServer`, `learner.Learner`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dsrl_async.bench.systems.barrier import serve_in_lock_step
from dsrl_async.config.load import read_yaml, validate
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.host.device import resolve_device
from dsrl_async.host.processes import begin_child
from dsrl_async.host.stages import stages_of
from dsrl_async.policies.find import policy_record
from dsrl_async.run.inference.policies import load_policies
from dsrl_async.run.learner.learner import Learner, learner_device
from dsrl_async.run.supervisor.serial import join
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters


def learn_what_is_due(learner: Learner) -> None:
    while learner.due() and learner.update(learner.launch_size()):
        pass
    learner.save_when_due()


def main(argument: str) -> None:
    """`argument` is the job of `run.inference.server.main`."""
    job = begin_child(argument, "lock_step")
    torch.set_num_threads(job["threads"])
    run_dir = Path(job["run_dir"])
    config = validate(read_yaml(run_dir / "config.yaml"))
    config.inference.buckets = [config.actors]  # one batch for all, without padding
    arena = Arena.attach(job["arena"])
    device, learners_device = resolve_device(config.device), learner_device(config)
    spec, stage = EnvironmentSpec.of_plain(job["spec"]), stages_of(arena, "inference", device)
    record = policy_record(config.policy)
    policies = load_policies(config, spec, device, record, Counters(arena), stage)
    horizon = record.spec.action_horizon
    server, learner = join(config, arena, policies, horizon, learners_device, run_dir, lambda lanes: None)
    serve_in_lock_step(server, job, lambda: learn_what_is_due(learner))


if __name__ == "__main__":
    main(sys.argv[1])
