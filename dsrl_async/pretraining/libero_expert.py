"""A scripted expert for LIBERO-Spatial, which produces demonstrations.

It sees the simulator's state, not the images, and reacts to it at every step, so that it recovers from disturbed
actions, a missed grasp and a dropped bowl. The bowl is wider than the open gripper, so it is taken by its rim. The
caller chooses the side, the speed and the height at which it is carried (`Way`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dsrl_async.envs.libero import LiberoEnvironment

TRANSLATION_SCALE = 0.05
"""Distance in metres of the controller's goal from the hand at an action of 1."""
ROTATION_SCALE = 0.5
"""Angle in radians of the controller's goal from the hand at an action of 1."""
_GAIN = 2.0
"""Gain of the proportional control on top of the controller's own, for a damping ratio of 1 / sqrt(2)."""

_RIM_RADIUS = 0.048
"""Distance in metres from the bowl's axis to the middle of its wall at the height of the grasp."""
_GRASP_HEIGHT = 0.038
"""Height of the hand's grip site above the bowl's origin, in metres as all lengths below."""
_CLEARANCE = 0.07
"""Height above the grasp at which the hand arrives."""
_LIFT_HEIGHT = 0.07
"""Height by which the bowl is lifted before it is carried."""
_RELEASE_HEIGHT = 0.012
"""Height of the bowl's origin above that of the plate when the bowl is released."""
_FINAL_HEIGHT = 0.14
"""Height of the hand above the plate at the end."""
_GLIDE = 1.5
"""Slope of the descent to the plate."""
_FUNNEL = 5.0
"""Slope of the funnel through which the open fingers come down on the rim."""
_ON_RIM = 0.006
"""Horizontal distance from the grasp at which the funnel ends."""
_DESCENT_SPEED = 0.7
_PATIENCE = 25
"""Steps after which an unsuccessful descent or closing is given up."""
_LOST = 0.035
"""If the hand is farther than this from the grasp point, it does not hold the bowl."""
_CLOSED = 0.008
"""Mean distance of a finger from the middle of the hand when both have met the wall."""
_WEDGED = 0.02
"""The same distance when the bowl is askew between the fingers."""
_OPEN = 0.030
_SIDESTEP = math.radians(12)
"""Angle from the side of a failed grasp to the next ones, alternately in both directions."""
_LEAST_YAW = math.radians(-60)


SIDES: dict[int, tuple[float, ...]] = {
    0: (270, 45, 135, 225, 0),
    1: (315, 45, 135, 90),
    2: (225, 135, 0, 270, 45),
    3: (135, 180, 225, 90, 270),
    4: (0, 120, 110, 340),
    5: (345, 0, 300, 30),
    6: (135, 120, 150, 180),
    7: (45, 135, 270, 0),
    8: (270, 225, 135, 315),
    9: (135, 180, 0, 90),
}
"""Task of libero_spatial -> sides (`Way.side`) from which the hand reaches the bowl, the most reliable one first."""


class Way(NamedTuple):
    """A way to do the task."""

    side: float
    """Direction from the bowl's axis to the grasp, in degrees from the robot's forward axis towards its left."""
    carry_height: float = 0.10
    """Height in metres at which the bowl is carried above the plate."""
    speed: float = 1.0
    """Upper limit on the components of a translation, at most 1."""


class Situation(NamedTuple):
    """What the expert sees. Positions are in metres in the frame of the world."""

    hand: NDArray[np.float64]
    """Position of the grip site between the finger tips."""
    pointing: NDArray[np.float64]
    """Unit vector along the fingers, which points down when the hand is upright."""
    yaw: float
    """Angle of the hand about the vertical in radians, 0 when the fingers open along the y axis."""
    opening: float
    """Mean distance of a finger from the middle."""
    bowl: NDArray[np.float64]
    axis: NDArray[np.float64]
    """Unit vector along the bowl's axis, which points up when the bowl is upright."""
    plate: NDArray[np.float64]


def goal_objects(environment: LiberoEnvironment) -> tuple[str, str]:
    """The names of the object to move and of the object to put it on, in the task of the last reset.

    Raises ValueError if the task's goal is of another kind.
    """
    goals = environment.domain.parsed_problem["goal_state"]
    if len(goals) != 1 or goals[0][0] != "on" or "bowl" not in goals[0][1] or "plate" not in goals[0][2]:
        raise ValueError(f"the scripted expert only puts a bowl on a plate, as in libero_spatial; the goal is {goals}")
    return goals[0][1], goals[0][2]


def situation(environment: LiberoEnvironment) -> Situation:
    """Reads the present situation from the simulator."""
    domain, data = environment.domain, environment.data
    bowl, plate = (data.body(domain.obj_body_id[name]) for name in goal_objects(environment))
    robot = domain.robots[0]
    site = data.site(robot.gripper.important_sites["grip_site"])
    left, right = (data.body(f"gripper0_finger_joint{number}_tip").xpos for number in (2, 1))
    apart = left - right
    return Situation(
        hand=site.xpos.copy(),
        pointing=site.xmat.reshape(3, 3)[:, 2].copy(),
        yaw=math.atan2(-apart[0], apart[1]),
        opening=float(np.abs(data.qpos[robot._ref_gripper_joint_pos_indexes]).mean()),
        bowl=bowl.xpos.copy(),
        axis=bowl.xmat.reshape(3, 3)[:, 2].copy(),
        plate=plate.xpos.copy(),
    )


