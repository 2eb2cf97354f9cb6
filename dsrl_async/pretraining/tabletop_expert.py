"""A scripted expert for the tabletop scene, which produces demonstrations.

It sees the simulator's state, not the images, and reacts to it at every step, so that it recovers from disturbed
actions, a missed grasp and a dropped block. The caller chooses the plate.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsrl_async.envs.tabletop import ACTION_SCALE, TabletopEnvironment

_GRASP_HEIGHT = 0.022
_HOVER_HEIGHT = 0.08
_CARRY_HEIGHT = 0.09
_RELEASE_HEIGHT = 0.028
_FINAL_HEIGHT = 0.15
_HOLDING = 0.010
"""Fingers that are closed farther than this on average hold nothing; the block keeps each at 0.02."""
_CLOSED = 0.024
"""Fingers that are closed this far have met the block or nothing."""
_OPEN = 0.030
"""Fingers that are open this far have released the block."""


class TabletopExpert:
    """Brings the block to the plate at location `goal` and then hovers above it.

    `sloppy_offset`, float64[2] in metres, is added to the aim of the first grasp; with a large one the expert misses,
    opens the gripper and tries again.
    """

    def __init__(self, goal: int, sloppy_offset: NDArray[np.float64] | None = None) -> None:
        self.goal = goal
        self._offset = np.zeros(2) if sloppy_offset is None else sloppy_offset
        self._phase = "approach"

    def action(self, environment: TabletopEnvironment) -> NDArray[np.float32]:
        """The action for the environment's present state, float32[7] with components within [-1, 1]."""
        hand = environment.gripper_position
        fingers = environment.finger_positions
        block = environment.block_position
        plate = environment.plate_positions[self.goal]
        self._advance(hand, fingers, block, plate)

        grasp = block[:2] + self._offset
        # The block may sit off the grasp point, and it is the block that has to reach the plate.
        place = plate - (block[:2] - hand[:2])
        target = {
            "approach": (*grasp, _HOVER_HEIGHT),
            "descend": (*grasp, _GRASP_HEIGHT),
            "close": (*grasp, hand[2]),
            "open": (*hand[:2], max(hand[2], _HOVER_HEIGHT)),
            "lift": (*hand[:2], _CARRY_HEIGHT + 0.01),
            "carry": (*place, _CARRY_HEIGHT),
            "lower": (*place, _RELEASE_HEIGHT),
            "release": hand,
            "raise": (*hand[:2], _FINAL_HEIGHT),
        }[self._phase]
        action = np.zeros(7, np.float32)
        move = (np.asarray(target) - hand) / ACTION_SCALE
        move[:2] /= max(1, np.abs(move[:2]).max())  # keeps the direction straight to the plate
        action[:3] = np.clip(move, -1, 1)
        action[6] = 1 if self._phase in ("close", "lift", "carry", "lower") else -1
        return action

    def _advance(
        self,
        hand: NDArray[np.float64],
        fingers: NDArray[np.float64],
        block: NDArray[np.float64],
        plate: NDArray[np.float64],
    ) -> None:
        """Changes to the phase that the state calls for."""
        off_block = np.abs(block[:2] + self._offset - hand[:2]).max()
        off_plate = np.hypot(*(block[:2] - plate))
        opening = fingers.mean()
        if self._phase in ("close", "lift", "carry", "lower") and opening < _HOLDING:
            self._offset = np.zeros(2)
            self._phase = "open"
        elif self._phase == "approach" and off_block < 0.010:
            self._phase = "descend"
        elif self._phase == "descend" and off_block > 0.016 and hand[2] > 0.04:
            self._phase = "approach"
        elif self._phase == "descend" and off_block < 0.012 and hand[2] < _GRASP_HEIGHT + 0.006:
            self._phase = "close"
        elif self._phase == "close" and opening < _CLOSED:
            self._phase = "lift"
        elif self._phase == "open" and hand[2] > _HOVER_HEIGHT - 0.015:
            self._phase = "approach"
        elif self._phase == "lift" and hand[2] > _CARRY_HEIGHT - 0.015:
            self._phase = "carry"
        elif self._phase == "carry" and off_plate < 0.015:
            self._phase = "lower"
        elif self._phase == "lower" and hand[2] < _RELEASE_HEIGHT + 0.006:
            self._phase = "release"
        elif self._phase == "release" and opening > _OPEN:
            self._phase = "raise"
