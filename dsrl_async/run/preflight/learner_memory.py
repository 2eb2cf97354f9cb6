"""Estimates the memory that the SAC agent takes, from settings alone, before a run starts. It needs no torch.

All of it is float32, but for the pictures in the replay ring. `of_actions` are the sizes of DSRL-NA's rows, see
`row_of`, and None for DSRL-SAC.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from dsrl_async.config.settings import Config, SacConfig
from dsrl_async.config.shapes import AUGMENTATION_NUMBERS, SAC_IMAGE_SIZE
from dsrl_async.policies import PolicyMemory, PolicyNeeds, PolicySizes
from dsrl_async.shm.memory import action_row
from dsrl_async.shm.replay import ActionRow, replay_fields

NOT_MIRRORED = ("policy_version", "complete", "head")
"""What the learner does not draw of a ring (`sampling.Columns`, `sampling.SeenColumns`)."""


def row_of(config: Config, policy: PolicySizes) -> ActionRow | None:
    """The sizes of DSRL-NA's rows, for a run that steers this policy."""
    return action_row(config, policy.cameras, policy.image_size, policy.robot_action_dim)


def ring_bytes(config: Config, horizon: int, of_actions: ActionRow | None = None) -> dict[str, int]:
    """Memory of the replay ring, by field."""
    rows, sac = config.replay.capacity // config.actors, config.sac
    sizes = sac.state_dim, sac.noise_width(horizon), len(sac.cameras)
    fields = replay_fields(config.actors, rows, *sizes, of_actions, sac.instruction_dim > 0)
    return {
        name.removeprefix("replay/"): math.prod(shape) * np.dtype(dtype).itemsize
        for name, (shape, dtype) in fields.items()
    }


def row_bytes(config: Config, horizon: int, of_actions: ActionRow | None = None) -> float:
    """Memory of a row of the replay ring."""
    rows = config.replay.capacity // config.actors * config.actors
    return sum(ring_bytes(config, horizon, of_actions).values()) / rows


def mirror_bytes(config: Config, horizon: int, of_actions: ActionRow | None = None) -> int:
    """Memory of a `sampling.Mirror` of the replay ring on its device: the columns, the table, rows' successors."""
    columns = ring_bytes(config, horizon, of_actions)
    rows = config.replay.capacity // config.actors * config.actors
    return sum(size for name, size in columns.items() if name not in NOT_MIRRORED) + 2 * 8 * (rows + config.actors)


def policy_copy(config: Config, policy: PolicyNeeds, on_gpu: bool) -> PolicyMemory:
    """What DSRL-NA's learner takes for its own copy of the policy; in serial mode that has no weights of its own."""
    if config.sac.algorithm != "na":
        return PolicyMemory(0, 0, 0)
    copy = policy.memory(config.policy, on_gpu, config.learner.policy_rows, policy.longest_prompt)
    return copy._replace(weights=0) if config.serial else copy


def prefixes_bytes(config: Config, policy: PolicyNeeds, on_gpu: bool) -> int:
    """What DSRL-NA's learner takes for the policy's keys and values of all rows, if it keeps them."""
    if config.sac.algorithm != "na" or config.learner.policy_prefixes == "encode":
        return 0
    assert policy.prefix_bytes is not None, "only a policy that can be asked for them is steered so"
    rows = config.replay.capacity // config.actors * config.actors
    return rows * policy.prefix_bytes(config.policy, on_gpu, policy.longest_prompt)


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
    return count, image + (state or config.state_dim) + config.instruction_dim


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


def action_critic_parameters(config: SacConfig, of_actions: ActionRow) -> int:
    """How many parameters the critic of a `na.NaAgent` has."""
    return critic_parameters(config.judging_actions(of_actions.action_dim), of_actions.chunk)


def critic_parameters(config: SacConfig, horizon: int) -> int:
    """How many parameters a `networks.Critic` of noise has."""
    count, width = encoder_parameters(config)
    widths = [width + config.noise_width(horizon), *config.hidden_dims, 1]
    of_head = sum((fan_in + 1) * fan_out for fan_in, fan_out in itertools.pairwise(widths))
    of_head += 2 * sum(config.hidden_dims) if config.critic_layer_norm else 0
    return count + config.num_q_heads * of_head


def agent_bytes(config: SacConfig, horizon: int, of_actions: ActionRow | None = None) -> int:
    """Memory that an agent keeps: of actor and critics weights, gradient and Adam's two moments, and the target."""
    trained = actor_parameters(config, horizon) + critic_parameters(config, horizon)
    if of_actions is None:
        return 4 * (4 * trained + critic_parameters(config, horizon))
    return 4 * (4 * trained + 5 * action_critic_parameters(config, of_actions))


