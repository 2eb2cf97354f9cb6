"""What a checkpoint holds: whole files, finite numbers, and rows that are what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from support.chaos import rows

NAME = re.compile(r"(\d+)-(\d+)")


def checkpoints(run_dir: Path) -> list[Path]:
    """What bears the name of a checkpoint, oldest first."""
    root = run_dir / "checkpoints"
    named = [path for path in root.iterdir() if NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted(named, key=numbers)


def numbers(checkpoint: Path) -> tuple[int, int]:
    """Its updates and decisions."""
    updates, _, decisions = checkpoint.name.partition("-")
    return int(updates), int(decisions)


def problems(checkpoint: Path, lanes: int) -> tuple[int, list[str]]:
    """The number of complete rows in a checkpoint, and what is wrong with it."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        agent = load_file(checkpoint / "agent.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        return 0, [f"{checkpoint.name} cannot be read: {error}"]
    wrong = [f"{checkpoint.name}: {name} is not finite" for name, tensor in agent.items() if not _finite(tensor)]
    counted, checked = sum(state["counters"]["actor_decisions"]), 0
    if (int(state["counters"]["learner_updates"][0]), counted) != numbers(checkpoint):
        wrong.append(f"{checkpoint.name}: its counters are those of another one")
    if not (checkpoint / "replay").is_dir():
        return 0, wrong  # the disk had no room for it
    for lane in range(lanes):
        path = checkpoint / "replay" / f"lane-{lane:04d}.safetensors"
        try:
            columns = load_file(path)
        except (OSError, SafetensorError) as error:
            wrong.append(f"{checkpoint.name}: {path.name} cannot be read: {error}")
            continue
        complete = np.flatnonzero(columns["complete"])
        if not len(complete):
            continue
        checked += len(complete)
        drawn = rows.Drawn(
            images=columns["image"][complete],
            states=columns["state"][complete],
            next_images=columns["image"][complete + 1],
            next_states=columns["state"][complete + 1],
            noise=columns["noise"][complete],
            reward=columns["reward"][complete],
            steps=columns["steps"][complete].astype(np.int64),
            terminal=columns["terminal"][complete],
            lanes=np.full(len(complete), lane),
        )
        found = {name: len(bad) for name, bad in rows.problems(drawn, lanes).items()}
        wrong += [f"{checkpoint.name}: lane {lane}: {count} rows: {name}" for name, count in found.items()]
    return checked, wrong


def _finite(tensor: np.ndarray) -> bool:
    return not np.issubdtype(tensor.dtype, np.floating) or bool(np.isfinite(tensor).all())
