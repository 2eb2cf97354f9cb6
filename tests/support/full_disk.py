"""A disk that is full: the kernel refuses to write more than so many bytes to any file."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def full_disk(left_bytes: int) -> Iterator[None]:
    """In the block, this process gets OSError from a write that goes beyond `left_bytes` of a file.

    What the file has got until then stays, as on a disk that is full. (Python ignores the signal that comes with it.)
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
