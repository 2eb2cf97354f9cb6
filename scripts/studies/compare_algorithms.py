"""Compares a gradient update of DSRL-NA with one of DSRL-SAC, on this machine, with the policy and settings of a run.

The updates of three systems are interleaved in one process, each on a ring of its own with random rows:
  sac     DSRL-SAC
  encode  DSRL-NA, where the policy encodes the observations of every batch
  keep    DSRL-NA, where it has encoded each row once (`learner.policy_prefixes: keep`)
A line of JSON says of each the mean CPU time and wall time of an update, with the noise critic's steps that come with
it (CPU time is lengthened less by other programs), its ratio to DSRL-SAC's, and the bytes of a row of the ring and of a
kept prefix. The last line has the policy's own CPU time, by the row. Not measured: anything on a GPU.

    python scripts/studies/compare_algorithms.py --updates 20
    python scripts/studies/compare_algorithms.py --config configs/libero_spatial_small.yaml --updates 4
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Callable

import torch

from dsrl_async.config.files import read_config
from dsrl_async.config.load import validate
from dsrl_async.config.settings import Config
from dsrl_async.plan.measure import fill_ring
from dsrl_async.policies import FrozenPolicy
from dsrl_async.run import preflight
from dsrl_async.run.learner.learner import make_agent
from dsrl_async.run.learner.na import make_na_updates
from dsrl_async.run.learner.sampling import InPlace
from dsrl_async.run.learner.updates import Updates
from dsrl_async.run.preflight import CheckedRun
from dsrl_async.run.preflight.learner_memory import row_bytes, row_of

CPU = torch.device("cpu")
RING_ROWS = 512


def with_settings(config: Config, algorithm: str, prefixes: str) -> Config:
    sac = config.sac.model_copy(update={"algorithm": algorithm, "train_actor_steps": 0})
    learner = config.learner.model_copy(update={"policy_prefixes": prefixes})
    replay = config.replay.model_copy(update={"capacity": RING_ROWS})
    return config.model_copy(update={"sac": sac, "learner": learner, "replay": replay, "actors": 1})


def make_updates(config: Config, run: CheckedRun, policy: FrozenPolicy) -> Updates:
    of_actions = row_of(config, run.policy.spec)
    ring = fill_ring(config.sac, RING_ROWS, config.sac.noise_width(run.horizon), of_actions)
    if config.sac.algorithm == "na":
        return make_na_updates(config, policy, CPU, InPlace(ring), torch.float32)
    return Updates(make_agent(config, run.horizon, CPU), InPlace(ring), config.sac.batch_size)


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of CPU time and by the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tabletop", help="configuration of the run (default: tabletop)")
    parser.add_argument("--updates", type=int, default=20, help="of each system (default: 20)")
    parser.add_argument("--threads", type=int, default=1, help="(default: 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = preflight.check_run(validate(read_config(arguments.config)))
    config = run.config
    policy = run.policy.load(config.policy, CPU, run.spec.prompts, lambda: None)
    systems = {"sac": ("sac", "encode"), "encode": ("na", "encode"), "keep": ("na", "keep")}
    settings = {name: with_settings(config, *chosen) for name, chosen in systems.items()}
    updates = {name: make_updates(config, run, policy) for name, config in settings.items()}
    for one in updates.values():
        one.refresh()
        update(one)
    times = dict.fromkeys(systems, (0.0, 0.0))
    for _ in range(arguments.updates):
        for name, one in updates.items():
            cpu, wall = timed(functools.partial(update, one))
            times[name] = times[name][0] + cpu / arguments.updates, times[name][1] + wall / arguments.updates
    needs, of_actions = run.policy.needs, row_of(settings["keep"], run.policy.spec)
    assert needs.prefix_bytes is not None
    for name, (cpu, wall) in times.items():
        figures = {
            "update_cpu_ms": cpu,
            "update_ms": wall,
            "cpu_to_sac": cpu / times["sac"][0],
            "row_bytes": row_bytes(settings[name], run.horizon, None if name == "sac" else of_actions),
            "prefix_bytes": needs.prefix_bytes(config.policy, False, needs.longest_prompt) if name == "keep" else 0,
            "load": os.getloadavg()[0],
        }
        rounded = {key: round(value, 2) for key, value in figures.items()}
        print(json.dumps({"config": arguments.config, "system": name, **rounded}), flush=True)
    rows = config.learner.policy_rows
    batch = policy.batch(rows, int(policy.prompt_lengths.max()))
    halves = {"encode": batch.encode, "denoise": batch.denoise}
    of_row = {name: round(sum(timed(half)[0] for _ in range(5)) / 5 / rows, 3) for name, half in halves.items()}
    print(json.dumps({"config": arguments.config, "policy_cpu_ms_by_row": of_row}))


def update(updates: Updates) -> None:
    assert updates.draw_batch()
    updates.run()


if __name__ == "__main__":
    main()
