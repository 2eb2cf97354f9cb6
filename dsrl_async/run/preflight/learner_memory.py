"""Estimates the memory that a learner takes on its device, from settings alone, before a run starts. It needs no torch.

All of it is float32, but for the pictures in the replay ring.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from dsrl_async.config.settings import Config, SacConfig
from dsrl_async.config.shapes import AUGMENTATION_NUMBERS, SAC_IMAGE_SIZE
from dsrl_async.shm.replay import replay_fields

MIRRORED = ("image", "state", "noise", "reward", "steps", "terminal")
"""The fields of a row that the learner draws (`sampling.Columns`)."""


def mirror_bytes(config: Config, horizon: int) -> int:
    """Memory of a `sampling.Mirror` of the replay ring on its device: the columns, and two tables of places."""
    rows, sac = config.replay.capacity // config.actors, config.sac
    fields = replay_fields(config.actors, rows, sac.state_dim, sac.noise_width(horizon), len(sac.cameras))
    columns = [fields[f"replay/{name}"] for name in MIRRORED]
    of_columns = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in columns)
    return of_columns + 2 * 8 * config.actors * rows


def encoder_parameters(config: SacConfig) -> tuple[int, int]:
    """How many parameters a `networks.Encoder` has, and its output's width."""
    count, channels, size = 0, config.image_shape[2], SAC_IMAGE_SIZE // config.image_pool
    for out, kernel, stride in zip(config.conv_channels, config.conv_kernels, config.conv_strides, strict=True):
        count += out * (channels * kernel**2 + 1)
        channels, size = out, (size + 2 * config.conv_padding - kernel) // stride + 1
    image, state = config.image_latent_dim, config.state_latent_dim
    count += (channels * size**2 + 1) * image + 2 * image
    if state:
        count += (config.state_dim + 1) * state + 2 * state
    return count, image + (state or config.state_dim)


def actor_parameters(config: SacConfig, horizon: int) -> int:
    """How many parameters a `networks.Actor` has."""
    count, width = encoder_parameters(config)
    widths = [width, *config.hidden_dims]
    count += sum((fan_in + 1) * fan_out for fan_in, fan_out in itertools.pairwise(widths))
    count += 2 * sum(config.hidden_dims) if config.actor_layer_norm else 0
    return count + (widths[-1] + 1) * 2 * config.noise_width(horizon)


def critic_parameters(config: SacConfig, horizon: int) -> int:
    """How many parameters a `networks.Critic` has."""
    count, width = encoder_parameters(config)
    widths = [width + config.noise_width(horizon), *config.hidden_dims, 1]
    of_head = sum((fan_in + 1) * fan_out for fan_in, fan_out in itertools.pairwise(widths))
    of_head += 2 * sum(config.hidden_dims) if config.critic_layer_norm else 0
    return count + config.num_q_heads * of_head


def agent_bytes(config: SacConfig, horizon: int) -> int:
    """Memory that a `SacAgent` keeps: of actor and critic weights, gradient and Adam's two moments, and the target."""
    return 4 * (4 * actor_parameters(config, horizon) + 5 * critic_parameters(config, horizon))


def batch_bytes(config: SacConfig, horizon: int) -> int:
    """Memory of the batch and of the random numbers of an update."""
    width = config.noise_width(horizon)
    uniform = 2 * 4 * AUGMENTATION_NUMBERS[config.augmentation]
    row = 2 * (math.prod(config.image_shape) + 4 * config.state_dim) + 3 * 4 * width + 2 * 4 + 2 * 8 + uniform
    return config.batch_size * row


def update_bytes(config: SacConfig, horizon: int) -> int:
    """Upper limit on the memory that an update takes temporarily.

    Images are the most of it, in integers and in float32, with those of augmentation or of the first convolution; then
    come the activations of the Q heads, and two gradients of the critic.
    """
    times = 10.0 if config.image_pool == 1 else 8.0
    if config.augmentation == "crop_colour":
        times += 20 / config.image_pool**2  # hues and the like of the pooled image, in float32
    row = round(2 * math.prod(config.image_shape) * times) + 4 * 4 * config.num_q_heads * sum(config.hidden_dims)
    return config.batch_size * row + 2 * 4 * critic_parameters(config, horizon)
