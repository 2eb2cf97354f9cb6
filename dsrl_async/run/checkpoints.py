"""Checkpoints of a run.

    <run>/checkpoints/
      00001234-00001650/        named by the numbers of gradient updates and of decisions
        agent.safetensors       actor, critic, target, temperature, optimisers, generator
        state.json              counters, sampling RNG, versions
        replay/lane-0000.safetensors ...   rows of each lane, oldest first
      recovery.safetensors      while the run goes on: the agent, for a learner that has to replace one that died

The newest directory is the one that counts. There is no link to it: run directories are copied by tools that do not
keep links.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from dsrl_async import __version__
from dsrl_async.host.files import remove, replacing, sync, temporary_path
from dsrl_async.shm.counters import Counters
from dsrl_async.shm.replay import ReplayRing

FORMAT = 1
AGENT, STATE = "agent.safetensors", "state.json"
KEPT = ("actor_started_episodes", "learner_updates", "control_wall_s")
SUMMED = ("actor_decisions", "actor_env_steps", "actor_episodes", "actor_successes", "actor_policy_lag")


def save(
    run_dir: Path,
    save_agent: Callable[[Path], None],
    counters: Counters,
    ring: ReplayRing,
    keep: int,
    beat: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint; older ones beyond `keep` are removed.

    Workers may go on meanwhile. `save_agent(path)` writes the agent's safetensors file; `beat` is called between the
    larger writes, as a sign of life.

    Raises:
        OSError, SafetensorError: it could not be written; the checkpoints before it are as they were.
    """
    root = run_dir / "checkpoints"
    snapshot = counters.snapshot()
    name = f"{int(snapshot['learner_updates'][0]):08d}-{int(snapshot['actor_decisions'].sum()):08d}"
    final = root / name
    if final.exists():  # nothing has happened since
        return final
    for abandoned in root.glob(temporary_path(Path("*")).name):  # by a process that was killed while it wrote
        remove(abandoned)
    state = {
        "format": FORMAT,
        "dsrl_async": __version__,
        "lanes": ring.lanes,
        "counters": {key: array.tolist() for key, array in snapshot.items() if key in SUMMED or key in KEPT},
    }
    with replacing(final) as temporary:
        (temporary / "replay").mkdir(parents=True)
        save_agent(temporary / AGENT)
        for lane in range(ring.lanes):
            beat()
            save_file(ring.export_lane(lane), temporary / "replay" / f"lane-{lane:04d}.safetensors")
        (temporary / STATE).write_text(json.dumps(state))
        for path in temporary.rglob("*"):
            beat()
            sync(path)
    sync(root)
    for old in complete(root)[:-keep]:
        shutil.rmtree(old)
    return final


def recovery_path(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "recovery.safetensors"


def complete(root: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    found = [path for path in root.glob("[0-9]*-[0-9]*") if (path / STATE).is_file()] if root.is_dir() else []
    return sorted(found, key=lambda path: [int(number) for number in path.name.split("-")])


def find(path: Path) -> Path | None:
    """The checkpoint directory meant by `path`: itself, or the newest of a run (or of its `checkpoints`), or None."""
    if (path / STATE).is_file() and (path / AGENT).is_file():
        return path.resolve()
    newest = (complete(path / "checkpoints") or complete(path))[-1:]
    return newest[0].resolve() if newest else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The contents of `state.json`; raises ValueError with one sentence if it cannot be used."""
    path = checkpoint / STATE
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of format {FORMAT}, the only one that this version reads")
    missing = {"lanes", "counters"} - state.keys()
    missing |= {*SUMMED, *KEPT} - state.get("counters", {}).keys()
    if missing:
        raise ValueError(f"{path} is incomplete: it lacks {', '.join(sorted(missing))}")
    return state


def restore_shared(checkpoint: Path, counters: Counters, ring: ReplayRing) -> None:
    """Fill fresh shared memory with a checkpoint's counters and replay rows, also for another number of lanes.

    Raises ValueError with one sentence if a file is missing, damaged or does not fit.
    """
    agent = checkpoint / AGENT
    try:
        with safe_open(agent, "numpy"):  # the learner loads it; that it is whole is checked before anything starts
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{agent} cannot be read: {error}") from error
    state = read_state(checkpoint)
    saved = state["counters"]
    counters.learner_updates[0] = saved["learner_updates"][0]
    counters.control_wall_s[0] = saved["control_wall_s"][0]
    for key in SUMMED:
        mine, values = getattr(counters, key), saved[key]
        shared = min(len(mine), len(values))
        mine[:shared] = values[:shared]
        mine[0] += sum(values[shared:])
    started = saved["actor_started_episodes"][: len(counters.actor_started_episodes)]
    counters.actor_started_episodes[: len(started)] = started
    lanes = [read_lane(checkpoint / "replay" / f"lane-{lane:04d}.safetensors", ring) for lane in range(state["lanes"])]
    ring.import_lanes(lanes)


def read_lane(path: Path, ring: ReplayRing) -> dict[str, np.ndarray]:
    try:
        rows = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for name, mine in ring.rows.items():
        if name not in rows or rows[name].shape[1:] != mine.shape[2:]:
            raise ValueError(f"{path}: rows of {name!r} do not fit this configuration")
    return rows
