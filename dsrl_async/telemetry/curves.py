"""What a resumed run takes back of `metrics.jsonl`: the lines about work that its checkpoint does not hold."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dsrl_async.shm.episodes import Snapshot
from dsrl_async.untrusted import check_regular, open_regular

METRICS = "metrics.jsonl"
BLOCK_BYTES = 1 << 16
TICK_S = 1e-3  # `wall_s` is rounded in the file


def take_back(run_dir: Path, start: Snapshot, keep_in: Path | None = None) -> float:
    """Cut off the lines that were written after the checkpoint of which `start` is the snapshot.

    Such a line counts more than the checkpoint, or it counts as much and has seen episodes that the checkpoint says
    are yet to be seen, as the run's last line may; a line that a crash cut short goes too. What is cut off is put into
    the directory `keep_in`, which is made for it, if one is given.

    Returns:
        Seconds that the run had taken when nothing was done that is taken back: those of the last line that counts no
        more than the checkpoint, or of the checkpoint if that is later.

    Raises:
        ValueError: `metrics.jsonl` is not a regular file.
        OSError: it cannot be changed.
    """
    path, wall_s = run_dir / METRICS, float(start["control_wall_s"][0])
    if not path.exists():
        return wall_s
    check_regular(path)
    done = {
        "decisions": int(start["actor_decisions"].sum()),
        "env_steps": int(start["actor_env_steps"].sum()),
        "updates": int(start["learner_updates"][0]),
    }
    seen_s = float("inf")  # up to when lines have seen no episode that is yet to be seen
    if (start["actor_episodes"] > start["control_episodes_seen"]).any():
        seen_s = wall_s + TICK_S
    with path.open("r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        for begin, line in _lines_backwards(file, size):
            figures = _read(line)
            if figures is not None and all(figures[name] <= count for name, count in done.items()):
                wall_s = max(wall_s, figures["wall_s"])
                if figures["wall_s"] <= seen_s:
                    break
            end = begin
        if end < size:
            if keep_in is not None:
                file.seek(end)
                keep_in.mkdir(exist_ok=True)
                with (keep_in / METRICS).open("wb") as rest:
                    shutil.copyfileobj(file, rest)
            file.truncate(end)
    return wall_s


def last_step(run_dir: Path) -> int | None:
    """Environment steps of the last line, which is whole after `take_back`; None if there is none."""
    path = run_dir / METRICS
    if not path.exists():
        return None
    with open_regular(path) as file:
        for _, line in _lines_backwards(file, file.seek(0, os.SEEK_END)):
            figures = _read(line)
            return None if figures is None else int(figures["env_steps"])
    return None


def _lines_backwards(file: BinaryIO, size: int) -> Iterator[tuple[int, bytes]]:
    """Where each line begins, and the line with its newline, the last one first."""
    rest, at = b"", size
    while at > 0:
        length = min(BLOCK_BYTES, at)
        at -= length
        file.seek(at)
        block = file.read(length) + rest
        lines = block.splitlines(keepends=True)
        first = lines.pop(0) if at > 0 else b""  # it may begin in the block before
        begin = at + len(block)
        for line in reversed(lines):
            begin -= len(line)
            yield begin, line
        rest = first


def _read(line: bytes) -> dict[str, float] | None:
    """The counts and the time of a line; None if it is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line)
        return {name: float(found[name]) for name in ("decisions", "env_steps", "updates", "wall_s")}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
