"""How the agent's vector becomes the policy's initial noise: the layouts of `sac.noise_layout`.

A policy was trained with noise that is independent N(0, 1) in every number of every action slot. All layouts keep the
variance of 1: where the agent's numbers are independent N(0, 1), as in the warm-up, so is each number of a slot. They
differ in how much the slots have in common, and so in how many numbers there are to choose:

* `repeat`: one vector in all slots.
* `knots`: K vectors at slots that are equally far apart, the first and the last one among them, and between two of them
  what is interpolated linearly, with weights divided by their 2-norm. One knot is `repeat`, a knot for each slot
  `per_slot`. Where both neighbours are v, a slot between them gets up to sqrt(2) v.
* `per_slot`: a vector for each slot.
* `shift`: a part of the noise stays the policy's own: slot = sqrt(1 - s^2) * e + s * v, where e is independent N(0, 1)
  in every slot, v the agent's vector and s `sac.noise_shift`. The policy always sees noise much as it was trained with,
  and what it does stays random, also where the agent's part is not; e follows from the episode's seed. The agent knows
  of v alone: it is what the replay buffer holds and what a critic of noise judges.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsrl_async.config.settings import SacConfig


class NoiseLayout:
    """Lays out the agent's vectors over the action slots, the same for every process that samples the policy.

    Attributes:
        width: A, how many numbers the agent chooses, `config.noise_width(horizon)`.
        shifts: whether the noise of the slots is needed beside the agent's.
    """

    def __init__(self, config: SacConfig, horizon: int, device: torch.device | str = "cpu") -> None:
        """`horizon` is the number of the policy's action slots; with `knots` there are no more knots than that."""
        self.layout, self.horizon, self.width = config.noise_layout, horizon, config.noise_width(horizon)
        self.shifts, self.shift = self.layout == "shift", config.noise_shift
        if self.layout != "knots":
            return
        self._knots = knots = config.noise_knots
        intervals = max(1, horizon - 1)
        assert knots <= horizon
        before = [slot * (knots - 1) // intervals for slot in range(horizon)]
        after = [min(knot + 1, knots - 1) for knot in before]
        share = [slot * (knots - 1) % intervals / intervals for slot in range(horizon)]
        weights = [(1 - f) / math.hypot(1 - f, f) for f in share], [f / math.hypot(1 - f, f) for f in share]
        self._before, self._after = (torch.tensor(knot, device=device) for knot in (before, after))
        self._of_before, self._of_after = (torch.tensor(weight, device=device).unsqueeze(1) for weight in weights)

    def expand(self, noise: Tensor, of_slots: Tensor | None = None) -> Tensor:
        """The policy's initial noise.

        Args:
            noise: fp32 [B, A], the agent's.
            of_slots: fp32 [B, horizon, noise_dim], independent standard normal numbers, which `shift` needs.

        Returns:
            fp32 [B, horizon, noise_dim]; with `repeat` and `per_slot` a view, with `repeat` all slots share memory.
        """
        if self.layout == "per_slot":
            return noise.view(noise.shape[0], self.horizon, -1)
        if self.layout == "knots":
            knots = noise.unflatten(1, (self._knots, -1))
            after = knots.index_select(1, self._after) * self._of_after
            return torch.addcmul(after, knots.index_select(1, self._before), self._of_before)
        repeated = noise.unsqueeze(1).expand(-1, self.horizon, -1)
        if self.shifts:
            assert of_slots is not None
            return torch.add(of_slots * math.sqrt(1 - self.shift**2), repeated, alpha=self.shift)
        return repeated
