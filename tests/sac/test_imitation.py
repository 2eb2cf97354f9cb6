"""The supervised term of the actor's loss, against -log of the density of tanh of a normal number, written out."""

from __future__ import annotations

import math

import pytest
import torch
from support.sac_configs import SMALL
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from dsrl_async.sac import METRIC_NAMES
from dsrl_async.sac.agent import Batch, Imitated, SacAgent

HORIZON, BATCH, SHOWN = 4, 6, 3
ACTOR_LOSS = 2


def make_batch(agent: SacAgent) -> tuple[Batch, Imitated]:
    generator = torch.Generator().manual_seed(0)
    side = agent.config.image_shape
    images = torch.randint(0, 256, (2 * BATCH, *side), dtype=torch.uint8, generator=generator)
    states = torch.randn(2 * BATCH, agent.config.state_dim, generator=generator)
    noise = torch.randn(BATCH, agent.action_dim, generator=generator)
    batch = Batch(images, states, noise, -torch.ones(BATCH), torch.full((BATCH,), 0.9))
    shown = agent.config.action_magnitude * torch.rand(SHOWN, agent.action_dim, generator=generator).mul(1.9).sub(0.95)
    return batch, Imitated(shown, torch.tensor([1.0, 0.0, 1.0]))


def surprise(agent: SacAgent, batch: Batch, imitated: Imitated) -> torch.Tensor:
    """-log pi of what is to be imitated, by torch's own distributions, for the last observations, one by one."""
    pixels = agent._augmented(batch.images[BATCH - SHOWN : BATCH], torch.zeros(SHOWN, 0))
    mean, log_std = agent.actor(pixels, batch.states[BATCH - SHOWN : BATCH])
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    return -squashed.log_prob(imitated.noise / agent.config.action_magnitude).sum(1)


def test_the_actors_loss_has_the_mean_surprise_of_what_is_to_be_imitated() -> None:
    losses, others = [], []
    for imitated in (False, True):
        agent = SacAgent(SMALL, HORIZON)
        with torch.no_grad():  # at first it says nearly the same of all observations
            agent.actor.flat.add_(torch.randn(agent.actor.flat.shape, generator=torch.Generator().manual_seed(1)) / 10)
        batch, shown = make_batch(agent)
        expected = surprise(agent, batch, shown)[[0, 2]].mean().item()
        agent.imitation_weight.fill_(0.25)
        random = agent.random_numbers(BATCH)
        random.draw_(agent.generator)
        metrics = agent.learn(batch, random, True, imitated=shown if imitated else None).tolist()
        losses.append(metrics[ACTOR_LOSS])
        others.append(metrics[len(METRIC_NAMES) :])
    assert losses[1] - losses[0] == pytest.approx(0.25 * expected, rel=1e-4)
    assert others == [[], [pytest.approx(expected, rel=1e-4)]]
    assert math.isnan(agent.learn(batch, random, False, imitated=shown)[-1])


def test_imitation_makes_what_was_shown_likely_and_nothing_else() -> None:
    agent = SacAgent(SMALL, HORIZON)
    batch, shown = make_batch(agent)
    before, critic = surprise(agent, batch, shown).detach(), agent.critic.flat.clone()
    losses = []
    for _ in range(60):
        rows = slice(BATCH - SHOWN, BATCH)
        losses.append(agent.imitate(batch.images[rows], batch.states[rows], None, shown, torch.zeros(SHOWN, 0)).item())
    after = surprise(agent, batch, shown).detach()
    assert losses[0] == pytest.approx(before[[0, 2]].mean().item(), rel=1e-4)
    assert (after[[0, 2]] < before[[0, 2]] - 1).all()
    assert torch.equal(agent.critic.flat, critic)


def test_its_weight_falls_to_nothing() -> None:
    config = SMALL.model_copy(update={"imitation_weight": 0.5, "imitation_decay": 200})
    assert [config.imitation(updates) for updates in (0, 50, 200, 1000)] == [0.5, 0.375, 0.0, 0.0]
    assert math.isclose(config.imitation(199), 0.0025)
