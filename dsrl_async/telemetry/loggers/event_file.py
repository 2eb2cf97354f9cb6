"""TensorBoard's file of events, written by the thread that has them."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import time
from pathlib import Path
from typing import BinaryIO

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter


class EventFile:
    """A new file of events in a directory that TensorBoard shows.

    `tensorboard`'s own `EventFileWriter` has a thread, which dies of a full disk and writes nothing any more when there
    is room again. Here an event that does not fit is left out, and those after it are written.

    Raises OSError if the file cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        stem = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        names = (directory / f"{stem}.{number}" for number in itertools.count())
        path = next(name for name in names if not name.exists())
        self._records = RecordWriter(_Whole(path.open("xb", buffering=0)))
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add_event(self, event: Event) -> None:
        """Append an event; raises OSError if it cannot be written, and the file is as it was."""
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        self._records.close()


class _Whole:
    """Writes to an unbuffered file all that it is given or nothing: TensorBoard reads no further than a cut record."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, record: bytes) -> None:
        end = self._file.tell()
        try:
            if self._file.write(record) < len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(end)
            self._file.seek(end)
            raise

    def close(self) -> None:
        self._file.close()
