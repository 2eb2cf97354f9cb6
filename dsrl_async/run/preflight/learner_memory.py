"""Estimates the memory that the SAC agent takes, from settings alone, before a run starts. It needs no torch.

All of it is float32, but for the pictures in the replay ring.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

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


def convolution_sizes(config: SacConfig) -> Iterator[tuple[int, int, int]]:
    """Yield parameters, output channels and height of the output of each convolution of a `networks.Encoder`."""
    channels, size = config.image_shape[2], SAC_IMAGE_SIZE // config.image_pool
    for out, kernel, stride in zip(config.conv_channels, config.conv_kernels, config.conv_strides, strict=True):
        size = (size + 2 * config.conv_padding - kernel) // stride + 1
        yield out * (channels * kernel**2 + 1), out, size
        channels = out


def encoder_parameters(config: SacConfig) -> tuple[int, int]:
    """How many parameters a `networks.Encoder` has, and its output's width."""
    *_, (_, channels, size) = convolutions = list(convolution_sizes(config))
    count = sum(parameters for parameters, _, _ in convolutions)
    image, state = config.image_latent_dim, config.state_latent_dim
    count += (channels * size**2 + 1) * image + 2 * image
    if state:
        count += (config.state_dim + 1) * state + 2 * state
    return count, image + (state or config.state_dim)


def encoder_activations(config: SacConfig) -> int:
    """How many numbers the layers of a `networks.Encoder` put out for one image."""
    return sum(out * size**2 for _, out, size in convolution_sizes(config)) + 3 * encoder_parameters(config)[1]


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

    First the images are made, in integers and in float32; later the images as the networks take them stay beside the
    activations of the Q heads and what those are given, of encoders and of the actor, and two gradients of the critic.
    """
    width, hidden = config.noise_width(horizon), sum(config.hidden_dims)
    of_pixel = (8.0 if config.image_pool == 1 else 5.0) * (1 if config.augmentation == "none" else 2)
    if config.augmentation == "crop_colour":
        of_pixel += 20 / config.image_pool**2  # hues and the like of the pooled image, in float32
    of_head = (3 if config.critic_layer_norm else 1) * hidden + encoder_parameters(config)[1] + width
    numbers = config.num_q_heads * of_head + 3 * encoder_activations(config) + 4 * hidden + 8 * width
    images = 2 * math.prod(config.image_shape)
    learning = config.batch_size * (4 * images // config.image_pool**2 + 4 * numbers) + 2 * 4 * critic_parameters(
        config, horizon
    )
    return max(round(config.batch_size * images * of_pixel), learning)


def checkpoint_bytes(config: Config, horizon: int) -> int:
    """Memory that writing a checkpoint takes temporarily: three copies of what it has of the agent, and later one of
    them beside three of a lane's rows."""
    sac, rows = config.sac, config.replay.capacity // config.actors
    agent = 4 * (3 * actor_parameters(sac, horizon) + 4 * critic_parameters(sac, horizon))
    fields = replay_fields(1, rows, sac.state_dim, sac.noise_width(horizon), len(sac.cameras)).values()
    lane = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in fields)
    return max(3 * agent, agent + 3 * lane)


def learner_bytes(config: Config, horizon: int, on_gpu: bool) -> int:
    """Memory of the machine that a learner takes, beside its libraries and what it shares with others."""
    sac = config.sac
    of_device = agent_bytes(sac, horizon) + batch_bytes(sac, horizon) + update_bytes(sac, horizon)
    tables = 4 * 8 * config.replay.capacity
    return tables + (agent_bytes(sac, horizon) if on_gpu else of_device) + checkpoint_bytes(config, horizon)


def acting_bytes(config: Config, horizon: int) -> int:
    """Memory that choosing the noise takes where the policy is on the CPU: an actor, whose making takes five times its
    weights, and whose weights come in frames; an evaluation's; rows' buffers; activations of the largest batch."""
    sac, sizes = config.sac, config.batch_sizes()
    width, pixels = sac.noise_width(horizon), math.prod(sac.image_shape)
    numbers = encoder_activations(sac) + 3 * max(sac.hidden_dims) + 8 * width
    rows = sum(sizes) * (pixels + 1 + 2 * 4 * width) + sizes[-1] * (8 * pixels + 4 * numbers)
    return (6 + bool(config.evaluation.lanes)) * 4 * actor_parameters(sac, horizon) + rows
