"""DSRL-SAC as a plain PyTorch program, with which `bench learner` compares."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsrl_async.config.settings import SacConfig
from dsrl_async.config.shapes import SAC_IMAGE_SIZE
from dsrl_async.sac.agent import Batch, SacAgent, alpha_from_raw
from dsrl_async.sac.networks import log_prob, preprocess_image


class PlainEncoder(nn.Module):
    """Encodes the image with convolutions and the state with a linear layer, and concatenates both."""

    def __init__(self, config: SacConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, size = config.image_shape[2], SAC_IMAGE_SIZE // config.image_pool
        for width, kernel, stride in zip(config.conv_channels, config.conv_kernels, config.conv_strides, strict=True):
            layers += [nn.Conv2d(channels, width, kernel, stride, config.conv_padding), nn.ReLU()]
            channels, size = width, (size + 2 * config.conv_padding - kernel) // stride + 1
        latent = [nn.Flatten(), nn.Linear(channels * size * size, config.image_latent_dim)]
        self.image = nn.Sequential(*layers, *latent, nn.LayerNorm(config.image_latent_dim), nn.Tanh())
        width = config.state_latent_dim
        self.state = (
            nn.Sequential(nn.Linear(config.state_dim, width), nn.LayerNorm(width), nn.Tanh()) if width else None
        )
        self.output_dim = config.image_latent_dim + (width or config.state_dim)

    def forward(self, pixels: Tensor, state: Tensor) -> Tensor:
        return torch.cat([self.image(pixels), self.state(state) if self.state else state], dim=1)


def plain_mlp(widths: list[int], layer_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(fan_in, fan_out), *([nn.LayerNorm(fan_out)] if layer_norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


class PlainActor(nn.Module):
    def __init__(self, config: SacConfig, action_dim: int) -> None:
        super().__init__()
        self.encoder = PlainEncoder(config)
        self.mlp = plain_mlp([self.encoder.output_dim, *config.hidden_dims, 2 * action_dim], config.actor_layer_norm)
        self.limits = config.log_std_min, config.log_std_max

    def forward(self, pixels: Tensor, state: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        """A squashed sample and its log-probability."""
        mean, log_std = self.mlp(self.encoder(pixels, state)).chunk(2, dim=1)
        log_std = log_std.clamp(*self.limits)
        u = mean + log_std.exp() * normal
        return u.tanh(), log_prob(u, log_std, normal)


class PlainCritic(nn.Module):
    def __init__(self, config: SacConfig, action_dim: int) -> None:
        super().__init__()
        self.encoder = PlainEncoder(config)
        widths = [self.encoder.output_dim + action_dim, *config.hidden_dims, 1]
        heads = [plain_mlp(widths, config.critic_layer_norm) for _ in range(config.num_q_heads)]
        self.heads: Iterable[nn.Sequential] = nn.ModuleList(heads)  # type: ignore[assignment]

    def forward(self, pixels: Tensor, state: Tensor, noise: Tensor, detach_encoder: bool = False) -> Tensor:
        features = self.encoder(pixels, state)
        x = torch.cat([features.detach() if detach_encoder else features, noise], dim=1)
        return torch.cat([head(x) for head in self.heads], dim=1)


def copy_encoder(plain: PlainEncoder, own: Any, read: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a plain parameter and `read` of the same parameter in `own`, in the plain layout."""
    convolutions = [layer for layer in plain.image if isinstance(layer, nn.Conv2d)]
    pairs = [
        (getattr(theirs, name), read(getattr(ours, name)))
        for theirs, ours in zip(convolutions, own.convolutions, strict=True)
        for name in ("weight", "bias")
    ]
    _, linear, norm, _ = list(plain.image)[-4:]
    channels = convolutions[-1].out_channels
    by_pixel = read(own.image_projection.weight)  # columns by pixel, then channel; in `plain` by channel, then pixel
    by_channel = by_pixel.view(len(by_pixel), -1, channels).transpose(1, 2).flatten(1)
    pairs += [(linear.weight, by_channel), (linear.bias, read(own.image_projection.bias))]
    modules = [(norm, own.image_norm)]
    if plain.state is not None:
        modules += [(plain.state[0], own.state_projection), (plain.state[1], own.state_norm)]
    return pairs + [(getattr(a, name), read(getattr(b, name))) for a, b in modules for name in ("weight", "bias")]


