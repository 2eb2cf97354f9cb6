"""Observations of nested mappings: what a key names, how wide it is, and what an image must be like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsrl_async.untrusted import shown

SEPARATORS = "/."
WHOLE = "."
"""The key of an observation that is no mapping."""
MISSING = object()
MOST_KEYS = 12
"""Upper limit on the keys that a message lists."""


def find(observation: Any, key: str) -> Any:
    """What a key names, `MISSING` if nothing.

    Keys of mappings within mappings are joined by `/` or `.`, and may have these characters themselves: the longest
    key that is there is taken first.
    """
    if key == WHOLE:
        return observation
    if not isinstance(observation, Mapping):
        return MISSING
    if key in observation:
        return observation[key]
    for place in reversed([place for place, character in enumerate(key) if character in SEPARATORS]):
        inner, rest = observation.get(key[:place], MISSING), key[place + 1 :]
        if inner is not MISSING and rest and (found := find(inner, rest)) is not MISSING:
            return found
    return MISSING


def keys_of(observation: Any) -> Iterator[str]:
    """All keys of an observation that name no mapping."""
    if not isinstance(observation, Mapping):
        yield WHOLE
        return
    for key, inner in observation.items():
        if isinstance(inner, Mapping):
            yield from (f"{key}/{rest}" for rest in keys_of(inner))
        else:
            yield str(key)


def get(observation: Any, key: str, option: str, where: str = "the observation") -> Any:
    """What a key names. Raises ValueError, which lists the keys, if there is no such thing."""
    found = find(observation, key)
    if found is MISSING:
        there = list(keys_of(observation))
        listed = ", ".join(map(str, there[:MOST_KEYS])) + (", ..." if len(there) > MOST_KEYS else "")
        raise ValueError(f"env.options: {option}: {where} has no {shown(key)}, it has {listed or 'nothing'}")
    return found


def vector(observation: Any, keys: Sequence[str], option: str) -> NDArray[np.float32]:
    """What the keys name, one after another, as float32[width]."""
    parts = []
    for key in keys:
        value = np.asarray(get(observation, key, option))
        if value.dtype.kind not in "buif":
            raise ValueError(f"env.options: {option}: {shown(key)} must be numbers, not {shown(value)}")
        parts.append(value.reshape(-1).astype(np.float32))
    return np.concatenate(parts)


def image(value: Any, what: str) -> NDArray[np.uint8]:
    """A picture as uint8 [height, width, 3], whichever of its ends the channels are at.

    Raises ValueError, which names `what` it is, for anything else.
    """
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 3:
        shape = f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else shown(value)
        raise ValueError(f"{what} must be an image, uint8 [height, width, 3], not {shape}")
    if value.shape[2] != 3 and value.shape[0] == 3:
        value = value.transpose(1, 2, 0)
    if value.shape[2] != 3 or not value.size:
        raise ValueError(f"{what} must be an image, uint8 [height, width, 3], not of shape {value.shape}")
    return np.ascontiguousarray(value)
