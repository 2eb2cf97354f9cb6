"""Noise that a layout can carry, against least squares written out, and what the agent can choose of it."""

from __future__ import annotations

import pytest
import torch

from dsrl_async.config.settings import SacConfig
from dsrl_async.run.inversion.fitting import WITHIN, fit, project
from dsrl_async.sac.layout import NoiseLayout

HORIZON, WIDTH = 6, 4


def make(layout: str, magnitude: float = 50.0) -> tuple[SacConfig, NoiseLayout]:
    config = SacConfig.model_validate({"noise_layout": layout, "noise_dim": WIDTH, "action_magnitude": magnitude})
    return config, NoiseLayout(config, HORIZON)


def test_projections_are_the_nearest() -> None:
    """`repeat`: the mean over the slots; `per_slot`: the noise; `shift`: the mean, made larger by what is made smaller;
    and of none does a small change lead nearer."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, HORIZON, WIDTH, generator=generator)
    torch.testing.assert_close(project(make("repeat")[1], noise), noise.mean(1))
    torch.testing.assert_close(project(make("shift")[1], noise), noise.mean(1) / 0.5)
    torch.testing.assert_close(project(make("per_slot")[1], noise), noise.flatten(1))
    layout = make("knots")[1]
    found = project(layout, noise)
    distance = (layout.expand(found) - noise).square().sum((1, 2))
    for _ in range(20):
        other = found + 0.01 * torch.randn(found.shape, generator=generator)
        assert ((layout.expand(other) - noise).square().sum((1, 2)) > distance).all()


@pytest.mark.parametrize("layout", ["repeat", "per_slot", "knots"])
def test_the_agent_can_choose_what_is_found_and_the_error_is_that_of_it(layout: str) -> None:
    config, laid_out = make(layout, magnitude=0.4)
    noise = 3 * torch.randn(5, HORIZON, WIDTH, generator=torch.Generator().manual_seed(2))
    wanted = noise[:, :, 0]

    def sample(vectors: torch.Tensor) -> torch.Tensor:
        return laid_out.expand(vectors)[:, :, 0].tanh()

    found, error = fit(config, laid_out, noise, wanted, sample)
    assert found.abs().max() <= WITHIN * 0.4 + 1e-6
    torch.testing.assert_close(error, (sample(found) - wanted).square().mean(1).sqrt())
