"""The tabletop with two instructions: the block is to go on the red plate, or on the yellow one.

An environment of one's own (docs/your_environment.md), for `compare_instructions.py`. Where the plates lie is drawn as
in the layout `swap2`, and the instruction by itself, so that no picture says which plate it is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsrl_async.envs import ChunkOutcome, UserEnvironment
from dsrl_async.envs.tabletop import TabletopEnvironment
from dsrl_async.envs.tabletop_spec import TABLETOP

COLOURS = ("red", "yellow")
STEPS = 50


class TwoPlates(TabletopEnvironment):
    """The tabletop, whose plate of the instruction's colour counts."""

    colour = COLOURS[0]

    def reset(self, seed: int, number: int = 0) -> int:
        super().reset(seed, number)
        task = int(np.random.default_rng((seed, 1)).integers(len(COLOURS)))
        self.colour = COLOURS[task]
        return task

    def success(self) -> bool:
        return self.landed_on(self.plate_colours.index(self.colour))


class Simulation:
    """What a user's environment does, see `dsrl_async.envs.protocol.UserSimulation`."""

    def __init__(self) -> None:
        self._table = TwoPlates("swap2", STEPS)
        self._agent_image = np.zeros((64, 64, 3), np.uint8)
        self.reset, self.close = self._table.reset, self._table.close

    def step_chunk(self, action_chunk: NDArray[np.float32]) -> ChunkOutcome:
        return self._table.step_chunk(action_chunk)

    def observe(self, images: NDArray[np.uint8], state: NDArray[np.float32]) -> None:
        self._table.observe(images, self._agent_image, state)


def make_environment() -> UserEnvironment:
    prompts = tuple(f"put the block on the {colour} plate" for colour in COLOURS)
    return UserEnvironment(spec=TABLETOP._replace(prompts=prompts), make=Simulation, episode_steps=STEPS)
