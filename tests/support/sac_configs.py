"""A small agent."""

from __future__ import annotations

from dsrl_async.config.settings import SacConfig

SMALL = SacConfig(
    image_pool=4,
    conv_channels=[8],
    conv_kernels=[4],
    conv_strides=[4],
    image_latent_dim=12,
    state_latent_dim=8,
    hidden_dims=[16, 12],
    num_q_heads=3,
    noise_dim=4,
    target_entropy=-2.0,
)
