"""Compares what an agent can be told of its task (`sac.instruction`), on this machine.

    python scripts/studies/compare_instructions.py cost --updates 20
    python scripts/studies/compare_instructions.py probe --scenes 1500
    python scripts/studies/compare_instructions.py learn --decisions 2500 --seeds 0 1

cost    Updates of `none`, `task` (10 instructions) and `embedding` for one algorithm and configuration, interleaved in
        one process, each on a ring of its own with random rows. A line of JSON says of each the mean CPU time of an
        update, its ratio to that of `none`, its weights, and the bytes of a row.
probe   What a linear map reads out of the frozen policy's last prefix token, of the agent's picture, and of what a new
        agent's encoder makes of picture and state: which plate lies left (of two, so 0.5 is chance), and which of two
        instructions the policy was given. The token is read as the keys and values that it has in the last layer,
        linear maps of its normalised hidden state: of the last layer the policy computes no more. A line of JSON for
        each, with the width, and the accuracy on a quarter of the scenes, which the map was not fitted on.
learn   Runs of `two_plates.py`, whose pictures do not say which of two plates is asked for, with each of `none`, `task`
        and `embedding`; then their success rate. A line of JSON for each run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dsrl_async.config.files import read_config
from dsrl_async.config.load import validate
from dsrl_async.config.settings import Config
from dsrl_async.envs.tabletop import TabletopEnvironment
from dsrl_async.pi0.config import EMBEDDED_POLICY
from dsrl_async.pi0.policy import Pi0Batch, Pi0Policy
from dsrl_async.plan.measure import fill_ring
from dsrl_async.run import preflight
from dsrl_async.run.learner.learner import make_agent
from dsrl_async.run.learner.na import make_na_updates
from dsrl_async.run.learner.sampling import InPlace
from dsrl_async.run.learner.updates import Updates
from dsrl_async.run.preflight.learner_memory import row_bytes, row_of
from dsrl_async.sac.networks import Actor, preprocess_image

CPU = torch.device("cpu")
KINDS = ("none", "task", "embedding")
TASKS, RING_ROWS, ROWS = 10, 512, 16


def cost(options: argparse.Namespace) -> None:
    run = preflight.check_run(validate(read_config(options.config)))
    policy = None
    if options.algorithm == "na":
        policy = run.policy.load(run.config.policy, CPU, run.spec.prompts, lambda: None)
    updates, figures = {}, {}
    for kind in KINDS:
        fields = set(run.config.sac.model_fields_set) - {"instruction_dim"}
        chosen = {"instruction": kind, "algorithm": options.algorithm, "train_actor_steps": 0}
        sac = type(run.config.sac).model_validate({**run.config.sac.model_dump(include=fields), **chosen})
        sac = sac.with_widths(run.spec.state_dim, run.policy.spec.action_dim, TASKS)
        replay = run.config.replay.model_copy(update={"capacity": RING_ROWS})
        config = run.config.model_copy(update={"sac": sac, "replay": replay, "actors": 1})
        of_actions = row_of(config, run.policy.spec)
        source = InPlace(fill_ring(sac, RING_ROWS, sac.noise_width(run.horizon), of_actions))
        table = torch.randn(TASKS, sac.instruction_dim) if sac.instruction_dim else None
        if policy is None:
            updates[kind] = Updates(make_agent(config, run.horizon, CPU), source, sac.batch_size, table)
        else:
            updates[kind] = make_na_updates(config, policy, CPU, source, torch.float32, table)
        agent = updates[kind].agent
        weights = agent.actor.flat.numel() + agent.critic.flat.numel()
        figures[kind] = {"weights": weights, "row_bytes": row_bytes(config, run.horizon, of_actions)}
    times = dict.fromkeys(KINDS, 0.0)
    for number in range(options.updates + 2):
        for kind, one in updates.items():
            begin = time.process_time()
            one.refresh()
            one.draw_batch()
            one.run()
            times[kind] += (time.process_time() - begin) * (number >= 2)  # the first two warm up
    for kind in KINDS:
        cpu_ms = {"update_cpu_ms": 1e3 * times[kind] / options.updates, "cpu_to_none": times[kind] / times["none"]}
        found = {key: round(value, 3) for key, value in {**cpu_ms, **figures[kind], "load": os.getloadavg()[0]}.items()}
        print(json.dumps({"config": options.config, "algorithm": options.algorithm, "instruction": kind, **found}))


def accuracy(features: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Of a ridge regression to -1 and 1, fitted on three quarters, on the rest."""
    fitted = len(labels) * 3 // 4
    x = (features - features[:fitted].mean(0)) / (features[:fitted].std(0) + 1e-6)
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    y = 2.0 * labels - 1.0
    # in the form whose matrix is the smaller one; the penalty is a hundredth of the mean square, for each scene
    kernel = x[:fitted] @ x[:fitted].T + 0.01 * fitted * np.eye(fitted)
    said = x[fitted:] @ (x[:fitted].T @ np.linalg.solve(kernel, y[:fitted]))
    return float(((said > 0) == (labels[fitted:] == 1)).mean())


