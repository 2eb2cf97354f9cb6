"""ALOHA's joints and grippers as openpi's checkpoints for ALOHA know them (`adapt_to_pi` in its configurations).

The formulas and their constants are those of `src/openpi/policies/aloha_policy.py` at openpi 15a9616. Both functions
take and return float [..., 14]: six joints (rad) and the gripper of the left arm, then of the right one.

As options of the adapter for gymnasium:

    state_transform: dsrl_async.envs.aloha:state_for_pi
    action_transform: dsrl_async.envs.aloha:action_from_pi
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH = 14
GRIPPERS = [6, 13]
FLIPPED = [1, 2, 8, 9]
"""Joints that turn the other way in openpi's training data: shoulder and elbow of each arm."""
FINGER_CLOSED, FINGER_OPEN = 0.01844, 0.05800
"""Positions of a finger in metres, which ALOHA's gripper command scales to 0 and 1."""
JOINT_CLOSED, JOINT_OPEN = -0.6213, 1.4910
"""Angles of the gripper's joint in radians, which ALOHA scales to 0 and 1 too."""
ARM_LENGTH, HORN_RADIUS = 0.036, 0.022
"""The linkage between the gripper's motor and a finger, in metres."""
ENCODER_LOW, ENCODER_HIGH = 0.5476, 1.6296
"""Angles in radians that openpi's training data scale to 0 and 1."""


def state_for_pi(state: NDArray[Any]) -> NDArray[Any]:
    """ALOHA's state -> the policy's: shoulders and elbows turned round, grippers as angles instead of positions."""
    state = _flipped(state)
    finger = state[..., GRIPPERS] * (FINGER_OPEN - FINGER_CLOSED) + FINGER_CLOSED
    sine = (HORN_RADIUS**2 + finger**2 - ARM_LENGTH**2) / (2 * HORN_RADIUS * finger)
    angle = np.arcsin(np.clip(sine, -1, 1))
    state[..., GRIPPERS] = (angle - ENCODER_LOW) / (ENCODER_HIGH - ENCODER_LOW)
    return state


def action_from_pi(action: NDArray[Any]) -> NDArray[Any]:
    """The policy's action -> ALOHA's. Its gripper is an angle in radians, counted from `ENCODER_LOW`."""
    action = _flipped(action)
    action[..., GRIPPERS] = (action[..., GRIPPERS] + ENCODER_LOW - JOINT_CLOSED) / (JOINT_OPEN - JOINT_CLOSED)
    return action


def _flipped(values: NDArray[Any]) -> NDArray[Any]:
    values = np.array(values)
    if values.shape[-1:] != (WIDTH,):
        raise ValueError(f"ALOHA has {WIDTH} joints and grippers, not {values.shape[-1]}")
    values[..., FLIPPED] *= -1
    return values
