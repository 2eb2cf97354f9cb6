"""Rows that say where they come from, and the check of rows that a learner has drawn.

An observation is identified by the number of its episode, the decision in it and a random number that its environment
drew for the episode (an episode of the same number may be played again after a resume). Everything else follows from
these three: the rest of the state, the image, the outcome. What the inference process answers is stamped with the
observation that it has seen, so noise or an action chunk that belongs to another decision is told from its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

UNIT = 1 << 24
"""A field is an integer below this, stored as a fraction of it, which float32 holds exactly."""
FIELDS = 8
"""Width of the state: episode, decision, random number, and five that follow from them."""
IMAGE_SHAPE, IMAGE_BYTES = (64, 64, 3), 64 * 64 * 3
OFFSETS = 1 << 16
TABLE = np.random.default_rng(20260101).integers(0, 256, IMAGE_BYTES + OFFSETS, np.uint8)
"""Random bytes. The image of an observation is a stretch of them that begins where its identity says."""
WINDOWS = np.lib.stride_tricks.sliding_window_view(TABLE, IMAGE_BYTES)
EPISODE_DECISIONS = 12
"""An episode without success ends after so many decisions."""
OWN, CHECKSUM, PIXELS = slice(0, 18), 18, slice(19, 24)
"""Of the 32 numbers of a row's noise: what the actor chose, the checksum of all others, samples of the image."""
IDENTITY = slice(24, 32)
"""Of the noise: the state that the actor has seen."""
SAMPLED = np.array([0, 3001, 6007, 9011, 12287])
"""The bytes of the image that are `PIXELS`, as fractions of 256."""
SUMMED = np.r_[0:18, 19:32]
WEIGHTS = 2 * np.arange(len(SUMMED), dtype=np.int64) + 1

Numbers = NDArray[np.int64]
Floats = NDArray[np.float32]


def mix(salt: int, *numbers: Numbers) -> NDArray[np.uint32]:
    """A hash of integers, element by element."""
    value = np.full(np.shape(numbers[0]), salt * 0x9E3779B1 & 0xFFFFFFFF, np.uint64)
    for number in numbers:
        value = (value ^ np.asarray(number).astype(np.uint64)) * np.uint64(0x2C1B3C6D) & np.uint64(0xFFFFFFFF)
        value ^= value >> np.uint64(15)
        value = value * np.uint64(0x297A2D39) & np.uint64(0xFFFFFFFF)
        value ^= value >> np.uint64(13)
    return value.astype(np.uint32)


def states(episode: Numbers, decision: Numbers, random: Numbers) -> Floats:
    """The states of observations, [n, 8]."""
    derived = [mix(salt, episode, decision, random) % UNIT for salt in range(1, FIELDS - 2)]
    return (np.stack([episode, decision, random, *derived], axis=-1) / UNIT).astype(np.float32)


def identities(state: Floats) -> tuple[Numbers, Numbers, Numbers]:
    """Episode, decision and random number of states [n, 8], if they are whole."""
    whole = np.nan_to_num(state[:, :3].astype(np.float64) * UNIT, nan=-1, posinf=-1, neginf=-1).clip(-1, UNIT)
    episode, decision, random = whole.astype(np.int64).T
    return episode, decision, random


def image_offsets(state: Floats) -> Numbers:
    return mix(99, *identities(state)).astype(np.int64) % OFFSETS


def image_of(state: Floats) -> NDArray[np.uint8]:
    """The image of one observation, uint8 [64, 64, 3], by its state [8]."""
    return WINDOWS[int(image_offsets(state[None])[0])].reshape(IMAGE_SHAPE)


class Outcomes(NamedTuple):
    """What comes of decisions, [n] each."""

    steps: Numbers
    success: NDArray[np.bool_]
    truncated: NDArray[np.bool_]


def outcomes(state: Floats, chunk: int = 5) -> Outcomes:
    episode, decision, random = identities(state)
    drawn = mix(7, episode, decision, random).astype(np.int64)
    success = drawn // 8 % 7 == 0
    return Outcomes(1 + drawn % chunk, success, ~success & (decision + 1 >= EPISODE_DECISIONS))


def checksums(noise: Floats) -> Floats:
    """The checksum of each row of noise [n, 32]: of the bits of all its numbers but the checksum."""
    bits = np.ascontiguousarray(noise).view(np.int32).astype(np.int64)[:, SUMMED]
    return ((bits * WEIGHTS).sum(1) % UNIT / UNIT).astype(np.float32)


def stamp(noise: Floats, images: NDArray[np.uint8], state: Floats) -> None:
    """Write into noise [n, 32] which observations it was chosen for: images uint8 [n, 64, 64, 3], state [n, 8]."""
    noise[:, PIXELS] = images.reshape(len(images), -1)[:, SAMPLED] / np.float32(256)
    noise[:, IDENTITY] = state
    noise[:, CHECKSUM] = checksums(noise)


class Drawn(NamedTuple):
    """n rows that were drawn, with the observations that follow."""

    images: NDArray[np.uint8]  # [n, 64, 64, 3]
    states: Floats  # [n, 8]
    next_images: NDArray[np.uint8]
    next_states: Floats
    noise: Floats  # [n, 32]
    reward: Floats  # [n]
    steps: Numbers | None  # [n]; None: only the discount is known
    terminal: NDArray[np.bool_] | None
    discount: Floats | None = None
    lanes: Numbers | None = None
    """[n], the lanes where they lie; None: unknown, or rows have moved to other lanes."""


def problems(drawn: Drawn, lanes: int, gamma: float = 0.979) -> dict[str, Numbers]:
    """What is wrong with which of the rows, by name; empty if nothing is. `lanes` is the number of lanes."""
    episode, decision, random = identities(drawn.states)
    following = identities(drawn.next_states)
    outcome = outcomes(drawn.states)
    wrong = {
        "observation": ~_whole(drawn.states, drawn.images),
        "next observation": ~_whole(drawn.next_states, drawn.next_images),
        "successor": (following[0] != episode) | (following[1] != decision + 1) | (following[2] != random),
        "noise is torn": drawn.noise[:, CHECKSUM] != checksums(drawn.noise),
        "noise is of another observation": (drawn.noise[:, IDENTITY] != drawn.states).any(1),
        "noise is of another image": (
            drawn.noise[:, PIXELS] != drawn.images.reshape(len(drawn.images), -1)[:, SAMPLED] / np.float32(256)
        ).any(1),
        "reward": drawn.reward != outcome.success.astype(np.float32) - 1,
    }
    if drawn.steps is not None and drawn.terminal is not None:
        wrong["outcome"] = (drawn.steps != outcome.steps) | (drawn.terminal != outcome.success)
    if drawn.discount is not None:
        expected = np.where(outcome.success, 0, gamma**outcome.steps)
        wrong["discount"] = ~np.isclose(drawn.discount, expected, rtol=1e-4, atol=1e-6)
    if drawn.lanes is not None:
        wrong["lane"] = episode % lanes != drawn.lanes
    return {name: np.flatnonzero(rows) for name, rows in wrong.items() if rows.any()}


def _whole(state: Floats, images: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether each state follows from its own identity, and the image from the state."""
    right = (state == states(*identities(state))).all(1)
    return right & (images.reshape(len(images), -1) == WINDOWS[image_offsets(state)]).all(1)
