"""DSRL-NA, noise aliasing: the agent whose critic judges actions, since many kinds of noise make the same ones.

The critic Q(s, a) learns from the chunks of actions that the policy made, which are in the replay buffer, by the same
target as DSRL-SAC's, where the next action is what the policy makes of the actor's noise. A second critic, the *noise
critic* Q(s, w), learns from the first what noise is worth, head by head, on noise as the policy was trained with; the
actor learns from it alone. Neither critic's gradient goes through the policy, nor from the noise critic into the first.

The noise critic has weights and an image encoder of its own. It has to know what the policy would do about an
observation, and the critic only how good something done there is, so it gets more than the critic's features; and the
critic's encoder would change beneath it.

All actions are normalised, as the policy computes them, and whole chunks, however few of their steps an episode's end
left over: what came of a chunk may depend on its first steps only, but a chunk that was filled up would tell the critic
that an episode ends here, which no action does that it is asked about.

From Wagenmaker et al., Steering Your Diffusion Policy with Latent Space Reinforcement Learning (2025), algorithm
DSRL-NA. Where their losses are half the sum over the heads, these are the mean, as in DSRL-SAC here: Adam makes no
difference between the two, and clipping by `sac.critic_grad_clip` means the same for both algorithms.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsrl_async.config.settings import SacConfig
from dsrl_async.config.shapes import AUGMENTATION_NUMBERS
from dsrl_async.sac.agent import Adam, Flow, Observed, RandomNumbers, SacAgent
from dsrl_async.sac.flat import FlatModule, clip_gradient_
from dsrl_async.sac.networks import Critic


class Observations(NamedTuple):
    """B observations to learn what noise is worth at."""

    images: Tensor
    """uint8 [B, 64, 64, 3 * cameras]"""
    states: Tensor
    """fp32 [B, state_dim]"""
    instructions: Tensor | None = None
    """fp32 [B, instruction_dim], or None where the agent is not told its task"""


class NaAgent(SacAgent):
    """Everything that learning changes.

    Args:
        config, horizon, device, seed, products: as for `SacAgent`.
        chunk: number of actions that a decision executes.
        action_dim: width of an action.

    Attributes:
        critic, target_critic: judge action chunks, fp32 [B, chunk * action_dim].
        noise_critic: judges noise as the policy is given it, fp32 [B, A].
    """

    def __init__(
        self,
        config: SacConfig,
        horizon: int,
        chunk: int,
        action_dim: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        products: torch.dtype = torch.float32,
    ) -> None:
        self.chunk, self.robot_action_dim, self.horizon = chunk, action_dim, horizon
        super().__init__(config, horizon, device, seed, products)
        self.noise_critic = Critic(config, horizon, self.device, seed + 2, True, products)
        self.optimisers["noise_critic"] = Adam(self.noise_critic.flat, config.critic_lr, falling=self._lr_falls)

    def _judged(self, horizon: int) -> tuple[SacConfig, int]:
        return self.config.judging_actions(self.robot_action_dim), self.chunk

    def random_numbers(self, batch_size: int) -> RandomNumbers:
        return super().random_numbers(batch_size)._replace(of_slots=self._numbers_of_slots(batch_size))

    def _numbers_of_slots(self, batch_size: int) -> Tensor | None:
        if self.config.noise_layout != "shift":
            return None
        return torch.zeros(batch_size, self.horizon, self.config.noise_dim, device=self.device)

    def distilling_numbers(self, batch_size: int) -> RandomNumbers:
        """Buffers for the random numbers of `distil`: rows, one image's augmentation each, and noise fp32 [B, A]."""
        numbers = AUGMENTATION_NUMBERS[self.config.augmentation]
        return RandomNumbers(
            rows=torch.zeros(batch_size, dtype=torch.float64, device=self.device),
            augmentation=torch.zeros(batch_size, numbers, device=self.device),
            normal=torch.zeros(batch_size, self.action_dim, device=self.device),
            of_slots=self._numbers_of_slots(batch_size),
        )

    def distilling_steps(self, update: int) -> int:
        """How many steps of `distil` come after the update of that number, the first being 0."""
        steps = self.config.noise_critic_steps
        return math.floor((update + 1) * steps) - math.floor(update * steps)

    def distil(self, batch: Observations, random: RandomNumbers, flow: Flow) -> Tensor:
        """Make a gradient step of the noise critic: it is drawn, head by head, to what the critic says of the actions.

        loss = mean over batch and heads of (Q_noise(s, w) - Q(s, F(s, w)))^2, w ~ N(0, I)

        The noise is the policy's own, not the actor's: unsquashed, laid out by `sac.noise_layout`, and not scaled by
        `sac.action_magnitude`, which bounds the actor; unless `sac.noise_critic_noise` says otherwise. Both critics see
        the same augmented images.

        Args:
            batch: observations.
            random: its `augmentation` and `normal` are used.
            flow: F, what the policy makes of noise at these observations.

        Returns:
            fp32 [len(NOISE_CRITIC_METRIC_NAMES)] from before the step, with the gradient's norm from before clipping.
        """
        noise = random.normal
        if self.config.noise_critic_noise == "squashed":
            noise = noise.tanh() * self.config.action_magnitude
        observation = self._augmented(batch.images, random.augmentation), batch.states, batch.instructions
        with torch.no_grad():
            worth = self.critic.q_values(self.critic.encoder(*observation), flow(noise))
        loss = F.mse_loss(self.noise_critic.q_values(self.noise_critic.encoder(*observation), noise), worth)
        self.noise_critic.backward_(loss)
        norm = clip_gradient_(self.noise_critic.flat_grad, self.config.critic_grad_clip)
        self.optimisers["noise_critic"].step(self.noise_critic.flat_grad)
        return torch.stack([loss.detach(), norm])

    def _q_of_noise(self, observation: Observed, noise: Tensor, features: Tensor | None) -> Tensor:
        with torch.no_grad():
            seen = self.noise_critic.encoder(*observation)
        return self.noise_critic.q_values(seen, noise)

    def _tensors(self) -> dict[str, Tensor]:
        return super()._tensors() | {"noise_critic.flat": self.noise_critic.flat}

    def _networks(self) -> list[FlatModule]:
        return [*super()._networks(), self.noise_critic]
