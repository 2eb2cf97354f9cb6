"""The sampler backwards, against a reference that is written from the formulas, with openpi's own velocity."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.pi0_models import fill, make_model, make_sampler, norm_stats, small_config
from support.pi0_reference import Reference
from torch import Tensor

from dsrl_async.config.settings import PolicyConfig
from dsrl_async.envs.tabletop_spec import TABLETOP
from dsrl_async.host.policies import policy_record
from dsrl_async.pi0.processing import Normaliser
from dsrl_async.pi0.sampler import Sampler
from dsrl_async.policies import NormalisedBatch


def inverted(reference: Reference, sampler: Sampler, actions: Tensor, steps: int, refinements: int) -> Tensor:
    """x_0 of the Euler steps x_{k+1} = x_k - v(x_k, 1 - k/n) / n that end in x_n = `actions`: each is solved for x_k by
    the fixed-point iteration x <- x_{k+1} + v(x, 1 - k/n) / n from x_{k+1}."""
    cameras = [(sampler.images[:, number], True) for number in range(sampler.images.shape[1])]
    cameras.append((torch.full_like(sampler.images[:, 0], -1.0), False))
    x = actions
    for k in range(steps - 1, -1, -1):
        after, time = x, 1 - k / steps
        for _ in range(refinements + 1):
            observed = cameras, sampler.tokens, sampler.token_mask, sampler.state
            x = after + reference.velocity(*observed, x, time) / steps
    return x


@pytest.mark.parametrize("pi05", [False, True])
@pytest.mark.parametrize("refinements", [0, 3])
def test_the_inverse_equals_the_reference(pi05: bool, refinements: int) -> None:
    model, tensors = make_model(small_config(pi05))
    sampler = make_sampler(model, batch=3, steps=4)
    fill(sampler, seed=5)
    actions = torch.randn(sampler.actions.shape, generator=torch.Generator().manual_seed(1))
    expected = inverted(Reference(model.config, tensors), sampler, actions, 4, refinements)
    sampler.encode()
    sampler.actions.copy_(actions)
    sampler.invert(refinements)
    assert (expected - actions).abs().max() > 0.5  # not a trivial inverse
    assert (sampler.noise - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("pi05", [False, True])
def test_noise_is_found_again_by_enough_refinements(pi05: bool) -> None:
    """A random network's flow is gentle, so that the iteration converges: forward(inverse(a)) = a, and back again."""
    model, _ = make_model(small_config(pi05))
    sampler = make_sampler(model, batch=2, steps=10)
    sampler.run()
    noise, actions = sampler.noise.clone(), sampler.actions.clone()
    errors = []
    for refinements in (0, 2, 20):
        sampler.actions.copy_(actions)
        sampler.invert(refinements)
        found = sampler.noise.clone()
        sampler.denoise()
        errors.append(float((sampler.actions - actions).abs().max()))
    assert errors[0] > 5 * errors[1] > 5 * errors[2]
    assert errors[2] <= 1e-4
    assert (found - noise).abs().max() <= 1e-3


def test_what_is_normalised_is_what_denoising_would_have_scaled() -> None:
    config = dataclasses.replace(small_config(), delta_action_dims=3)
    normaliser = Normaliser(config, norm_stats())
    generator = torch.Generator().manual_seed(0)
    actions = torch.randn(2, config.action_horizon, config.action_dim, generator=generator)
    actions[..., config.robot_action_dim :] = 0
    state = torch.randn(2, config.robot_state_dim, generator=generator)
    again = normaliser.of_robot_actions(normaliser.robot_actions(actions, state), state)
    torch.testing.assert_close(again, actions, rtol=1e-5, atol=1e-5)


def test_the_embedded_policy_is_inverted_at_its_own_actions() -> None:
    """Through the batch that a run has: robot's units in, noise out, and the same actions of it."""
    settings = PolicyConfig()
    policy = policy_record(settings).load(settings, torch.device("cpu"), TABLETOP.prompts, lambda: None)
    batch = policy.batch(4, int(policy.prompt_lengths.max()))
    assert isinstance(batch, NormalisedBatch)
    generator = torch.Generator().manual_seed(0)
    batch.images.random_(0, 256, generator=generator)
    batch.fill_prompts(np.zeros(4, np.int64))
    batch.noise.normal_(generator=generator)
    batch.encode()
    batch.denoise()
    wanted, normalised = batch.actions.clone(), batch.normalised_actions.clone()
    errors = []
    for refinements in (0, 8):
        batch.actions.copy_(wanted)
        batch.normalise()
        torch.testing.assert_close(batch.normalised_actions, normalised, rtol=1e-4, atol=1e-4)
        batch.invert(refinements)
        batch.denoise()
        errors.append((batch.actions - wanted).square().mean().sqrt())
    assert errors[1] < errors[0] / 2
    assert errors[1] < 0.02
