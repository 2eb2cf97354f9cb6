"""Files and directories that are there whole or not at all: they are written beside their place and then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def temporary_path(path: Path) -> Path:
    """Where `replacing` has a file written. A process that is killed leaves it there, the next one clears it away."""
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the block another path to write to; when the block ends, what it wrote takes the place of `path`.

    The contents of a file are on the disk by then; for those of a directory the block calls `sync`. If the block raises
    or the disk is full, `path` is as it was before, and what had been written is removed.

    Raises:
        OSError: the file could not be written or renamed.
    """
    temporary = temporary_path(path)
    remove(temporary)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(temporary)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def sync(path: Path) -> None:
    """Have the kernel write a file or directory to the disk now."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a file, or a directory with everything in it, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
