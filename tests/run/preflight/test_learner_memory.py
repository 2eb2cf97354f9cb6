"""The memory that a learner is told to need against what its tensors take."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from pi0.test_memory import Allocations, kept_bytes

from dsrl_async.config.load import validate
from dsrl_async.config.settings import ConfigError
from dsrl_async.envs.shipped import TABLETOP
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.policies.find import policy_record
from dsrl_async.policies.pi0 import pi0_needs
from dsrl_async.run import preflight
from dsrl_async.run.learner.na import KeptPrefixes, NaUpdates, PolicyFlow
from dsrl_async.run.learner.sampling import InPlace, Mirror
from dsrl_async.run.learner.updates import Updates
from dsrl_async.run.preflight.gpu_memory import describe, learner_need
from dsrl_async.run.preflight.learner_memory import (
    agent_bytes,
    batch_bytes,
    checkpoint_bytes,
    mirror_bytes,
    policy_copy,
    prefixes_bytes,
    row_bytes,
    row_of,
    update_bytes,
)
from dsrl_async.run.preflight.policy import check_algorithm
from dsrl_async.sac.agent import SacAgent
from dsrl_async.sac.na import NaAgent
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


def test_what_rows_take_is_told_beforehand() -> None:
    run = preflight.check_run(validate({"sac": {"algorithm": "na"}, "replay": {"capacity": 20_000}}))
    told = preflight.memory_of_algorithm(run)
    assert told is not None
    assert "a row of the replay ring takes 37.1 kB, and replay.capacity 0.7 GiB" in told
    assert preflight.memory_of_algorithm(preflight.check_run(validate({}))) is None
    plain = preflight.check_run(validate({"replay": {"capacity": 20_000}}))
    needs = [
        preflight.memory_needed(each.config, each.environment, each.spec, each.policy.needs) for each in (run, plain)
    ]
    assert needs[0].shared - needs[1].shared == pytest.approx(20_000 * 24_600, rel=0.01)
    assert needs[0].agent > needs[1].agent


def test_a_policy_without_normalised_actions_is_refused() -> None:
    config = validate({"sac": {"algorithm": "na"}})
    run = preflight.check_run(config)
    theirs = dataclasses.replace(run.policy, type="my_policy:MyPolicy", normalised=False)
    with pytest.raises(ConfigError, match=r"sac\.algorithm: na .* which a Pi0 gives and my_policy:MyPolicy does not"):
        check_algorithm(config, theirs)
    check_algorithm(validate({}), theirs)
    with pytest.raises(ConfigError, match=r"learner\.compile cannot fuse an update of sac\.algorithm na"):
        validate({"sac": {"algorithm": "na"}, "learner": {"compile": True}})


@pytest.mark.parametrize(
    "sac", [{}, {"augmentation": "crop", "noise_layout": "per_slot", "num_q_heads": 2}, {"batch_size": 512}]
)
def test_memory_of_a_learner_of_dsrl_na(sac: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As above; what the policy takes is `test_memory_of_the_policys_copy`'s."""
    sac = {"algorithm": "na", **sac}
    config = validate({"actors": 3, "replay": {"capacity": 700, "warmup_decisions": 512}, "sac": sac})
    of_actions = row_of(config, policy_record(config.policy).spec)
    assert of_actions == (5, 7, 2, 64)
    memory = create_memory(config, TABLETOP, HORIZON)
    ring = ReplayRing(memory)
    assert row_bytes(config, HORIZON, of_actions) == pytest.approx(
        sum(rows.nbytes for rows in ring.rows.values()) / 699, abs=1
    )
    with torch.device("meta"):
        agent = NaAgent(config.sac, HORIZON, 5, 7, "meta")
    mirror = Mirror(ring, agent.device)
    monkeypatch.setattr(PolicyFlow, "__init__", lambda *_: None)
    monkeypatch.setattr(PolicyFlow, "keeps", False, raising=False)
    monkeypatch.setattr(PolicyFlow, "__call__", lambda _, seen, states, noise, slots: noise.new_zeros(len(noise), 35))
    updates = NaUpdates(agent, mirror, config.sac.batch_size, PolicyFlow(None, config))  # type: ignore[arg-type]
    assert mirror.seen is not None
    columns = [*mirror.columns, *mirror.seen]
    assert kept_bytes([columns, mirror.table, mirror.following]) == mirror_bytes(config, HORIZON, of_actions)
    gradients = [agent.actor.flat_grad, agent.critic.flat_grad, agent.noise_critic.flat_grad]
    kept = [agent._tensors(), gradients, agent._not_computed]
    batch = [updates.random, updates.positions, updates.batch, updates.next_seen]
    batch += [updates.distilling, updates.observations, updates.seen]
    assert kept_bytes(kept) == pytest.approx(agent_bytes(config.sac, HORIZON, of_actions), abs=100)
    assert kept_bytes(batch) == batch_bytes(config.sac, HORIZON, of_actions)
    for function in updates.functions():
        with Allocations([kept, batch, columns, mirror.table, mirror.following, mirror.size]) as allocations:
            function()
        assert allocations.peak <= update_bytes(config.sac, HORIZON, of_actions)
    assert checkpoint_bytes(config, HORIZON, of_actions) > checkpoint_bytes(config, HORIZON)


