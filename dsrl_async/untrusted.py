"""Files that come from elsewhere: downloaded, copied, edited, or put there by somebody else.

Only regular files of a plausible size are read, so that a pipe or a device in the place of a file neither hangs nor
fills the memory. Every message names the file in one sentence.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

MEGABYTE = 1_000_000


def check_regular(path: Path, largest: int | None = None) -> int:
    """Check a file that a library is going to open; returns its size in bytes.

    Raises ValueError if it cannot be opened, is not a regular file, or has more than `largest` bytes.
    """
    fd = _open(path, largest)
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def read_bytes(path: Path, largest: int = 16 * MEGABYTE) -> bytes:
    """The contents of a file; raises ValueError as `check_regular`, or if it cannot be read."""
    fd = _open(path, largest)
    with open(fd, "rb") as file:
        try:
            content = file.read(largest + 1)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > largest:  # it has grown since it was opened
        raise _too_large(path, largest)
    return content


def read_text(path: Path, largest: int = 16 * MEGABYTE) -> str:
    """The contents of a UTF-8 file, with or without a byte order mark, whatever the locale.

    Raises ValueError as `read_bytes`, or if it is not UTF-8.
    """
    try:
        return read_bytes(path, largest).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8") from error


def read_json(path: Path, largest: int = 16 * MEGABYTE) -> Any:
    """The contents of a JSON file; raises ValueError as `read_text`, or as `parse_json`."""
    return parse_json(read_text(path, largest), str(path))


def parse_json(text: str | bytes, source: str) -> Any:
    """What a JSON text says; `source` names it in messages.

    Raises ValueError if it is not JSON, is nested deeper than Python's stack, or has a key twice in one object, of
    which a reader would see only one.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repetition)
    except RecursionError as error:
        raise ValueError(f"{source} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{source} is not JSON: {error}") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _open(path: Path, largest: int | None) -> int:
    """A descriptor of the file. A pipe without a writer does not block the opening."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and (largest is None or status.st_size <= largest):
        return fd
    os.close(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} cannot be read: it is not a regular file")
    raise _too_large(path, largest)


def _too_large(path: Path, largest: int | None) -> ValueError:
    return ValueError(f"{path} cannot be read: it has more than {largest} bytes")
