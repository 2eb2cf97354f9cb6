"""Gradient updates over static buffers: what a GPU replays as one graph per update, and a CPU calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsrl_async.host.graphs import Captured, capture
from dsrl_async.run.learner.compiling import compiled
from dsrl_async.run.learner.sampling import Demonstrated, Source, draw, empty_batch
from dsrl_async.sac import metric_names
from dsrl_async.sac.agent import Imitated, RandomNumbers, SacAgent

ATTEMPTS = 100
"""At drawing a batch of which no row is overwritten meanwhile; needed only where lanes are very short."""


class Updates:
    """Draws batches from `source` and lets the agent learn from them.

    Static buffers: `random`, filled before each update; `positions` int64 [B] and `batch`, written by `draw`; `metrics`
    fp32 [n], those named by `sac.metric_names`, of the last update; and all that the agent keeps. With n
    demonstrations in every batch `positions` are only those of the first B - n rows, and `draw` writes `imitated`, too.
    """

    def __init__(
        self,
        agent: SacAgent,
        source: Source,
        batch_size: int,
        instructions: Tensor | None = None,
        demonstrated: Demonstrated | None = None,
    ) -> None:
        """`instructions` are what `draw` takes, on the agent's device."""
        assert (instructions is not None) == (agent.config.instruction_dim > 0)
        self.agent, self.source, self.instructions, self.demonstrated = agent, source, instructions, demonstrated
        self.random = agent.random_numbers(batch_size)
        count = 0 if demonstrated is None else demonstrated.count
        self.positions = torch.zeros(batch_size - count, dtype=torch.int64, device=agent.device)
        self.batch = empty_batch(source.columns, batch_size, instructions)
        self.imitated: Imitated | None = None
        if demonstrated is not None:
            noise = torch.zeros(count, agent.action_dim, device=agent.device)
            self.imitated = Imitated(noise, torch.zeros(count, device=agent.device))
        names = metric_names(agent.config.algorithm, demonstrated is not None)
        self.metrics = torch.zeros(len(names), device=agent.device)
        self.captured: Captured | None = None
        self._fused: Callable[[], None] | None = None

    def draw(self) -> None:
        """First half of an update: a batch."""
        parts = self.source, self.random, self.agent.config, self.positions, self.batch, self.instructions
        if self.demonstrated is None or self.imitated is None:
            draw(*parts)
        else:
            self.demonstrated.draw(*parts, self.imitated)

    def learn(self, update_actor: bool) -> None:
        """Second half: the gradient steps."""
        if update_actor and self._fused is not None:
            self._fused()
        else:
            self._learn(update_actor)

    def _learn(self, update_actor: bool) -> None:
        self.metrics.copy_(self.agent.learn(self.batch, self.random, update_actor, imitated=self.imitated))

    def whole(self, update_actor: bool) -> None:
        self.draw()
        self.learn(update_actor)

    def compile(self) -> None:
        """Have torch.compile fuse the kernels of the gradient steps, in those updates that train the actor: nearly all.

        The agent stays what it was.
        """
        before = self.agent.state_tensors()
        self._fused = compiled(lambda: self._learn(True))
        self.agent.load_state_tensors(before)

    def capture(self) -> None:
        """Have `run` replay CUDA graphs from now on, on a GPU (see `graphs.capture`).

        There are two, for updates without and with the actor. They are rehearsed first, and the agent is put back to
        what it was.
        """
        before = self.agent.state_tensors()
        self.captured = capture(self.functions(), self.agent.device, None, "the learner", "learner.graphs")
        self.agent.load_state_tensors(before)

    def functions(self) -> list[Callable[[], None]]:
        """What is captured."""
        return [lambda: self.whole(False), lambda: self.whole(True)]

    def refresh(self) -> int:
        """Take in what the workers have written; returns how many decisions can be drawn."""
        return self.source.refresh()

    def draw_batch(self) -> bool:
        """Draw random numbers and, without graphs, the batch; False if its rows were overwritten every time."""
        return self.draw_into(self.random, self.draw)

    def draw_into(self, random: RandomNumbers, draw: Callable[[], None]) -> bool:
        """As `draw_batch`, for a batch that `draw` draws by `random`, noting its `positions`."""
        for _ in range(ATTEMPTS):
            random.draw_(self.agent.generator)
            if self.captured:
                return True
            draw()
            if not self.source.overtaken(self.positions):
                return True
            self.refresh()
        return False

    def run(self) -> None:
        """An update from what `draw_batch` has prepared (only enqueued, on CUDA)."""
        self.agent.schedule()
        if self.demonstrated is not None:
            self.agent.imitation_weight.fill_(self.agent.config.imitation(self.agent.updates))
        if self.captured:
            self.captured.replays[self.agent.actor_due]()
        else:
            self.learn(self.agent.actor_due)
        self.agent.updates += 1

    def imitate(self, count: int) -> float:
        """Train the actor by demonstrations alone, in so many updates of whole batches; returns the last one's loss."""
        demonstrated, agent, size = self.demonstrated, self.agent, len(self.batch.reward)
        assert demonstrated is not None
        places = torch.nonzero(demonstrated.near).squeeze(1)
        columns, loss = demonstrated.source.columns, torch.zeros(())
        for _ in range(count):
            self.random.draw_(agent.generator)
            row = places[(self.random.rows * len(places)).long().clamp_(max=len(places) - 1)]
            imitated = Imitated(demonstrated.imitated[row], demonstrated.near[row])
            tasks = demonstrated.source.task_index
            told = None if self.instructions is None or tasks is None else self.instructions[tasks[row]]
            augmentation = self.random.augmentation[:size]
            loss = agent.imitate(columns.image[row], columns.state[row], told, imitated, augmentation)
        return float(loss)
