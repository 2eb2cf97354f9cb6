"""Finds noise of which the frozen policy makes given actions, within what the agent can choose.

Where a layout has a vector for each slot, the sampler's inverse is that noise. The others cannot carry it; theirs is
the nearest vector by least squares. What the policy makes of it has to be looked at, and is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsrl_async.config.settings import SacConfig
from dsrl_async.sac.layout import NoiseLayout

REFINEMENTS = 2
"""Of each reversed step (docs/measurements/inversion.md)."""
WITHIN = 0.98
"""What fraction of `sac.action_magnitude` is looked at: tanh does not reach 1."""

Sample = Callable[[Tensor], Tensor]
"""The agent's vectors fp32 [B, A] -> the executed actions that the policy makes of them, normalised, fp32 [B, R]."""


def project(layout: NoiseLayout, noise: Tensor) -> Tensor:
    """fp32 [B, A]: the vectors of which `layout` makes the nearest to noise [B, horizon, noise_dim]."""
    if layout.layout == "per_slot":
        return noise.flatten(1)
    width = noise.shape[2]
    vectors = torch.eye(layout.width, device=noise.device)
    made = layout.expand(vectors, noise.new_zeros(layout.width, *noise.shape[1:]))
    weights = made[::width, :, 0].double()  # [vectors, horizon]: all numbers of a vector are laid out alike
    # In float64: what LAPACK gives differs in the last digits with where memory lies, and serial runs must not.
    found = torch.linalg.pinv(weights).T @ noise.double()
    return found.flatten(1).float()


def fit(config: SacConfig, layout: NoiseLayout, noise: Tensor, wanted: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
    """The agent's vectors for demonstrated actions, and how far what they make is from these.

    Args:
        config: its `action_magnitude` bounds the vectors.
        layout: how they are laid out.
        noise: fp32 [B, horizon, noise_dim], that of the sampler's inverse.
        wanted: fp32 [B, R], the executed actions, normalised.
        sample: the policy.

    Returns:
        fp32 [B, A] and the root mean square error, fp32 [B].
    """
    bound = WITHIN * config.action_magnitude
    found = project(layout, noise).clamp_(-bound, bound)
    return found, (sample(found) - wanted).square().mean(1).sqrt()