def test_memory_of_the_policys_copy() -> None:
    """A full-size Pi0 a second time, on the learner's GPU; nothing for DSRL-SAC, and no weights in serial mode."""
    needs = pi0_needs(Pi0Config())
    config = validate({"sac": {"algorithm": "na"}, "policy": {"checkpoint": "somewhere"}})
    copy = policy_copy(config, needs, on_gpu=True)
    assert copy.weights == pytest.approx(5.8 * 2**30, rel=0.15)
    assert policy_copy(config, needs, on_gpu=False).weights > 1.8 * copy.weights  # float32
    assert policy_copy(validate({"serial": True, "sac": {"algorithm": "na"}}), needs, on_gpu=False).weights == 0
    assert sum(policy_copy(validate({}), needs, on_gpu=True)) == 0
    need, plain = learner_need(config, needs), learner_need(validate({}), needs)
    assert need.copy == sum(copy)
    assert plain.copy == 0
    pictures = config.replay.capacity * 3 * needs.spec.cameras * needs.spec.image_size**2
    assert need.mirror - plain.mirror == pytest.approx(pictures, rel=0.01)
    fewer = config.model_copy(update={"learner": config.learner.model_copy(update={"policy_rows": 8})})
    assert learner_need(fewer, needs).copy < need.copy - 2**30


def test_memory_of_kept_prefixes() -> None:
    """What is reckoned for the tabletop's is what they take; a full-size Pi0's are refused for what they are."""
    learner = {"policy_prefixes": "keep", "policy_rows": 4}
    config = validate(
        {
            "actors": 3,
            "sac": {"algorithm": "na", "batch_size": 4},
            "replay": {"capacity": 700, "warmup_decisions": 64},
            "learner": learner,
        }
    )
    run = preflight.check_run(config)
    policy = run.policy.load(config.policy, torch.device("cpu"), run.spec.prompts, lambda: None)
    source = InPlace(ReplayRing(create_memory(config, run.spec, run.horizon)))
    kept = KeptPrefixes(PolicyFlow(policy, config), source).columns
    assert sum(column.nbytes for column in kept) == prefixes_bytes(config, run.policy.needs, on_gpu=False)
    told = preflight.memory_of_algorithm(run)
    assert told is not None
    assert told.endswith("its keys and values 34.5 kB a row and 0.0 GiB")
    full = learner_need(validate({"sac": {"algorithm": "na"}, "learner": learner}), pi0_needs(Pi0Config()))
    assert full.prefixes == pytest.approx(40_000 * 10.3e6, rel=0.03)
    assert "385.2 keys and values of the replay ring" in describe(full)
    again = validate({"sac": {"algorithm": "na"}, "learner": learner | {"policy_prefixes": "encode"}})
    assert learner_need(again, pi0_needs(Pi0Config())).prefixes == 0
