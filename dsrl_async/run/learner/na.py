"""The updates of DSRL-NA: what the frozen policy makes of noise at replayed observations is asked inside of them.

The learner has a copy of the policy of its own, on its own device. Asking the inference process instead would spare the
weights (5.8 GiB of a full-size Pi0 in bfloat16), but an update could not be captured any more, robots would wait behind
batches of the learner's size, and which of two requests comes first would depend on the clock.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsrl_async.config.settings import Config
from dsrl_async.policies import FrozenPolicy, NormalisedBatch
from dsrl_async.run.learner.sampling import SeenColumns, Source, draw_rows
from dsrl_async.run.learner.updates import Updates
from dsrl_async.sac import METRIC_NAMES, metric_names
from dsrl_async.sac.na import NaAgent, Observations
from dsrl_async.sac.networks import expand_noise


class PolicyFlow:
    """The frozen policy as a function of observations and noise, a few rows at a time, without gradient."""

    def __init__(self, policy: FrozenPolicy, config: Config) -> None:
        """`config` says how many rows at a time, how noise is laid out, and how many actions are executed."""
        self.batch = policy.batch(config.learner.policy_rows, int(policy.prompt_lengths.max()))
        assert isinstance(self.batch, NormalisedBatch)
        self.rows, self.layout, self.chunk = config.learner.policy_rows, config.sac.noise_layout, config.env.chunk
        self.horizon = policy.spec.action_horizon

    @torch.no_grad()
    def __call__(self, seen: SeenColumns, states: Tensor, noise: Tensor) -> Tensor:
        """Sample the policy.

        Args:
            seen: B observations; `states` fp32 [B, state_dim] is theirs, in the robot's units.
            noise: fp32 [B, A], the agent's.

        Returns:
            fp32 [B, chunk * action_dim]: the normalised actions that would be executed.
        """
        batch, parts = self.batch, []
        assert isinstance(batch, NormalisedBatch)
        for start in range(0, len(noise), self.rows):
            part = slice(start, start + self.rows)
            images = seen.images[part]
            count = len(images)
            batch.images[:count].copy_(images)
            batch.state[:count].copy_(states[part])
            batch.choose_prompts(seen.task_index[part])
            batch.noise[:count].copy_(expand_noise(noise[part], self.horizon, self.layout))
            batch.encode()
            batch.denoise()
            parts.append(batch.normalised_actions[:count, : self.chunk].flatten(1).clone())
        return torch.cat(parts)


class NaUpdates(Updates):
    """Draws batches and lets a `NaAgent` learn from them; the steps of its noise critic come behind an update.

    Static buffers beside those of `Updates`: `next_seen`, what the policy sees of the batch's next observations; and
    for a step of the noise critic `distilling`, `observations` and `seen`.
    """

    agent: NaAgent

    def __init__(self, agent: NaAgent, source: Source, batch_size: int, flow: PolicyFlow) -> None:
        super().__init__(agent, source, batch_size)
        assert source.seen is not None
        self.flow, self.columns = flow, source.seen
        self.metrics = torch.zeros(len(metric_names("na")), device=agent.device)
        self.metrics[len(METRIC_NAMES) :] = torch.nan  # until the first of its steps
        self.distilling = agent.distilling_numbers(batch_size)
        self.observations = Observations(self.batch.images[:batch_size].clone(), self.batch.states[:batch_size].clone())
        self.seen, self.next_seen = (
            SeenColumns(*(column.new_zeros(batch_size, *column.shape[1:]) for column in self.columns)) for _ in range(2)
        )

    def draw(self) -> None:
        super().draw()
        row = self.source.table.index_select(0, self.positions)
        self._see(self.source.following.index_select(0, row), self.next_seen)

    def _see(self, row: Tensor, seen: SeenColumns) -> None:
        for column, buffer in zip(self.columns, seen, strict=True):
            torch.index_select(column, 0, row, out=buffer)

    def learn(self, update_actor: bool) -> None:
        states = self.batch.states.chunk(2)[1]
        metrics = self.agent.learn(
            self.batch, self.random, update_actor, lambda noise: self.flow(self.next_seen, states, noise)
        )
        self.metrics[: len(METRIC_NAMES)].copy_(metrics)

    def draw_observations(self) -> None:
        """First half of a step of the noise critic."""
        columns, row = self.source.columns, draw_rows(self.source, self.distilling, self.positions)
        torch.index_select(columns.image, 0, row, out=self.observations.images)
        torch.index_select(columns.state, 0, row, out=self.observations.states)
        self._see(row, self.seen)

    def distil(self) -> None:
        """Second half."""
        states = self.observations.states
        metrics = self.agent.distil(
            self.observations, self.distilling, lambda noise: self.flow(self.seen, states, noise)
        )
        self.metrics[len(METRIC_NAMES) :].copy_(metrics)

    def functions(self) -> list[Callable[[], None]]:
        def whole_step() -> None:
            self.draw_observations()
            self.distil()

        return [*super().functions(), whole_step]

    def run(self) -> None:
        """An update, and the steps of the noise critic that come behind it."""
        steps = self.agent.distilling_steps(self.agent.updates)
        super().run()
        for _ in range(steps):
            if not self.draw_into(self.distilling, self.draw_observations):
                return  # the rows are overwritten as they are drawn, every time
            if self.captured:
                self.captured.replays[-1]()
            else:
                self.distil()


def make_na_updates(
    config: Config, policy: FrozenPolicy, device: torch.device, source: Source, products: torch.dtype
) -> NaUpdates:
    """The updates of a run, with its agent as it is at the beginning."""
    sizes = policy.spec
    agent = NaAgent(
        config.sac,
        sizes.action_horizon,
        config.env.chunk,
        sizes.robot_action_dim,
        device,
        config.seed,
        products,
    )
    return NaUpdates(agent, source, config.sac.batch_size, PolicyFlow(policy, config))
