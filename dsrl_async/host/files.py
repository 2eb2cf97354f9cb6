"""Files and directories that are there whole or not at all: they are written beside their place and then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path


def temporary_path(path: Path) -> Path:
    """Where `replacing` has a file written. A process that is killed leaves it there, the next one clears it away."""
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def replacing(path: Path, beat: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Give the block another path to write to; when the block ends, what it wrote takes the place of `path`.

    What was written, file or directory, is on the disk before it has its name, and the name is there when this ends. If
    the block raises or the disk is full, `path` is as it was before, and what had been written is removed. `beat` is
    called before each wait for the disk.

    Raises:
        OSError: the file could not be written or renamed.
    """
    temporary = temporary_path(path)
    remove(temporary)
    try:
        yield temporary
        for written in _inside_out(temporary):
            beat()
            sync(written)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(temporary)
        raise
    sync(path.parent)


def _inside_out(path: Path) -> Iterator[Path]:
    """All files and directories in a directory, each after what it holds, and at last `path` itself."""
    if path.is_dir():
        for inner in path.iterdir():
            yield from _inside_out(inner)
    yield path


def write_text(path: Path, text: str) -> None:
    """Write a text file, see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def open_to_append(path: Path) -> int:
    """Open a file, which is made if there is none, to read it and to write behind its end; returns a descriptor.

    Raises OSError, also if something else than a file is there: a link, which may lead to a file of somebody else's, or
    a pipe, which may make the writer wait.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return fd


def sync(path: Path) -> None:
    """Have the kernel write a file or directory to the disk now."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems sync their directories by themselves
            raise
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a file, a link (but not what it leads to), or a directory with everything in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