def copy_actor(plain: PlainActor, own: Any, read: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
    linears = [layer for layer in plain.mlp if isinstance(layer, nn.Linear)]
    norms = [layer for layer in plain.mlp if isinstance(layer, nn.LayerNorm)]
    modules = [*zip(linears, [*own.hidden, own.output], strict=True), *zip(norms, own.norms, strict=True)]
    return copy_encoder(plain.encoder, own.encoder, read) + [
        (getattr(a, name), read(getattr(b, name))) for a, b in modules for name in ("weight", "bias")
    ]


def copy_critic(plain: PlainCritic, own: Any, read: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
    pairs = copy_encoder(plain.encoder, own.encoder, read)
    for head, mlp in enumerate(plain.heads):
        linears = [layer for layer in mlp if isinstance(layer, nn.Linear)]
        norms = [layer for layer in mlp if isinstance(layer, nn.LayerNorm)]
        for linear, weight, bias in zip(linears, own.weights, own.biases, strict=True):
            pairs += [(linear.weight, read(weight)[head].t()), (linear.bias, read(bias)[head, 0])]
        for norm, scale, shift in zip(norms, own.norm_scales, own.norm_shifts, strict=True):
            pairs += [(norm.weight, read(scale)[head, 0]), (norm.bias, read(shift)[head, 0])]
    return pairs


def step(parameters: Iterable[Tensor], limit: float | None, optimiser: torch.optim.Optimizer) -> None:
    if limit is not None:
        nn.utils.clip_grad_norm_(parameters, limit)
    optimiser.step()


class Plain:
    """The plain program, which starts with the parameters of `agent`."""

    def __init__(self, agent: SacAgent) -> None:
        config, self.config = agent.config, agent.config
        self.actor = PlainActor(config, agent.action_dim)
        self.critic, self.target = (PlainCritic(config, agent.action_dim) for _ in range(2))
        self.raw_alpha = agent.raw_alpha.clone().requires_grad_()
        with torch.no_grad():
            for theirs, ours in (
                *copy_actor(self.actor, agent.actor, torch.detach),
                *copy_critic(self.critic, agent.critic, torch.detach),
                *copy_critic(self.target, agent.target_critic, torch.detach),
            ):
                theirs.copy_(ours)
        self.target.requires_grad_(False)
        self.actor_optimiser = torch.optim.Adam(self.actor.parameters(), config.actor_lr, config.actor_betas)
        self.critic_optimiser = torch.optim.Adam(self.critic.parameters(), config.critic_lr)
        self.alpha_optimiser = torch.optim.Adam([self.raw_alpha], config.alpha_lr)

    def losses(self, batch: Batch, normal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Critic, actor and temperature losses, with the gradients in the parameters' `.grad`.

        The critic makes its step in between where the actor's loss asks the critic from after it.
        """
        config = self.config
        pixels, next_pixels = (preprocess_image(images, config).contiguous() for images in batch.images.chunk(2))
        state, next_state = batch.states.chunk(2)
        alpha = alpha_from_raw(self.raw_alpha, config.alpha_type)

        def combine(q: Tensor) -> Tensor:
            return q.mean(1) if config.q_aggregation == "mean" else q.min(1).values

        with torch.no_grad():
            action, log_probability = self.actor(next_pixels, next_state, normal[0])
            value = combine(self.target(next_pixels, next_state, action * config.action_magnitude))
            if config.entropy_backup:
                value = value - alpha * log_probability
            target = batch.reward + batch.discount * value
        q = self.critic(pixels, state, batch.noise)
        critic_loss = F.mse_loss(q, target[:, None].expand_as(q))
        self.critic_optimiser.zero_grad()
        critic_loss.backward()
        # The actor's loss leaves gradients in the critic's heads that no step uses, so the critic's own are kept.
        gradients = [parameter.grad for parameter in self.critic.parameters()]
        if config.critic_in_actor_loss == "after":
            gradients = [None if gradient is None else gradient.clone() for gradient in gradients]
            self.step_critic()  # which clips them in place
        for parameter in self.critic.parameters():
            parameter.grad = None

        action, log_probability = self.actor(pixels, state, normal[1])
        q = self.critic(pixels, state, action * config.action_magnitude, detach_encoder=True)
        actor_loss = (alpha.detach() * log_probability - combine(q)).mean()
        self.actor_optimiser.zero_grad()
        actor_loss.backward()
        for parameter, gradient in zip(self.critic.parameters(), gradients, strict=True):
            parameter.grad = gradient

        with torch.no_grad():
            _, log_probability = self.actor(pixels, state, normal[1])
        alpha_loss = -alpha * (log_probability.mean() + config.target_entropy)
        self.alpha_optimiser.zero_grad()
        alpha_loss.backward()
        return critic_loss, actor_loss, alpha_loss

    def step_critic(self) -> None:
        step(self.critic.parameters(), self.config.critic_grad_clip, self.critic_optimiser)

    def update(self, batch: Batch, normal: Tensor) -> None:
        config = self.config
        self.losses(batch, normal)
        if config.critic_in_actor_loss == "before":
            self.step_critic()
        step(self.actor.parameters(), config.actor_grad_clip, self.actor_optimiser)
        step([self.raw_alpha], config.alpha_grad_clip, self.alpha_optimiser)
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                slow.mul_(1 - config.tau).add_(fast, alpha=config.tau)
