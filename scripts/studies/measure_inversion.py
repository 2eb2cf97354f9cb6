"""Measures how well the sampler is inverted: demonstrated chunk -> noise -> chunk, by steps and refinements.

    python scripts/studies/measure_inversion.py [--episodes 12] [--checkpoint DIR]

Demonstrations are the scripted tabletop expert's, decisions five frames apart. For each number of Euler steps, and of
refinements of each reversed step, it prints a line of a table: the error of the round trip, which is the root mean
square over the executed actions in normalised units (median, 90 % and largest of the decisions); that of the noise,
which was 1 in training; and how often the network is evaluated to invert a chunk.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from dsrl_async.config.settings import PolicyConfig
from dsrl_async.envs.tabletop_spec import TABLETOP
from dsrl_async.host.command import guard
from dsrl_async.host.policies import policy_record
from dsrl_async.policies import NormalisedBatch
from dsrl_async.pretraining.tabletop_demonstrations import record_episode
from dsrl_async.pretraining.training import action_chunks

SEED = 1000
CHUNK = 5
STEPS, REFINEMENTS = (5, 10, 20), (0, 1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=12, help="demonstrations")
    parser.add_argument("--checkpoint", type=Path, help="the policy; the embedded one by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    attempts = (record_episode(SEED, index) for index in range(options.episodes))
    episodes = [attempt for attempt in attempts if attempt is not None]
    data = {name: torch.from_numpy(np.concatenate([episode[name] for episode in episodes])) for name in episodes[0]}
    print(
        "| steps | refinements | error: median | 90 % | largest | noise | evaluations |\n|---|---|---|---|---|---|---|"
    )
    for steps in STEPS:
        settings = PolicyConfig(denoise_steps=steps, checkpoint=options.checkpoint and str(options.checkpoint))
        record = policy_record(settings)
        policy = record.load(settings, torch.device("cpu"), TABLETOP.prompts, lambda: None)
        rows = torch.arange(0, len(data["state"]), CHUNK)
        batch = policy.batch(len(rows), int(policy.prompt_lengths.max()))
        assert isinstance(batch, NormalisedBatch)
        batch.images.copy_(data["images"][rows])
        batch.state.copy_(data["state"][rows])
        batch.fill_prompts(np.zeros(len(rows), np.int64))
        batch.encode()
        wanted = action_chunks(data["action"], data["episode"], policy.spec.action_horizon)[rows]
        for refinements in REFINEMENTS:
            batch.actions.copy_(wanted)
            batch.normalise()
            normalised = batch.normalised_actions[:, :CHUNK].clone()
            batch.invert(refinements)
            batch.denoise()
            error = (batch.normalised_actions[:, :CHUNK] - normalised).square().mean((1, 2)).sqrt()
            median, most = error.quantile(torch.tensor([0.5, 0.9])).tolist()
            noise = batch.noise.square().mean().sqrt().item()
            print(
                f"| {steps} | {refinements} | {median:.4f} | {most:.4f} | {error.max().item():.3f} | {noise:.2f} | "
                f"{steps * (1 + refinements)} |"
            )


if __name__ == "__main__":
    sys.exit(guard(main))
