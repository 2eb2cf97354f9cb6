"""The SAC agent: networks, optimisers, random state, and the gradient update.

`SacAgent.update` is a fixed sequence of tensor operations on fixed storage: it never reads a tensor's value
on the host, so it can be captured in a CUDA graph (register `agent.generator` with the graph); on the CPU it
is called. All losses of one update are evaluated at the parameters from before it, so the critic's encoding
of the observations is computed once: with gradient for the critic's loss, detached for the actor's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsrl_async.config import SacConfig
from dsrl_async.sac.augmentation import random_shift
from dsrl_async.sac.flat import clip_gradient_, layout_hash
from dsrl_async.sac.networks import Actor, Critic, aggregate_heads, log_prob, preprocess_image

ADAM_FIELDS = ("step", "exp_avg", "exp_avg_sq")


class Batch(NamedTuple):
    """Transitions to learn from; B of them."""

    image: Tensor
    """uint8 [B, 64, 64, 3]"""
    state: Tensor
    """fp32 [B, state_dim]"""
    noise: Tensor
    """fp32 [B, A], the noise that the policy was given"""
    reward: Tensor
    """fp32 [B]"""
    discount: Tensor
    """fp32 [B], see `transition_discount`"""
    next_image: Tensor
    """uint8 [B, 64, 64, 3]"""
    next_state: Tensor
    """fp32 [B, state_dim]"""


def transition_discount(config: SacConfig, steps: Tensor, terminal: Tensor) -> Tensor:
    """Factor of the next observation's value in the target.

    Args:
        config: reads `gamma` and `discount_per`.
        steps: integer [B], environment steps that the decision really executed (fewer in a last, cut chunk).
        terminal: bool or number [B], true where the episode ended by success. Not for truncation by the time
            limit: there the value of the last observation still counts.

    Returns:
        fp32 [B]: 0 where terminal, else gamma^steps (`env_step`) or gamma (`decision`).
    """
    alive = 1.0 - terminal.to(torch.float32)
    if config.discount_per == "decision":
        return alive * config.gamma
    return alive * torch.pow(config.gamma, steps.to(torch.float32))


def raw_from_alpha(alpha: float, alpha_type: str) -> float:
    """The unconstrained parameter whose softplus or exp is `alpha`."""
    return math.log(alpha) if alpha_type == "exp" else alpha + math.log(-math.expm1(-alpha))


def alpha_from_raw(raw: Tensor, alpha_type: str) -> Tensor:
    """The temperature, fp32 []: softplus(raw) or exp(raw)."""
    return raw.exp() if alpha_type == "exp" else F.softplus(raw)


def _adam(parameter: Tensor, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.Adam:
    capturable = parameter.device.type == "cuda"
    optimiser = torch.optim.Adam([parameter], lr=lr, betas=betas, fused=True, capturable=capturable)
    # Adam would create its state in the first step. Made here, it has fixed storage from the start: a
    # captured graph, a checkpoint before the first update, and loading in place all need that.
    optimiser.state[parameter] = {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
    return optimiser


class SacAgent:
    """Everything that learning changes.

    Args:
        config: all settings of DSRL-SAC.
        horizon: action slots of the policy.
        device: where everything lives; fp32 throughout.
        seed: of the initial weights and of `generator`.

    Attributes:
        actor, critic, target_critic: the networks; `.flat` is the contiguous vector of their weights.
        raw_alpha: fp32 [], the temperature before softplus or exp.
        generator: all random numbers of the updates come from here.
        updates: critic updates so far. Each call of `update` counts, also the one that is being captured; a
            replay does not, so whoever replays sets this.
    """

    def __init__(self, config: SacConfig, horizon: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.config = config
        self.device = torch.device(device)
        self.action_dim = config.noise_width(horizon)
        self.actor = Actor(config, horizon, self.device, seed, trainable=True)
        self.critic = Critic(config, horizon, self.device, seed + 1, trainable=True)
        self.target_critic = Critic(config, horizon, self.device, seed + 1)
        self.raw_alpha = torch.tensor(
            raw_from_alpha(config.initial_alpha, config.alpha_type), dtype=torch.float32, device=self.device
        ).requires_grad_()
        self.raw_alpha.grad = torch.zeros_like(self.raw_alpha)
        self.optimisers = {
            "actor": _adam(self.actor.flat, config.actor_lr, config.actor_betas),
            "critic": _adam(self.critic.flat, config.critic_lr),
            "alpha": _adam(self.raw_alpha, config.alpha_lr),
        }
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.updates = 0
        self._not_computed = torch.full((), math.nan, device=self.device)

    @property
    def actor_due(self) -> bool:
        """Whether the next update trains actor and temperature: `train_actor_steps` updates are done."""
        return self.updates >= self.config.train_actor_steps

    def update(self, batch: Batch, update_actor: bool) -> Tensor:
        """One gradient step of the critic and, if `update_actor`, of actor and temperature; then the target.

        target = reward + discount * agg_heads Q_target(s', a') [- discount * alpha * log pi(a'|s')]
        critic loss = mean over batch and heads of (Q - target)^2
        actor loss = mean over batch of alpha * log pi(a|s) - agg_heads Q(s, a)
        temperature loss = alpha * (entropy - target_entropy), entropy = mean of -log pi(a|s)

        Args:
            batch: transitions.
            update_actor: pass `actor_due`.

        Returns:
            fp32 [len(METRIC_NAMES)], from before the step, gradient norms from before clipping. What an
            update without actor does not compute (actor loss, entropy, actor gradient norm, temperature loss)
            is NaN.
        """
        config = self.config
        pixels, next_pixels = self._pixels(batch)
        size = batch.reward.shape[0]
        eps = torch.randn(
            (2 if update_actor else 1, size, self.action_dim), generator=self.generator, device=self.device
        )
        alpha = alpha_from_raw(self.raw_alpha, config.alpha_type)
        target = self._target(batch, next_pixels, eps[0], alpha.detach())

        features = self.critic.encoder(pixels, batch.state)
        q = self.critic.q_values(features, batch.noise)
        critic_loss = F.mse_loss(q, target.expand_as(q))
        self.critic.backward_(critic_loss)
        critic_norm = clip_gradient_(self.critic.flat_grad, config.critic_grad_clip)

        actor_loss = entropy = actor_norm = alpha_loss = self._not_computed
        if update_actor:
            mean, log_std = self.actor(pixels, batch.state)
            u = torch.addcmul(mean, log_std.exp(), eps[1])
            log_probability = log_prob(u, log_std, eps[1])
            new_q = self.critic.q_values(features.detach(), u.tanh() * config.action_magnitude)
            actor_loss = (alpha.detach() * log_probability - aggregate_heads(new_q, config.q_aggregation)).mean()
            self.actor.backward_(actor_loss)
            actor_norm = clip_gradient_(self.actor.flat_grad, config.actor_grad_clip)
            entropy = -log_probability.detach().mean()
            alpha_loss = alpha * (entropy - config.target_entropy)
            assert self.raw_alpha.grad is not None
            self.raw_alpha.grad.copy_(torch.autograd.grad(alpha_loss, self.raw_alpha)[0])
            clip_gradient_(self.raw_alpha.grad, config.alpha_grad_clip)
            self.optimisers["actor"].step()
            self.optimisers["alpha"].step()
        self.optimisers["critic"].step()
        self.target_critic.flat.lerp_(self.critic.flat, config.tau)
        self.updates += 1
        metrics = (
            critic_loss,
            critic_norm,
            actor_loss,
            entropy,
            actor_norm,
            alpha_loss,
            alpha,
            q.mean(),
            target.mean(),
        )
        return torch.stack([metric.detach() for metric in metrics])

    @torch.no_grad()
    def _pixels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Network input of observation and next observation, augmented independently of each other."""
        config = self.config
        image = torch.cat([batch.image, batch.next_image])
        jitter = None
        if config.augmentation != "none":
            uniform = torch.rand((image.shape[0], 5), generator=self.generator, device=self.device)
            image = random_shift(image, uniform[:, :2], config.augmentation_pad)
            jitter = uniform[:, 2:] if config.augmentation == "crop_colour" else None
        pixels, next_pixels = preprocess_image(image, config, jitter).chunk(2)
        return pixels, next_pixels

    @torch.no_grad()
    def _target(self, batch: Batch, next_pixels: Tensor, eps: Tensor, alpha: Tensor) -> Tensor:
        """fp32 [B], the value that every Q head is regressed to."""
        config = self.config
        mean, log_std = self.actor(next_pixels, batch.next_state)
        u = torch.addcmul(mean, log_std.exp(), eps)
        q = self.target_critic(next_pixels, batch.next_state, u.tanh() * config.action_magnitude)
        value = aggregate_heads(q, config.q_aggregation)
        if config.entropy_backup:
            value = value - alpha * log_prob(u, log_std, eps)
        return torch.addcmul(batch.reward, batch.discount, value)

    def _tensors(self) -> dict[str, Tensor]:
        """The live tensors of a checkpoint, by name."""
        tensors = {
            "actor.flat": self.actor.flat,
            "critic.flat": self.critic.flat,
            "target_critic.flat": self.target_critic.flat,
            "alpha.raw": self.raw_alpha.detach(),
        }
        for name, optimiser in self.optimisers.items():
            (state,) = optimiser.state.values()
            tensors |= {f"{name}.adam.{field}": state[field] for field in ADAM_FIELDS}
        return tensors

    def _layout(self) -> Tensor:
        """uint8 [2, 8]: layout hashes of actor and critic; flat vectors of equal length may still differ."""
        hashes = [layout_hash(module).to_bytes(8, "little") for module in (self.actor, self.critic)]
        return torch.tensor([list(digest) for digest in hashes], dtype=torch.uint8)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything needed to continue exactly, as contiguous CPU tensors that share no memory.

        `actor.flat` alone is what `Actor.load_flat_` takes.
        """
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._tensors().items()}
        tensors["layout"] = self._layout()
        tensors["updates"] = torch.tensor(self.updates, dtype=torch.int64)
        tensors["generator"] = self.generator.get_state()
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `state_tensors()`, in place; nothing is changed when an error is raised.

        The continuation is exact on the kind of device that they come from; on another kind the generator starts anew.

        Raises:
            ValueError: a tensor is missing, or does not fit the agent's settings or device in shape or dtype.
        """
        expected = self.state_tensors()
        for name, like in expected.items():
            if name not in tensors:
                raise ValueError(f"the SAC checkpoint has no tensor {name!r}; it is incomplete, use another one")
            found = tensors[name]
            if name == "generator":  # its state has another size on another kind of device
                continue
            if found.shape != like.shape or found.dtype != like.dtype:
                raise ValueError(
                    f"tensor {name!r} of the SAC checkpoint is {found.dtype} of shape {tuple(found.shape)},"
                    f" expected {like.dtype} of shape {tuple(like.shape)}; use the sac settings and the kind"
                    " of device that it was saved with"
                )
        if not torch.equal(tensors["layout"].cpu(), expected["layout"]):
            raise ValueError(
                "the networks of the SAC checkpoint are laid out differently; use the sac settings that it"
                " was saved with"
            )
        for name, tensor in self._tensors().items():
            tensor.copy_(tensors[name])
        self.updates = int(tensors["updates"])
        if tensors["generator"].shape == expected["generator"].shape:
            self.generator.set_state(tensors["generator"].cpu())
        else:
            self.generator.manual_seed(self.updates)
