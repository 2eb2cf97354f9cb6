"""The updates of DSRL-NA: what the frozen policy makes of noise at replayed observations is asked inside of them.

The learner has a copy of the policy of its own, on its own device. Asking the inference process instead would spare the
weights (5.8 GiB of a full-size Pi0 in bfloat16), but an update could not be captured any more, robots would wait behind
batches of the learner's size, and which of two requests comes first would depend on the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dsrl_async.config.settings import Config
from dsrl_async.policies import FrozenPolicy, NormalisedBatch
from dsrl_async.run.learner.sampling import Demonstrated, SeenColumns, Source, draw_rows, tell
from dsrl_async.run.learner.updates import Updates
from dsrl_async.sac import NOISE_CRITIC_METRIC_NAMES
from dsrl_async.sac.layout import NoiseLayout
from dsrl_async.sac.na import NaAgent, Observations

ENCODED_AT_ONCE = 1024
"""Rows of which the pictures are gathered at once where prefixes are kept: 300 MB of a full-size Pi0's."""


class PolicyFlow:
    """The frozen policy as a function of observations and noise, a few rows at a time, without gradient."""

    def __init__(self, policy: FrozenPolicy, config: Config) -> None:
        """`config` says how many rows at a time, how noise is laid out, and how many actions are executed."""
        batch = policy.batch(config.learner.policy_rows, int(policy.prompt_lengths.max()))
        assert isinstance(batch, NormalisedBatch)
        self.batch, self.rows, self.chunk = batch, config.learner.policy_rows, config.env.chunk
        self.layout = NoiseLayout(config.sac, policy.spec.action_horizon, batch.noise.device)
        self.keeps = config.learner.policy_prefixes == "keep"

    @torch.no_grad()
    def __call__(self, seen: Sequence[Tensor], states: Tensor, noise: Tensor, of_slots: Tensor | None = None) -> Tensor:
        """Sample the policy.

        Args:
            seen: B observations: `SeenColumns`, or what `prefixes` gave for them if prefixes are kept.
            states: fp32 [B, state_dim], theirs, in the robot's units; only what is encoded needs them.
            noise: fp32 [B, A], the agent's.
            of_slots: fp32 [B, horizon, noise_dim], the noise of the slots, where the layout has any (`NoiseLayout`).

        Returns:
            fp32 [B, chunk * action_dim]: the normalised actions that would be executed.
        """
        batch, parts = self.batch, []
        for part in self._parts(len(noise)):
            count = part.stop - part.start
            if self.keeps:
                batch.load_prefix(tuple(column[part] for column in seen))
            else:
                self._encode(SeenColumns(*(column[part] for column in seen)), states[part])
            batch.noise[:count].copy_(self.layout.expand(noise[part], None if of_slots is None else of_slots[part]))
            batch.denoise()
            parts.append(batch.normalised_actions[:count, : self.chunk].flatten(1).clone())
        return torch.cat(parts)

    @torch.no_grad()
    def prefixes(self, seen: SeenColumns, states: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """Encode observations: yields rows from where to where, and what `NormalisedBatch.prefix` gives for them."""
        for part in self._parts(len(states)):
            self._encode(SeenColumns(*(column[part] for column in seen)), states[part])
            yield part, tuple(column[: part.stop - part.start] for column in self.batch.prefix())

    def _parts(self, count: int) -> Iterator[slice]:
        return (slice(start, min(start + self.rows, count)) for start in range(0, count, self.rows))

    def _encode(self, seen: SeenColumns, states: Tensor) -> None:
        batch, count = self.batch, len(states)
        batch.images[:count].copy_(seen.images)
        batch.state[:count].copy_(states)
        batch.choose_prompts(seen.task_index)
        batch.encode()


class KeptPrefixes:
    """What the policy encodes of every observation in the ring, in memory of the learner's own.

    It follows from the rows, so that checkpoints do without; a learner that starts encodes those that there are.
    """

    def __init__(self, flow: PolicyFlow, source: Source) -> None:
        self._flow, self._source = flow, source
        lanes, rows = len(source.refreshed_to), len(source.following)
        self._rows_per_lane = rows // lanes
        self._head = np.zeros(lanes, np.int64)  # below it all is encoded
        self.columns = tuple(column.new_empty(rows, *column.shape[1:]) for column in flow.batch.prefix())
        """[R, ...]: see `NormalisedBatch.prefix`; a row lies where it does in the source's columns."""

    def refresh(self) -> None:
        """Encode what is new since the last time, of what the source has been refreshed with."""
        head, seen = self._source.refreshed_to.copy(), self._source.seen
        assert seen is not None
        first = np.maximum(self._head, head - self._rows_per_lane)
        new = [
            lane * self._rows_per_lane + np.arange(a, b) % self._rows_per_lane
            for lane, (a, b) in enumerate(zip(first, head, strict=True))
        ]
        places = torch.from_numpy(np.concatenate(new)).to(seen.images.device)
        for start in range(0, len(places), ENCODED_AT_ONCE):
            some = places[start : start + ENCODED_AT_ONCE]
            observations = SeenColumns(*(column.index_select(0, some) for column in seen))
            states = self._source.columns.state.index_select(0, some)
            for part, prefix in self._flow.prefixes(observations, states):
                for column, rows in zip(self.columns, prefix, strict=True):
                    column.index_copy_(0, some[part], rows)
        self._head = head


class NaUpdates(Updates):
    """Draws batches and lets a `NaAgent` learn from them; the steps of its noise critic come behind an update.

    Static buffers beside those of `Updates`: `next_seen`, by which the policy knows the batch's next observations (see
    `PolicyFlow`); and for a step of the noise critic `distilling`, `observations` and `seen`.
    """

    agent: NaAgent

    def __init__(
        self,
        agent: NaAgent,
        source: Source,
        batch_size: int,
        flow: PolicyFlow,
        instructions: Tensor | None = None,
        demonstrated: Demonstrated | None = None,
    ) -> None:
        super().__init__(agent, source, batch_size, instructions, demonstrated)
        assert source.seen is not None
        self.flow = flow
        self.prefixes = KeptPrefixes(flow, source) if flow.keeps else None
        self.columns: tuple[Tensor, ...] = source.seen if self.prefixes is None else self.prefixes.columns
        self.demonstrated_columns: tuple[Tensor, ...] = ()
        if demonstrated is not None:
            assert demonstrated.source.seen is not None
            self.demonstrated_columns = demonstrated.source.seen
            if flow.keeps:
                kept = KeptPrefixes(flow, demonstrated.source)
                kept.refresh()
                self.demonstrated_columns = kept.columns
        self.metrics[-len(NOISE_CRITIC_METRIC_NAMES) :] = torch.nan  # until the first of its steps
        self.distilling = agent.distilling_numbers(batch_size)
        images, states, told = self.batch.images, self.batch.states, self.batch.instructions
        self.observations = Observations(
            images[:batch_size].clone(),
            states[:batch_size].clone(),
            None if told is None else told[:batch_size].clone(),
        )
        self.seen, self.next_seen = (
            tuple(column.new_zeros(batch_size, *column.shape[1:]) for column in self.columns) for _ in range(2)
        )

    def refresh(self) -> int:
        drawable = super().refresh()
        if self.prefixes is not None:
            self.prefixes.refresh()
        return drawable

    def draw(self) -> None:
        super().draw()
        row, shown = self.source.table.rows(self.positions), None
        if self.demonstrated is not None:
            shown = self.demonstrated.source.following.index_select(0, self.demonstrated.row)
        self._see(self.source.following.index_select(0, row), shown, self.next_seen)

    def _see(self, row: Tensor, shown: Tensor | None, seen: Sequence[Tensor]) -> None:
        """Of the ring's rows, and of the demonstrations' that were `shown`."""
        for column, buffer in zip(self.columns, seen, strict=True):
            torch.index_select(column, 0, row, out=buffer[: len(row)])
        if shown is not None:
            for column, buffer in zip(self.demonstrated_columns, seen, strict=True):
                torch.index_select(column, 0, shown, out=buffer[len(row) :])

    def learn(self, update_actor: bool) -> None:
        states = self.batch.states.chunk(2)[1]
        metrics = self.agent.learn(
            *(self.batch, self.random, update_actor),
            lambda noise: self.flow(self.next_seen, states, noise, self.random.of_slots),
            self.imitated,
        )
        self.metrics[: -len(NOISE_CRITIC_METRIC_NAMES)].copy_(metrics)

    def draw_observations(self) -> None:
        """First half of a step of the noise critic."""
        images, states, count = self.observations.images, self.observations.states, len(self.positions)
        told = self.observations.instructions
        numbers, shown = self.distilling, None
        if (demonstrated := self.demonstrated) is not None:
            of_shown = numbers._replace(rows=numbers.rows[count:])
            numbers = numbers._replace(rows=numbers.rows[:count])
            shown = draw_rows(demonstrated.source, of_shown, demonstrated.positions)
            torch.index_select(demonstrated.source.columns.image, 0, shown, out=images[count:])
            torch.index_select(demonstrated.source.columns.state, 0, shown, out=states[count:])
            if self.instructions is not None and told is not None:
                tell(demonstrated.source, shown, self.instructions, told[count:])
        columns, row = self.source.columns, draw_rows(self.source, numbers, self.positions)
        torch.index_select(columns.image, 0, row, out=images[:count])
        torch.index_select(columns.state, 0, row, out=states[:count])
        if self.instructions is not None and told is not None:
            tell(self.source, row, self.instructions, told[:count])
        self._see(row, shown, self.seen)

    def distil(self) -> None:
        """Second half."""
        states = self.observations.states
        metrics = self.agent.distil(
            *(self.observations, self.distilling),
            lambda noise: self.flow(self.seen, states, noise, self.distilling.of_slots),
        )
        self.metrics[-len(NOISE_CRITIC_METRIC_NAMES) :].copy_(metrics)

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
    config: Config,
    policy: FrozenPolicy,
    device: torch.device,
    source: Source,
    products: torch.dtype,
    instructions: Tensor | None = None,
    demonstrated: Demonstrated | None = None,
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
    updates = NaUpdates(agent, source, config.sac.batch_size, PolicyFlow(policy, config), instructions, demonstrated)
    updates.refresh()  # a resumed run's rows are encoded now, while nobody waits for a sign of life
    return updates
