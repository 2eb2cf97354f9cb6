"""This project's update as a measured process of compare_learner.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from learner_system import Updating, bind, serve

bind(json.loads(sys.argv[1])["threads"])

import numpy as np
import torch

from dsrl_async.config.settings import SacConfig
from dsrl_async.run.learner.compiling import compiled
from dsrl_async.sac import METRIC_NAMES
from dsrl_async.sac.agent import Batch, SacAgent


def load(settings: dict[str, Any]) -> Updating:
    torch.set_num_threads(settings["threads"])
    agent = SacAgent(SacConfig(**settings["sac"]), settings["horizon"], seed=settings["seed"])
    with np.load(settings["file"]) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    for name, network in (("actor", agent.actor), ("critic", agent.critic), ("critic", agent.target_critic)):
        with torch.no_grad():
            for parameter, value in network.named_parameters():
                value.copy_(arrays[f"{name}/{parameter}"])
    batch = Batch(**{name: arrays[name] for name in Batch._fields if name in arrays})
    random = agent.random_numbers(len(batch.reward))

    metrics = torch.zeros(len(METRIC_NAMES))

    def learn() -> None:
        metrics.copy_(agent.learn(batch, random, True))

    if settings["compile"]:
        before = agent.state_tensors()
        learn = compiled(learn)
        agent.load_state_tensors(before)

    def update() -> Callable[[], float]:
        random.draw_(agent.generator)
        learn()
        return lambda: float(metrics[0])

    return update


if __name__ == "__main__":
    serve(load)
