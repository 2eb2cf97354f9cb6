"""Reads demonstrations in HDF5 that somebody else may have made: only what is in the file itself, and what is expected.

An HDF5 file can send its reader to other files (external links, external and virtual data sets), to filters that are
loaded as libraries, and to sizes that it does not have. None of that is followed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from dsrl_async import untrusted
from dsrl_async.demonstrations import trial
from dsrl_async.demonstrations.episode import MOST_FRAMES

MOST_EPISODES = 100_000
"""Upper limit on the episodes of a file."""
LARGEST_CHUNK = 1 << 28
"""Bytes of a data set that are unpacked together, at most."""
SECONDS, BYTES_PER_SECOND = 20.0, 5_000_000
"""How long the reading of a file may take, and how much more for its size."""
FRAMES_AT_ONCE = 64
DEEPEST = 3
"""Groups in groups that are looked into: data, a demonstration, its observations."""
FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}

Kind = TypeVar("Kind", h5py.Group, h5py.Dataset)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[h5py.Group]:
    """The group `data` of a file; raises ValueError, naming the file, for whatever goes wrong while it is open."""
    size = untrusted.check_regular(path)
    if (problem := _problem(path, path.stat().st_mtime_ns, size)) is not None:
        raise ValueError(f"{path} cannot be used: {problem}")
    try:
        with h5py.File(path, "r") as file:
            yield child(file, "data", h5py.Group)
    except Exception as error:  # the library's own are of many kinds
        said = untrusted.in_one_line(error) or type(error).__name__
        if isinstance(error, MemoryError) or said.startswith(str(path)):
            raise
        raise ValueError(f"{path} cannot be used: {said}") from error


@functools.cache
def _problem(path: Path, mtime_ns: int, size: int) -> str | None:
    """What is wrong with a file of that age and size, None if it can be read to its end.

    A child tries it, since the library, which is written in C, crashes over some damaged files and never comes back
    from others.
    """
    del mtime_ns
    return trial.problem(_read_all, path, seconds=SECONDS + size / BYTES_PER_SECOND)


def _read_all(path: Path, sender: Connection) -> None:
    """Sends what is wrong with a file, or nothing."""
    with trial.telling(sender), h5py.File(path, "r") as file:
        _read_group(file, DEEPEST)


def _read_group(group: h5py.Group, depth: int) -> None:
    list(group.attrs.values())
    for name in group if depth else ():
        if isinstance(group.get(name, getlink=True), h5py.HardLink):
            member = group[name]
            if isinstance(member, h5py.Group):
                _read_group(member, depth - 1)
            elif isinstance(member, h5py.Dataset):
                dataset = _checked(group, name)
                for begin in range(0, frames(dataset), FRAMES_AT_ONCE):
                    dataset[begin : begin + FRAMES_AT_ONCE]


def child(group: h5py.Group, name: str, kind: type[Kind]) -> Kind:
    """A member of a group. Raises ValueError if it is none, of another kind, or a link to somewhere else."""
    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        what = "is missing" if link is None else "leads somewhere else"
        raise ValueError(f"{group.name.rstrip('/')}/{name} {what}")
    found = group[name]
    if not isinstance(found, kind):
        raise ValueError(f"{found.name} is not a {kind.__name__.lower()}")
    return found


def episodes(data: h5py.Group) -> dict[str, h5py.Group]:
    """The groups `demo_<number>`, in the order of their numbers. Raises ValueError if there is anything else."""
    if not 0 < len(data) <= MOST_EPISODES:
        raise ValueError(f"it has {len(data)} episodes; 1 to {MOST_EPISODES} can be read")
    numbers = {}
    for name in data:
        number = name.removeprefix("demo_")
        if not (number.isascii() and number.isdigit() and len(number) < 10):
            raise ValueError(f"it has {untrusted.shown(name)} beside the episodes demo_0, demo_1 and so on")
        numbers[int(number)] = name
    return {numbers[number]: child(data, numbers[number], h5py.Group) for number in sorted(numbers)}


def frames(dataset: h5py.Dataset) -> int:
    """The number of frames of an array. Raises ValueError if no episode can have so many."""
    count = dataset.shape[0] if dataset.shape else 0
    if not 0 < count <= MOST_FRAMES:
        raise ValueError(f"{dataset.name} has {count} frames; 1 to {MOST_FRAMES} can be read")
    return int(count)


def numbers(group: h5py.Group, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """An array of finite numbers of this shape; raises ValueError if there is anything else."""
    dataset = _checked(group, name)
    if dataset.dtype.kind not in "fiu" or dataset.shape != shape:
        raise ValueError(f"{dataset.name} must be numbers of shape {list(shape)}, not {_described(dataset)}")
    values = dataset[:].astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{dataset.name} has numbers that are not finite")
    return values


def pictures(group: h5py.Group, name: str, count: int, size: int) -> NDArray[np.uint8]:
    """uint8[count, size, size, 3]; raises ValueError if there is anything else."""
    dataset = _checked(group, name)
    if dataset.dtype != np.uint8 or dataset.shape != (count, size, size, 3):
        raise ValueError(f"{dataset.name} must be uint8 of shape {[count, size, size, 3]}, not {_described(dataset)}")
    values: NDArray[np.uint8] = dataset[:]
    return values


def attribute(group: h5py.Group, name: str, kind: type) -> Any:
    """An attribute that is one text (`str`) or one whole number (`int`); raises ValueError if it is not."""
    if name not in group.attrs:
        raise ValueError(f"{group.name} has no attribute {name}")
    stored = group.attrs.get_id(name)
    text = h5py.check_string_dtype(stored.dtype) is not None
    if stored.shape != () or (not text if kind is str else stored.dtype.kind not in "iu"):
        raise ValueError(f"the attribute {name} of {group.name} must be one {'text' if kind is str else 'number'}")
    value = group.attrs[name]
    if kind is int:
        return int(value)
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"the attribute {name} of {group.name} is not printable text")
    return value


def _checked(group: h5py.Group, name: str) -> h5py.Dataset:
    dataset = child(group, name, h5py.Dataset)
    creation = dataset.id.get_create_plist()
    filters = {creation.get_filter(number)[0] for number in range(creation.get_nfilters())}
    if dataset.is_virtual or dataset.external or not filters <= FILTERS:
        raise ValueError(f"{dataset.name} is stored elsewhere, or packed in another way than with gzip")
    if dataset.chunks and np.prod(dataset.chunks, dtype=float) * dataset.dtype.itemsize > LARGEST_CHUNK:
        raise ValueError(f"{dataset.name} is packed in pieces of {list(dataset.chunks)}, which are too large")
    return dataset


def _described(dataset: h5py.Dataset) -> str:
    shape = "nothing" if dataset.shape is None else f"shape {list(dataset.shape)}"
    return f"{dataset.dtype} of {shape}"
