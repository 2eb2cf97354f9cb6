"""The memory that a learner is told to need against what its tensors take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pi0.test_memory import Allocations, kept_bytes

from dsrl_async.config.load import validate
from dsrl_async.envs.shipped import TABLETOP
from dsrl_async.run.learner.sampling import Mirror
from dsrl_async.run.learner.updates import Updates
from dsrl_async.run.preflight.learner_memory import agent_bytes, batch_bytes, mirror_bytes, update_bytes
from dsrl_async.sac.agent import SacAgent
from dsrl_async.shm.memory import create_memory
from dsrl_async.shm.replay import ReplayRing

HORIZON = 10


@pytest.mark.parametrize(
    "sac",
    [
        {},
        {"batch_size": 512, "augmentation": "crop_colour", "critic_in_actor_loss": "after"},
        {"augmentation": "crop"},
        {"cameras": [1, 0], "image_pool": 1, "augmentation": "crop_colour"},
        {"image_pool": 1, "conv_channels": [16, 32], "conv_kernels": [4, 3], "conv_strides": [4, 2]},
        {"noise_layout": "per_slot", "actor_layer_norm": True, "critic_layer_norm": False, "state_latent_dim": 0},
        {"num_q_heads": 200},
        {"conv_padding": 100},
        {"batch_size": 512, "image_latent_dim": 2000, "state_latent_dim": 2000, "hidden_dims": [2000]},
    ],
)
def test_memory_of_a_learner(sac: dict[str, Any]) -> None:
    """All is made on the meta device; what an update takes is an upper limit, but not a far one."""
    config = validate({"actors": 3, "replay": {"capacity": 700, "warmup_decisions": 512}, "sac": sac})
    ring = ReplayRing(create_memory(config, TABLETOP, HORIZON))
    with torch.device("meta"):
        agent = SacAgent(config.sac, HORIZON, "meta")
    mirror = Mirror(ring, agent.device)
    updates = Updates(agent, mirror, config.sac.batch_size)
    of_mirror = kept_bytes([mirror.columns, mirror.table, mirror.following])
    kept = [agent._tensors(), agent.actor.flat_grad, agent.critic.flat_grad, agent._not_computed]
    batch = [updates.random, updates.positions, updates.batch]
    of_agent, of_batch = kept_bytes(kept), kept_bytes(batch)
    with Allocations([kept, batch, mirror.columns, mirror.table, mirror.following, mirror.size]) as allocations:
        updates.whole(True)
    assert of_mirror == mirror_bytes(config, HORIZON)
    assert of_agent == pytest.approx(agent_bytes(config.sac, HORIZON), abs=100)
    assert of_batch == batch_bytes(config.sac, HORIZON)
    assert allocations.peak <= update_bytes(config.sac, HORIZON) <= 3 * allocations.peak
