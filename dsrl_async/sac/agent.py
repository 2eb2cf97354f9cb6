"""The SAC agent: networks, optimiser state, random state, and the gradient update.

`SacAgent.learn` is a fixed sequence of tensor operations on fixed storage. It reads no tensor's value on the host and
draws no random numbers, so that it can be captured in a CUDA graph; on the CPU it is simply called. All losses of an
update use the parameters from before it, so each network encodes an image only once; the critic's encoding of the
observations serves its own loss, with gradient, and the actor's loss, detached. With `sac.critic_in_actor_loss: after`
the critic makes its step first, and encodes the observations again for the actor's loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam

from dsrl_async.config.settings import SacConfig
from dsrl_async.config.shapes import AUGMENTATION_NUMBERS
from dsrl_async.sac.augmentation import random_shift
from dsrl_async.sac.flat import FlatModule, clip_gradient_, layout_hash
from dsrl_async.sac.networks import Actor, Critic, aggregate_heads, log_prob, preprocess_image

Flow = Callable[[Tensor], Tensor]
"""What the policy makes of noise, fp32 [B, A], at given observations: what the critic judges."""


Observed = tuple[Tensor, Tensor, Tensor | None]
"""What the networks take of observations: pixels, state and instruction, see `networks.Actor.forward`."""


def itself(noise: Tensor) -> Tensor:
    """The `Flow` of a critic that judges noise."""
    return noise


class Imitated(NamedTuple):
    """Noise that demonstrations show for the last n observations of a batch."""

    noise: Tensor
    """fp32 [n, A], within `action_magnitude`"""
    weight: Tensor
    """fp32 [n]: 1 where it is to be imitated, and 0 where the policy does not make of it what was demonstrated"""


class Batch(NamedTuple):
    """B transitions to learn from."""

    images: Tensor
    """uint8 [2 * B, 64, 64, 3 * cameras], those of the observations followed by those of the next observations"""
    states: Tensor
    """fp32 [2 * B, state_dim], in the same order"""
    noise: Tensor
    """fp32 [B, A], the noise that the policy was given; with `na.NaAgent` the chunk of actions that it made of it"""
    reward: Tensor
    """fp32 [B]"""
    discount: Tensor
    """fp32 [B], see `transition_discount`"""
    instructions: Tensor | None = None
    """fp32 [2 * B, instruction_dim], in the order of the states, or None where the agent is not told its task"""


class RandomNumbers(NamedTuple):
    """The random numbers of an update, drawn beforehand."""

    rows: Tensor
    """fp64 [B] in [0, 1), which choose the transitions; 53 bits make each of millions equally likely"""
    augmentation: Tensor
    """fp32 [2 * B, n] in [0, 1), two for the shift and five for the colours of each image (`AUGMENTATION_NUMBERS`)"""
    normal: Tensor
    """fp32 [2, B, A], for the noise of the next observations and then of the observations"""
    of_slots: Tensor | None = None
    """fp32 [B, horizon, noise_dim], for the noise of the slots where a policy is sampled and its layout has any"""

    def draw_(self, generator: torch.Generator) -> None:
        """Fill all in place."""
        for uniform in (self.rows, self.augmentation):
            if uniform.numel():
                uniform.uniform_(generator=generator)
        self.normal.normal_(generator=generator)
        if self.of_slots is not None:
            self.of_slots.normal_(generator=generator)


def transition_discount(config: SacConfig, steps: Tensor, terminal: Tensor) -> Tensor:
    """Factor of the next observation's value in the target.

    Args:
        config: its `gamma` and `discount_per` are used.
        steps: integer [B], environment steps that the decision executed (fewer in the last chunk of an episode).
        terminal: bool or number [B], true where the episode ended by success. After truncation by the time limit the
            value of the last observation still counts.

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