def probe(options: argparse.Namespace) -> None:
    config, table = Config(), TabletopEnvironment("swap2")
    prompts = tuple(f"put the block on the {colour} plate" for colour in ("red", "yellow"))
    run = preflight.check_run(config)
    policy = run.policy.load(config.policy, CPU, prompts, lambda: None)
    batch = policy.batch(ROWS, int(policy.prompt_lengths.max()))
    assert isinstance(policy, Pi0Policy)
    assert isinstance(batch, Pi0Batch)
    actor = Actor(run.config.sac, run.horizon)
    rng, agent_image = np.random.default_rng(0), np.zeros((ROWS, 64, 64, 3), np.uint8)
    found: dict[str, list[NDArray[np.float64]]] = {"token": [], "picture": [], "encoder": []}
    labels: dict[str, list[NDArray[np.int64]]] = {"left": [], "instruction": []}
    for _ in range(options.scenes // ROWS):
        left, told = np.zeros(ROWS, np.int64), rng.integers(0, 2, ROWS)
        for row in range(ROWS):
            table.reset(int(rng.integers(2**31)))
            table.observe(batch.images[row].numpy(), agent_image[row], batch.state[row].numpy())
            left[row] = table.red_plate
        batch.fill_prompts(told)
        batch.encode()
        keys_values, mask = batch.prefix()
        last = keys_values.shape[4] - policy.spec.state_tokens - mask.shape[1] + mask.sum(1) - 1
        token = torch.stack([keys_values[row, -1, :, :, place] for row, place in enumerate(last.tolist())])
        pixels = preprocess_image(torch.from_numpy(agent_image), run.config.sac)
        with torch.no_grad():
            encoded = actor.encoder(pixels, batch.state)
        for name, values in (("token", token), ("picture", pixels), ("encoder", encoded)):
            found[name].append(values.flatten(1).double().numpy())
        labels["left"].append(left)
        labels["instruction"].append(told)
    for name, parts in found.items():
        features = np.concatenate(parts)
        right = {label: round(accuracy(features, np.concatenate(values)), 3) for label, values in labels.items()}
        print(json.dumps({"of": name, "width": features.shape[1], "scenes": len(features), **right}), flush=True)


def learn(options: argparse.Namespace) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    for seed in options.seeds:
        for kind in options.kinds:
            run_dir = Path(options.out) / f"{kind}-{seed}"
            settings = {
                "env.name": "two_plates:make_environment",
                "policy.checkpoint": EMBEDDED_POLICY,
                "sac.instruction": kind,
                "seed": seed,
                "max-decisions": options.decisions,
                "log.console": "off",
                "run-dir": run_dir,
            }
            arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
            command = [sys.executable, "-m", "dsrl_async.launch", *arguments]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            summary = json.loads(done.stdout.splitlines()[-1])
            figures = {key: summary.get(key) for key in ("decisions", "episodes", "success_rate", "wall_s")}
            print(json.dumps({"instruction": kind, "seed": seed, **figures, "load": os.getloadavg()[0]}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    costs = parts.add_parser("cost")
    costs.add_argument("--config", default="tabletop", help="configuration of the run (default: tabletop)")
    costs.add_argument("--algorithm", default="sac", choices=["sac", "na"])
    costs.add_argument("--updates", type=int, default=20, help="of each kind (default: 20)")
    costs.set_defaults(function=cost)
    probing = parts.add_parser("probe")
    probing.add_argument("--scenes", type=int, default=1500, help="(default: 1500)")
    probing.set_defaults(function=probe)
    learning = parts.add_parser("learn")
    learning.add_argument("--decisions", type=int, default=2500, help="of each run (default: 2500)")
    learning.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    learning.add_argument("--seeds", type=int, nargs="+", default=[0])
    learning.add_argument("--out", default="runs/instructions", help="where the runs are written")
    learning.set_defaults(function=learn)
    torch.set_num_threads(1)
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
