"""torch.compile fuses an update and changes nothing of what it computes but the rounding."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from support.sac_configs import SMALL
from torch import Tensor

from dsrl_async.bench.learner import random_batch
from dsrl_async.run.learner import compiling
from dsrl_async.run.learner.sampling import InPlace
from dsrl_async.run.learner.updates import Updates
from dsrl_async.sac.agent import Adam, SacAgent
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.replay import ReplayRing, replay_fields

HORIZON, BATCH = 10, 6


def make_updates() -> Updates:
    agent = SacAgent(SMALL, HORIZON)
    ring = ReplayRing(Arena.create(replay_fields(1, 8, SMALL.state_dim, agent.action_dim)))
    updates = Updates(agent, InPlace(ring), BATCH)
    for buffer, values in zip(updates.batch, random_batch(SMALL, BATCH, agent.action_dim), strict=True):
        if buffer is not None and values is not None:
            buffer.copy_(values)
    updates.random.draw_(agent.generator)
    return updates


def state_of(updates: Updates) -> dict[str, Tensor]:
    return {**updates.agent.state_tensors(), "metrics": updates.metrics.clone()}


def make_steps(updates: Updates) -> dict[str, Tensor]:
    for update_actor in (False, True, True):
        updates.learn(update_actor)
    return state_of(updates)


def eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what would be compiled as it is."""
    monkeypatch.setattr(torch, "compile", lambda graph, **settings: graph)


def test_the_traced_update_is_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    eagerly(monkeypatch)
    both = [make_updates(), make_updates()]
    before = state_of(both[1])
    both[1].compile()
    for name, tensor in state_of(both[1]).items():
        if name != "metrics":
            assert torch.equal(tensor, before[name]), f"compiling changed {name}"
    plain, fused = (make_steps(updates) for updates in both)
    for name, tensor in plain.items():
        torch.testing.assert_close(fused[name], tensor, rtol=1e-5, atol=1e-7, msg=name)
    assert fused["critic.adam.step"] == 3


def test_two_runs_of_it_agree_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    eagerly(monkeypatch)
    both = [make_updates(), make_updates()]
    for updates in both:
        updates.compile()
    first, second = (make_steps(updates) for updates in both)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_adam_in_single_operations_is_the_kernel(betas: tuple[float, float]) -> None:
    parameters = [torch.randn(50, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    kernel, single = (Adam(parameter, 1e-2, betas) for parameter in parameters)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        gradient = torch.randn(50, generator=generator)
        kernel.step(gradient)
        state = single.state
        state["step"] += 1
        moments = (state["exp_avg"], state["exp_avg_sq"], state["step"])
        average, of_squares, step = ([tensor] for tensor in moments)
        compiling._adam(
            *([single.parameter], [gradient], average, of_squares, [], step),
            lr=1e-2,
            beta1=betas[0],
            beta2=betas[1],
            eps=1e-8,
            weight_decay=0.0,
        )
    torch.testing.assert_close(parameters[1], parameters[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    os.environ.get("DSRL_COMPILED_UPDATE") != "1" or shutil.which("g++") is None,
    reason="compiling takes 40 s; DSRL_COMPILED_UPDATE=1 does it, with a C++ compiler",
)
def test_the_compiled_update_is_the_update() -> None:
    both = [make_updates(), make_updates()]
    both[1].compile()
    plain, fused = (make_steps(updates) for updates in both)
    for name, tensor in plain.items():
        torch.testing.assert_close(fused[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