class Adam:
    """Adam (Kingma and Ba 2015, epsilon 1e-8) of one flat parameter: one fused kernel on storage fixed from the start.

    `torch.optim.Adam` makes its state in the first step and does not run on the meta device, on which captures are
    rehearsed.

    With `falling`, the learning rate is a tensor, which a CUDA graph reads each time; `set_fraction` writes it.
    """

    def __init__(
        self, parameter: Tensor, lr: float, betas: tuple[float, float] = (0.9, 0.999), falling: bool = False
    ) -> None:
        self.parameter, self.lr, self.betas = parameter, lr, betas
        # What torch's kernel reads: float32 on a GPU. A CPU takes any, and in float64 the rate is not rounded.
        dtype = torch.float64 if parameter.device.type == "cpu" else torch.float32
        self.falling_lr = torch.full((), lr, dtype=dtype, device=parameter.device) if falling else None
        self.state = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    def set_fraction(self, fraction: float) -> None:
        """Take this fraction of the learning rate from now on; only with `falling`."""
        assert self.falling_lr is not None
        self.falling_lr.fill_(self.lr * fraction)

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """Make a step along `gradient`. The bias correction reads the step count on the device."""
        # On the meta device torch has no kernel that takes the rate as a tensor, and the numbers do not matter.
        lr = self.lr if self.falling_lr is None or self.falling_lr.is_meta else self.falling_lr
        adam(
            [self.parameter],
            [gradient],
            *([self.state["exp_avg"]], [self.state["exp_avg_sq"]], [], [self.state["step"]]),
            fused=True,
            capturable=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )


class SacAgent:
    """Everything that learning changes.

    Args:
        config: settings of DSRL-SAC.
        horizon: number of action slots of the policy.
        device: device of all tensors, which are fp32.
        seed: determines the initial weights and seeds `generator`.
        products: dtype of convolutions and matrix products, see `Actor`.

    Attributes:
        actor, critic, target_critic: the networks; `.flat` is the contiguous vector of their weights.
        raw_alpha: fp32 [], the temperature before softplus or exp.
        generator: source of all random numbers of the updates.
        updates: number of critic updates so far, which the caller of `learn` counts.
        target_entropy: fp32 [], what the temperature steers towards, which `schedule` writes.
        imitation_weight: fp32 [], what the caller of `learn` weighs imitation with.
    """

    def __init__(
        self,
        config: SacConfig,
        horizon: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        products: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.action_dim = config.noise_width(horizon)
        self.actor = Actor(config, horizon, self.device, seed, True, products)
        judging, slots = self._judged(horizon)
        self.critic = Critic(judging, slots, self.device, seed + 1, True, products)
        self.target_critic = Critic(judging, slots, self.device, seed + 1, False, products)
        self.raw_alpha = torch.full(
            (), raw_from_alpha(config.initial_alpha, config.alpha_type), dtype=torch.float32, device=self.device
        )
        self.optimisers = {
            "actor": Adam(self.actor.flat, config.actor_lr, config.actor_betas, self._lr_falls),
            "critic": Adam(self.critic.flat, config.critic_lr, falling=self._lr_falls),
            "alpha": Adam(self.raw_alpha, config.alpha_lr),
        }
        # The meta device draws nothing and has no generator.
        self.generator = torch.Generator("cpu" if self.device.type == "meta" else self.device).manual_seed(seed)
        self.updates = 0
        self.imitation_weight = torch.zeros((), device=self.device)
        self.target_entropy = torch.full((), config.target_entropy, dtype=torch.float32, device=self.device)
        self._decayed = 0.0
        self._not_computed = torch.full((), math.nan, device=self.device)

    def _judged(self, horizon: int) -> tuple[SacConfig, int]:
        """The settings and the number of slots that say how wide the critic's input is: here the actor's."""
        return self.config, horizon

    @property
    def actor_due(self) -> bool:
        """Whether the next update trains actor and temperature, since `train_actor_steps` updates are done."""
        return self.updates >= self.config.train_actor_steps

    @property
    def _lr_falls(self) -> bool:
        return self.config.lr_schedule != "constant"

    def schedule(self) -> None:
        """Write the learning rates and the target entropy of the next update, before it: `learn` itself, which may be
        captured, only reads them."""
        decayed = self.config.decayed(self.updates)
        if decayed == self._decayed:
            return
        self._decayed = decayed
        for name, optimiser in self.optimisers.items():
            if name != "alpha":
                optimiser.set_fraction(self.config.lr_fraction(self.updates))
        self.target_entropy.fill_(self.config.target_entropy_after(self.updates))

    def random_numbers(self, batch_size: int) -> RandomNumbers:
        """Buffers for the random numbers of an update."""
        numbers = AUGMENTATION_NUMBERS[self.config.augmentation]
        return RandomNumbers(
            rows=torch.zeros(batch_size, dtype=torch.float64, device=self.device),
            augmentation=torch.zeros(2 * batch_size, numbers, device=self.device),
            normal=torch.zeros(2, batch_size, self.action_dim, device=self.device),
        )

    def learn(
        self,
        batch: Batch,
        random: RandomNumbers,
        update_actor: bool,
        flow: Flow = itself,
        imitated: Imitated | None = None,
    ) -> Tensor:
        """Make a gradient step of the critic and, if `update_actor`, of actor and temperature; then update the target.

        target = reward + discount * agg_heads Q_target(s', a') [- discount * alpha * log pi(a'|s')]
        critic loss = mean over batch and heads of (Q - target)^2
        actor loss = mean over batch of alpha * log pi(a|s) - agg_heads Q(s, a)
            [+ imitation_weight * mean over demonstrations of -log pi(w|s)]
        temperature loss = alpha * (entropy - target_entropy), entropy = mean of -log pi(a|s)

        The Q of the actor's loss is that from before the critic's step, or with `critic_in_actor_loss: after` that from
        after it; all else is from before the update.

        Args:
            batch: transitions.
            random: its `augmentation` and `normal` are used.
            update_actor: pass `actor_due`.
            flow: what the critic judges of noise at the next observations.
            imitated: demonstrated noise for the last observations of the batch.

        Returns:
            fp32 [len(METRIC_NAMES)] from before the step, with gradient norms from before clipping; with demonstrated
            noise one more, the mean over it of -log pi(w|s), without its weight. Metrics that an update without actor
            does not compute (actor loss, entropy, actor gradient norm, temperature loss, this mean) are NaN.
        """
        config = self.config
        pixels, next_pixels = self._pixels(batch.images, random.augmentation)
        state, next_state = batch.states.chunk(2)
        instruction, next_instruction = (None, None) if batch.instructions is None else batch.instructions.chunk(2)
        alpha = alpha_from_raw(self.raw_alpha, config.alpha_type)
        target = self._target(batch, (next_pixels, next_state, next_instruction), random.normal[0], alpha, flow)

        observation = pixels, state, instruction
        features = self.critic.encoder(*observation)
        q = self.critic.q_values(features, batch.noise)
        critic_loss = F.mse_loss(q, target.expand_as(q))
        self.critic.backward_(critic_loss)
        critic_norm = clip_gradient_(self.critic.flat_grad, config.critic_grad_clip)
        q_mean, after = q.detach().mean(), config.critic_in_actor_loss == "after"
        if after:
            self.optimisers["critic"].step(self.critic.flat_grad)

        actor_loss = entropy = actor_norm = alpha_loss = imitation = self._not_computed
        if update_actor:
            mean, log_std = self.actor(*observation)
            u = torch.addcmul(mean, log_std.exp(), random.normal[1])
            log_probability = log_prob(u, log_std, random.normal[1])
            new_q = self._q_of_noise(observation, u.tanh() * config.action_magnitude, None if after else features)
            actor_loss = (alpha * log_probability - aggregate_heads(new_q, config.q_aggregation)).mean()
            if imitated is not None:
                imitation = self._imitation(mean, log_std, imitated)
                actor_loss = actor_loss + self.imitation_weight * imitation
            self.actor.backward_(actor_loss)
            actor_norm = clip_gradient_(self.actor.flat_grad, config.actor_grad_clip)
            entropy = -log_probability.detach().mean()
            excess = entropy - self.target_entropy
            alpha_loss = alpha * excess
            # The derivative of exp is exp, that of softplus the logistic function.
            slope = alpha if config.alpha_type == "exp" else self.raw_alpha.sigmoid()
            alpha_grad = slope * excess
            clip_gradient_(alpha_grad, config.alpha_grad_clip)
            self.optimisers["actor"].step(self.actor.flat_grad)
            self.optimisers["alpha"].step(alpha_grad)
        if not after:
            self.optimisers["critic"].step(self.critic.flat_grad)
        self.target_critic.flat.lerp_(self.critic.flat, config.tau)
        metrics = (
            critic_loss,
            critic_norm,
            actor_loss,
            entropy,
            actor_norm,
            alpha_loss,
            alpha,
            q_mean,
            target.mean(),
            *(() if imitated is None else (imitation,)),
        )
        return torch.stack([metric.detach() for metric in metrics])

    def _imitation(self, mean: Tensor, log_std: Tensor, imitated: Imitated) -> Tensor:
        """fp32 [], the mean of -log pi of demonstrated noise, over those of a batch's last rows that have a weight.

        It is 0 if none has one.
        """
        count = len(imitated.weight)
        mean, log_std = mean[-count:], log_std[-count:]
        u = (imitated.noise / self.config.action_magnitude).atanh()
        surprise = -log_prob(u, log_std, (u - mean) * (-log_std).exp())
        return (imitated.weight * surprise).sum() / imitated.weight.sum().clamp_min(1.0)

    def imitate(
        self, images: Tensor, states: Tensor, instructions: Tensor | None, imitated: Imitated, augmentation: Tensor
    ) -> Tensor:
        """Make a step of the actor by demonstrations alone; returns the loss, fp32 [], the mean of -log pi.

        Args:
            images, states, instructions: n observations, as in `Batch`.
            imitated: the noise that is to be likely there.
            augmentation: as in `RandomNumbers`, for each of the images.
        """
        mean, log_std = self.actor(self._augmented(images, augmentation), states, instructions)
        loss = self._imitation(mean, log_std, imitated)
        self.actor.backward_(loss)
        clip_gradient_(self.actor.flat_grad, self.config.actor_grad_clip)
        self.optimisers["actor"].step(self.actor.flat_grad)
        return loss.detach()

    def _q_of_noise(self, observation: Observed, noise: Tensor, features: Tensor | None) -> Tensor:
        """fp32 [heads, B], what the actor's noise is worth. `features` are the critic's, if they are up to date."""
        with torch.no_grad():
            seen = self.critic.encoder(*observation) if features is None else features
        return self.critic.q_values(seen.detach(), noise)

    def _pixels(self, images: Tensor, augmentation: Tensor) -> tuple[Tensor, Tensor]:
        """Network inputs for observations and next observations, each augmented independently."""
        pixels, next_pixels = self._augmented(images, augmentation).chunk(2)
        return pixels, next_pixels

    @torch.no_grad()
    def _augmented(self, images: Tensor, augmentation: Tensor) -> Tensor:
        """Network inputs, fp32 [B, C, S, S], for images uint8 [B, 64, 64, C], each augmented independently."""
        config = self.config
        jitter = None
        if config.augmentation != "none":
            images = random_shift(images, augmentation[:, :2], config.augmentation_pad)
            jitter = augmentation[:, 2:] if config.augmentation == "crop_colour" else None
        return preprocess_image(images, config, jitter)

    @torch.no_grad()
    def _target(self, batch: Batch, following: Observed, eps: Tensor, alpha: Tensor, flow: Flow) -> Tensor:
        """fp32 [B], the value that every Q head is regressed to."""
        config = self.config
        mean, log_std = self.actor(*following)
        u = torch.addcmul(mean, log_std.exp(), eps)
        features = self.target_critic.encoder(*following)
        q = self.target_critic.q_values(features, flow(u.tanh() * config.action_magnitude))
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
            "alpha.raw": self.raw_alpha,
        }
        for name, optimiser in self.optimisers.items():
            tensors |= {f"{name}.adam.{field}": tensor for field, tensor in optimiser.state.items()}
        return tensors

    def _networks(self) -> list[FlatModule]:
        """The networks whose layouts differ."""
        return [self.actor, self.critic]

    def _layout(self) -> Tensor:
        """uint8 [n, 8], layout hashes of the networks: flat vectors of equal length may have different layouts."""
        hashes = [layout_hash(module).to_bytes(8, "little") for module in self._networks()]
        return torch.tensor([list(digest) for digest in hashes], dtype=torch.uint8)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything needed to continue exactly, as contiguous CPU tensors that share no memory.

        Its `actor.flat` is what `Actor.load_flat_` takes.
        """
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._tensors().items()}
        tensors["layout"] = self._layout()
        tensors["updates"] = torch.tensor(self.updates, dtype=torch.int64)
        tensors["generator"] = self.generator.get_state()
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `state_tensors()`, in place. If an error is raised, nothing has changed.

        The continuation is exact on the kind of device that saved them; on another kind the generator starts anew.

        Raises:
            ValueError: a tensor is missing, or its shape or dtype does not fit the agent's settings or device.
        """
        expected = self.state_tensors()
        for name, like in expected.items():
            if name not in tensors:
                raise ValueError(f"the SAC checkpoint has no tensor {name!r}; it is incomplete, use another one")
            found = tensors[name]
            if name == "generator":  # the size of its state depends on the kind of device
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