def _wrapped(angle: float) -> float:
    """The same angle in [-pi, pi)."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


class LiberoExpert:
    """Brings the bowl to the plate in the given way and then hovers above it.

    `sloppy_offset`, in metres outward from the rim, is added to the aim of the first grasp; with a large one the expert
    misses, opens the gripper and tries again.
    """

    def __init__(self, way: Way, sloppy_offset: float = 0.0) -> None:
        self.way = way
        self.phase = "approach"
        self._offset = sloppy_offset
        side = math.radians(way.side)
        self._aim(side)
        self._lift_from = math.inf
        self._waited = 0
        self._tries = 0

    def _aim(self, side: float) -> None:
        """Chooses where to take the rim, and thereby how to turn the hand."""
        self._side = side
        self._outward = np.array([math.cos(side), math.sin(side), 0.0])
        # The fingers close along the radius. Half a turn makes no difference to them, so the wrist takes the angle that
        # is farther from its joint's limits.
        self._yaw = (side - _LEAST_YAW - math.pi / 2) % math.pi + _LEAST_YAW

    def _grasp(self, now: Situation) -> NDArray[np.float64]:
        """Where to take the wall of the bowl, which may stand askew."""
        radius = self._outward - (self._outward @ now.axis) * now.axis
        radius *= (_RIM_RADIUS + self._offset) / np.linalg.norm(radius)
        return np.asarray(now.bowl + radius + _GRASP_HEIGHT * now.axis)

    def action(self, now: Situation) -> NDArray[np.float32]:
        """The action float32[7], each component within [-1, 1]."""
        grasp = self._grasp(now)
        self._advance(now, grasp)
        hand, bowl, plate = now.hand, now.bowl, now.plate
        # The bowl may sit anywhere between the fingers, and it is the bowl that has to reach the plate.
        place = plate[:2] - (bowl[:2] - hand[:2])
        hangs = hand[2] - bowl[2]
        off_plate = float(np.hypot(*(bowl[:2] - plate[:2])))
        release = plate[2] + _RELEASE_HEIGHT + hangs
        if self.phase in ("lift", "carry"):
            high = max(self._lift_from + _LIFT_HEIGHT, plate[2] + self.way.carry_height) + hangs
        off_grasp = float(np.hypot(*(grasp - hand)[:2]))
        hover = grasp[2] + _CLEARANCE
        funnel = grasp[2] + _FUNNEL * max(0.0, off_grasp - _ON_RIM)
        target = {
            "approach": lambda: (*grasp[:2], min(max(hand[2], hover), hover + _GLIDE * off_grasp)),
            "descend": lambda: (*grasp[:2], min(hover, funnel)),
            "close": lambda: (*hand[:2], hand[2]),
            "open": lambda: (*hand[:2], hover),
            "lift": lambda: (*hand[:2], high + 0.01),
            "carry": lambda: (*place, min(high, release + 0.02 + _GLIDE * off_plate)),
            "lower": lambda: (*place, release),
            "release": lambda: (*hand[:2], hand[2]),
            "raise": lambda: (*hand[:2], plate[2] + _FINAL_HEIGHT),
        }[self.phase]()
        action = np.zeros(7, np.float32)
        move = _GAIN * (np.asarray(target) - hand) / TRANSLATION_SCALE
        move[:2] /= max(1.0, np.abs(move[:2]).max() / self.way.speed)  # keeps the direction
        speed = min(self.way.speed, _DESCENT_SPEED) if self.phase in ("descend", "lower") else self.way.speed
        action[:3] = np.clip(move, -speed, speed)
        turn = np.cross(now.pointing, (0.0, 0.0, -1.0))
        turn[2] = _wrapped(self._yaw - now.yaw)
        action[3:6] = np.clip(_GAIN * turn / ROTATION_SCALE, -1, 1)
        action[6] = 1 if self.phase in ("close", "lift", "carry", "lower") else -1
        return action

    def _advance(self, now: Situation, grasp: NDArray[np.float64]) -> None:
        """Changes to the phase that the situation calls for."""
        hand, bowl, phase = now.hand, now.bowl, self.phase
        off_grasp = float(np.hypot(*(grasp - hand)[:2]))
        off_plate = float(np.hypot(*(bowl[:2] - now.plate[:2])))
        height = hand[2] - grasp[2]
        turned = abs(_wrapped(self._yaw - now.yaw))
        along = float((hand - bowl) @ now.axis)
        apart = math.hypot(np.linalg.norm(hand - bowl - along * now.axis) - _RIM_RADIUS, along - _GRASP_HEIGHT)
        self._waited += 1
        if (phase in ("lift", "carry", "lower") and apart > _LOST) or (
            phase in ("descend", "close") and self._waited > _PATIENCE
        ):
            if not self._offset:
                self._tries += 1
                self._aim(self._side + (-1) ** self._tries * self._tries * _SIDESTEP)
            self._offset = 0.0
            self.phase = "open"
        elif phase == "approach" and off_grasp < 0.015 and turned < 0.15 and height < _CLEARANCE + 0.02:
            self.phase = "descend"
        elif phase == "descend" and off_grasp < 0.012 and height < 0.006:
            self.phase = "close"
        elif phase == "close" and (now.opening < _CLOSED or (self._waited > 10 and now.opening < _WEDGED)):
            self._lift_from = bowl[2]
            self.phase = "lift"
        elif phase == "open" and height > _CLEARANCE - 0.02 and now.opening > _OPEN:
            self.phase = "approach"
        elif phase == "lift" and bowl[2] > min(self._lift_from + _LIFT_HEIGHT, now.plate[2] + 0.3) - 0.015:
            self.phase = "carry"
        elif phase == "carry" and off_plate < 0.010:
            self.phase = "lower"
        elif phase == "lower" and bowl[2] - now.plate[2] < _RELEASE_HEIGHT + 0.006:
            self.phase = "release"
        elif phase == "release" and now.opening > _OPEN:
            self.phase = "raise"
        if self.phase != phase:
            self._waited = 0