def batch_bytes(config: SacConfig, horizon: int, of_actions: ActionRow | None = None) -> int:
    """Memory of the batch and of the random numbers of an update."""
    width, uniform = config.noise_width(horizon), 4 * AUGMENTATION_NUMBERS[config.augmentation]
    observation = math.prod(config.image_shape) + 4 * (config.state_dim + config.instruction_dim)
    row = 2 * observation + 3 * 4 * width + 2 * 4 + 2 * 8 + 2 * uniform
    if of_actions is not None:  # actions stand for one noise; then a step of the noise critic's own
        seen = of_actions.cameras * of_actions.image_size**2 * 3 + 8
        row += 4 * (of_actions.actions - width) + seen + (seen + observation + uniform + 8 + 4 * width)
        if config.noise_layout == "shift":
            row += 2 * 4 * horizon * config.noise_dim
    return config.batch_size * row


def update_bytes(config: SacConfig, horizon: int, of_actions: ActionRow | None = None) -> int:
    """Upper limit on the memory that an update takes temporarily.

    First the images are made, in integers and in float32; later the images as the networks take them stay beside the
    activations of the Q heads and what those are given, of encoders and of the actor, and two gradients of the critic.
    What sampling a policy takes is none of this.
    """
    width, hidden, critic = config.noise_width(horizon), sum(config.hidden_dims), critic_parameters(config, horizon)
    if of_actions is not None:
        width, critic = max(width, of_actions.actions), max(critic, action_critic_parameters(config, of_actions))
    of_pixel = (8.0 if config.image_pool == 1 else 5.0) * (1 if config.augmentation == "none" else 2)
    if config.augmentation == "crop_colour":
        of_pixel += 20 / config.image_pool**2  # hues and the like of the pooled image, in float32
    of_head = (3 if config.critic_layer_norm else 1) * hidden + encoder_parameters(config)[1] + width
    numbers = config.num_q_heads * of_head + 3 * encoder_activations(config) + 4 * hidden + 8 * width
    images = 2 * math.prod(config.image_shape)
    learning = config.batch_size * (4 * images // config.image_pool**2 + 4 * numbers) + 2 * 4 * critic
    return max(round(config.batch_size * images * of_pixel), learning)


def checkpoint_bytes(config: Config, horizon: int, of_actions: ActionRow | None = None) -> int:
    """Memory that writing a checkpoint takes temporarily: three copies of what it has of the agent, and later one of
    them beside three of a lane's rows."""
    sac = config.sac
    critics = 4 * critic_parameters(sac, horizon)
    if of_actions is not None:
        critics = 3 * critic_parameters(sac, horizon) + 4 * action_critic_parameters(sac, of_actions)
    agent = 4 * (3 * actor_parameters(sac, horizon) + critics)
    lane = sum(ring_bytes(config, horizon, of_actions).values()) // config.actors
    return max(3 * agent, agent + 3 * lane)


def device_bytes(config: SacConfig, horizon: int, of_actions: ActionRow | None = None) -> int:
    """Memory that a learner takes on its device, beside a mirror and a copy of the policy."""
    sizes = config, horizon, of_actions
    return agent_bytes(*sizes) + batch_bytes(*sizes) + update_bytes(*sizes)


def learner_bytes(config: Config, horizon: int, on_gpu: bool, of_actions: ActionRow | None = None) -> int:
    """Memory of the machine that a learner takes, beside its libraries, what it shares with others, and a copy of the
    policy."""
    sizes = config.sac, horizon, of_actions
    agent = agent_bytes(*sizes) if on_gpu else device_bytes(*sizes)
    return 4 * 8 * config.replay.capacity + agent + checkpoint_bytes(config, horizon, of_actions)


def acting_bytes(config: Config, horizon: int) -> int:
    """Memory that choosing the noise takes where the policy is on the CPU: an actor, whose making takes five times its
    weights, and whose weights come in frames; an evaluation's; rows' buffers; activations of the largest batch."""
    sac, sizes = config.sac, config.batch_sizes()
    width, pixels = sac.noise_width(horizon), math.prod(sac.image_shape)
    numbers = encoder_activations(sac) + 3 * max(sac.hidden_dims) + 8 * width
    rows = sum(sizes) * (pixels + 1 + 8 + 2 * 4 * width) + sizes[-1] * (8 * pixels + 4 * numbers)
    return (6 + bool(config.evaluation.lanes)) * 4 * actor_parameters(sac, horizon) + rows
