"""Files that come from elsewhere: downloaded, copied, edited, or put there by somebody else.

Only regular files of a plausible size are read, so that a pipe or a device in the place of a file neither hangs nor
fills the memory. Every message names the file in one sentence.
"""

from __future__ import annotations

import contextlib
import json
import os
import reprlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MEGABYTE = 1_000_000
HEAD_BYTES = 64
"""So many first bytes tell what `check_head` knows."""
IN_PLACE_OF_A_FILE = {
    b"version https://git-lfs.": "is a git-LFS pointer in the place of the file: run `git lfs pull` in its repository, "
    "or download the file itself",
    b"<!doctype html": "is a web page in the place of the file: download the file itself",
    b"<html": "is a web page in the place of the file: download the file itself",
}
"""How what was fetched instead of a file begins, in lower case."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value: object) -> str:
    """`repr` of what a file says, short and in one line, for a message."""
    return _SHORT.repr(value)


def in_one_line(text: object) -> str:
    """Another library's message, which may quote a whole file, for a message of ours."""
    words = " ".join(str(text).split())
    return words if len(words) <= 300 else f"{words[:297]}..."


def check_regular(path: Path, largest: int | None = None) -> int:
    """Check a file that a library is going to open; returns its size in bytes.

    Raises ValueError if it cannot be opened, is not a regular file, or has more than `largest` bytes.
    """
    fd = _open(path, largest)
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def open_regular(path: Path, largest: int | None = None) -> BinaryIO:
    """A file that is opened to read parts of it; raises ValueError as `check_regular`."""
    return open(_open(path, largest), "rb")


@contextlib.contextmanager
def opened_for_library(path: Path) -> Iterator[BinaryIO]:
    """A regular file from its beginning, for a library that reads it inside of the `with`.

    Raises ValueError, naming the file, for whatever goes wrong there: libraries have errors of many kinds, some of them
    ValueErrors.
    """
    try:
        with open_regular(path) as raw:
            check_head(raw.read(HEAD_BYTES), path)
            raw.seek(0)
            yield raw
    except Exception as error:
        said = in_one_line(error) or type(error).__name__
        if said.startswith(str(path)):
            raise
        raise ValueError(f"{path} cannot be read: {said}") from error


def read_bytes(path: Path, largest: int = 16 * MEGABYTE) -> bytes:
    """The contents of a file; raises ValueError as `check_regular` and `check_head`, or if it cannot be read."""
    with open_regular(path, largest) as file:
        try:
            content = file.read(largest + 1)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > largest:  # it has grown since it was opened
        raise _too_large(path, largest)
    check_head(content[:HEAD_BYTES], path)
    return content


def check_head(head: bytes, path: Path) -> None:
    """Raises ValueError, saying what it is, when a file with the first bytes `head` only stands in for another."""
    for beginning, what in IN_PLACE_OF_A_FILE.items():
        if head.lstrip().lower().startswith(beginning):
            raise ValueError(f"{path} {what}")


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


def read_object(path: Path, largest: int = 16 * MEGABYTE) -> dict[str, Any]:
    """The JSON object in a file; raises ValueError as `read_json`, or if it is something else than an object."""
    content = read_json(path, largest)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


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
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is there twice")
        found[key] = value
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
