"""Reads tables in Parquet that somebody else may have made: only columns that are expected, of plausible sizes.

The library is pyarrow, which is what LeRobot itself writes them with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dsrl_async import untrusted

MOST_ROWS = 50_000_000
"""Upper limit on the rows of a file."""
LARGEST_COLUMNS = 1 << 31
"""Bytes that the columns of a file may take together when they are read at once."""
ROWS_AT_ONCE = 64
"""Where not all rows are read at once, since pictures are in them."""


class Table(NamedTuple):
    """A file that is open."""

    path: Path
    file: Any
    """The `pyarrow.parquet.ParquetFile`."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Table]:
    """A file; raises ValueError, naming it, for whatever goes wrong while it is open."""
    with untrusted.opened_for_library(path) as raw:
        file = pq.ParquetFile(raw, memory_map=False, pre_buffer=False)
        if file.metadata.num_rows > MOST_ROWS:
            raise ValueError(f"{path} has {file.metadata.num_rows} rows; {MOST_ROWS} can be read")
        yield Table(path, file)


def has(table: Table, name: str) -> bool:
    return name in table.file.schema_arrow.names


def columns(table: Table, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    """Whole columns. Raises ValueError if one is missing, or they are too large."""
    _check_columns(table, names)
    size = _declared_bytes(table, names)
    if size > LARGEST_COLUMNS:
        raise ValueError(f"{table.path}: {names[0]} and others have {size} bytes; {LARGEST_COLUMNS} can be read")
    read = table.file.read(columns=list(names), use_threads=False)
    return {name: read.column(name) for name in names}


def batches(table: Table, name: str, start: int, count: int) -> Iterator[pa.Array]:
    """The rows of a column from `start` on, `count` of them, some at a time. Raises ValueError if it is missing."""
    _check_columns(table, [name])
    metadata, first, groups, skipped = table.file.metadata, 0, [], 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if first + rows <= start:
            skipped += rows
        elif first < start + count:
            groups.append(group)
        first += rows
    begin, left = start - skipped, count
    for batch in table.file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=[name], use_threads=False):
        column = batch.column(batch.schema.get_field_index(name))[begin : begin + left]
        begin, left = max(begin - len(batch), 0), left - len(column)
        if len(column):
            yield column
        if not left:
            return
    raise ValueError(f"{table.path}: {name} ends {left} rows early")


def numbers(column: pa.ChunkedArray, width: int | None, what: str) -> NDArray[Any]:
    """[rows, width], or [rows] for None, where lists of one number will do, too; raises ValueError for other things."""
    array = column.combine_chunks()
    rows = len(array)
    if pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type) or pa.types.is_large_list(array.type):
        lengths = pc.list_value_length(array)
        if array.null_count or pc.any(pc.not_equal(lengths, width or 1)).as_py():
            raise ValueError(f"{what} must be lists of {width or 1} numbers in every row")
        array = pc.list_flatten(array)
    elif width not in (None, 1):
        raise ValueError(f"{what} must be lists of {width} numbers, not {untrusted.in_one_line(array.type)}")
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    if not any(kind(array.type) for kind in kinds) or array.null_count:
        raise ValueError(f"{what} must be numbers in every row, not {untrusted.in_one_line(array.type)}")
    values: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values.reshape(rows) if width is None else values.reshape(rows, width)


def whole_numbers(column: pa.ChunkedArray, what: str) -> NDArray[np.int64]:
    """[rows], from 0 on; raises ValueError for anything else."""
    values = numbers(column, None, what)
    if values.dtype.kind not in "iu" or (len(values) and (values.min() < 0 or values.max() > np.iinfo(np.int32).max)):
        raise ValueError(f"{what} must be whole numbers from 0 on")
    return values.astype(np.int64)


def _check_columns(table: Table, names: Sequence[str]) -> None:
    for name in names:
        if not has(table, name):
            raise ValueError(f"{table.path} has no column {name}")


def _declared_bytes(table: Table, names: Sequence[str]) -> int:
    metadata, total = table.file.metadata, 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            path = column.path_in_schema
            if any(path == name or path.startswith(f"{name}.") for name in names):
                total += column.total_uncompressed_size
    return total
