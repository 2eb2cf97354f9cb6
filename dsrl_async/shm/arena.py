"""Named numpy arrays in one anonymous shared mapping (`memfd_create` + `mmap`).

The memory has no name in any file system: it is freed by the kernel with the last process that holds it, however
that process ends, and does not count against the size of /dev/shm. Children receive the file descriptor.
"""

from __future__ import annotations

import math
import mmap
import os
from typing import Any

import numpy as np

from dsrl_async.shm import order

Fields = dict[str, tuple[tuple[int, ...], str]]
"""Array name -> (shape, numpy dtype string)."""

ALIGNMENT = 64  # a cache line: no two arrays, hence no two kinds of writer, share one at their border


def layout(fields: Fields) -> tuple[dict[str, int], int]:
    """Byte offset of every array, and the size of the whole mapping."""
    offsets, end = {}, 0
    for name, (shape, dtype) in fields.items():
        offsets[name] = end
        size = math.prod(shape) * np.dtype(dtype).itemsize  # of any size: `check_memory` refuses it
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, max(end, ALIGNMENT)


class Arena:
    """The mapping and its arrays; `arena["slot/state"]` is a view, zero-filled when new.

    Pages are committed by the kernel when first written, so a large ring costs what it holds.
    """

    def __init__(self, fd: int, fields: Fields) -> None:
        self.fd = fd
        self.fields = fields
        offsets, size = layout(fields)
        if os.fstat(fd).st_size < size:
            raise ValueError(f"shared memory has {os.fstat(fd).st_size} bytes, this layout needs {size}")
        self.size = size
        self._map = mmap.mmap(fd, size)
        self._arrays = {
            name: np.ndarray(shape, dtype, buffer=self._map, offset=offsets[name])
            for name, (shape, dtype) in fields.items()
        }

    def pages(self, prefix: str) -> tuple[int, int]:
        """Address and size of the whole pages in this process that hold the arrays whose names begin with `prefix`."""
        arrays = [array for name, array in self._arrays.items() if name.startswith(prefix)]
        begin = min(array.ctypes.data for array in arrays) // mmap.PAGESIZE * mmap.PAGESIZE
        end = -(-max(array.ctypes.data + array.nbytes for array in arrays) // mmap.PAGESIZE) * mmap.PAGESIZE
        return begin, end - begin

    @classmethod
    def create(cls, fields: Fields) -> Arena:
        """Make the mapping; raises ValueError where this machine cannot share it (see `order`)."""
        order.barrier()
        fd = os.memfd_create("dsrl_async", os.MFD_CLOEXEC)
        os.ftruncate(fd, layout(fields)[1])
        return cls(fd, fields)

    @classmethod
    def attach(cls, description: dict[str, Any]) -> Arena:
        """Open, in a child, what `describe` told of an arena whose descriptor was inherited."""
        fields = {name: (tuple(shape), dtype) for name, (shape, dtype) in description["fields"].items()}
        return cls(description["fd"], fields)

    def describe(self) -> dict[str, Any]:
        """JSON-ready description for a child process."""
        return {"fd": self.fd, "fields": self.fields}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def close(self) -> None:
        """Give up the descriptor; the mapping goes when its last array does."""
        os.close(self.fd)
        self._arrays.clear()
