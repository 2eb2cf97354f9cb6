"""TensorBoard's file on a disk that is full for a while."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.full_disk import full_disk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from dsrl_async.telemetry.loggers.event_file import EventFile


def event(step: int) -> Event:
    return Event(wall_time=1.0, step=step, summary=Summary(value=[Summary.Value(tag="value", simple_value=step)]))


def test_events_go_on_when_the_disk_has_room_again(tmp_path: Path) -> None:
    file, later = EventFile(tmp_path), EventFile(tmp_path)
    for step in range(3):
        file.add_event(event(step))
    (path,) = [path for path in tmp_path.iterdir() if path.name.endswith(".0")]
    size = path.stat().st_size
    for room in (0, 1, 20):  # the record is cut at each of these places
        with pytest.raises(OSError, match=r"space|large"), full_disk(size + room):
            file.add_event(event(3))
        assert path.stat().st_size == size
    file.add_event(event(4))
    later.add_event(event(5))
    file.close()
    later.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("value")] == [0, 1, 2, 4, 5]
