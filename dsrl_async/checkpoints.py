"""Checkpoints of a run: written whole under a temporary name, then renamed.

<run>/checkpoints/
  00001234/                 named by the number of gradient updates
    agent.safetensors       actor, critic, target, temperature, optimisers, generator
    state.json              counters, sampling RNG, versions
    replay/lane-0000.safetensors ...   rows of each actor's lane, oldest first
  last -> 00001234
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from dsrl_async import __version__
from dsrl_async.shm.counters import Counters
from dsrl_async.shm.replay import ReplayRing

FORMAT = 1
KEPT = ("actor_started_episodes", "learner_updates", "control_wall_s")
SUMMED = ("actor_decisions", "actor_env_steps", "actor_episodes", "actor_successes", "actor_policy_lag")


def save(
    run_dir: Path,
    save_agent: Callable[[Path], None],
    counters: Counters,
    ring: ReplayRing,
    rng: np.random.Generator,
    keep: int,
    beat: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint and point `last` at it; older ones beyond `keep` are removed.

    Actors may go on meanwhile. `save_agent(path)` writes the agent's safetensors file; `beat` is called between the
    larger writes, as a sign of life.
    """
    root = run_dir / "checkpoints"
    snapshot = counters.snapshot()
    name = f"{int(snapshot['learner_updates'][0]):08d}-{int(snapshot['actor_decisions'].sum()):08d}"
    temporary, final = root / f".{name}.tmp", root / name
    if final.exists():  # nothing has happened since
        return final
    for abandoned in root.glob(".*.tmp"):  # by a process that was killed here
        shutil.rmtree(abandoned)
    (temporary / "replay").mkdir(parents=True)
    save_agent(temporary / "agent.safetensors")
    for lane in range(ring.lanes):
        beat()
        save_file(
            {name: np.ascontiguousarray(rows) for name, rows in ring.export_lane(lane).items()},
            temporary / "replay" / f"lane-{lane:04d}.safetensors",
        )
    state = {
        "format": FORMAT,
        "dsrl_async": __version__,
        "counters": {key: array.tolist() for key, array in snapshot.items() if key in SUMMED or key in KEPT},
        "sampling_rng": rng.bit_generator.state,
    }
    (temporary / "state.json").write_text(json.dumps(state))
    temporary.rename(final)
    link = root / ".last"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    os.replace(link, root / "last")
    for old in sorted(path for path in root.iterdir() if path.name[0].isdigit())[:-keep]:
        shutil.rmtree(old)
    return final


def find(path: Path) -> Path | None:
    """The checkpoint directory meant by `path`: itself, or the last one of a run directory; None if there is none."""
    for candidate in (path, path / "checkpoints" / "last"):
        if (candidate / "agent.safetensors").is_file() and (candidate / "state.json").is_file():
            return candidate.resolve()
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The contents of `state.json`; raises ValueError with one sentence if it cannot be used."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{checkpoint / 'state.json'} cannot be read: {error}") from error
    if state.get("format") != FORMAT:
        raise ValueError(f"{checkpoint} has checkpoint format {state.get('format')}, this version reads {FORMAT}")
    return state


def restore_shared(checkpoint: Path, counters: Counters, ring: ReplayRing) -> None:
    """Fill fresh shared memory with a checkpoint's counters and replay rows, also for another number of actors.

    Raises ValueError with one sentence if a file is damaged or does not fit.
    """
    agent = checkpoint / "agent.safetensors"
    try:
        with safe_open(agent, "numpy"):  # the learner loads it; that it is whole is checked before anything starts
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{agent} cannot be read: {error}") from error
    saved = read_state(checkpoint)["counters"]
    counters.learner_updates[0] = saved["learner_updates"][0]
    counters.control_wall_s[0] = saved["control_wall_s"][0]
    for key in SUMMED:
        mine, values = getattr(counters, key), saved[key]
        shared = min(len(mine), len(values))
        mine[:shared] = values[:shared]
        mine[0] += sum(values[shared:])
    started = saved["actor_started_episodes"][: len(counters.actor_started_episodes)]
    counters.actor_started_episodes[: len(started)] = started
    for index, path in enumerate(sorted((checkpoint / "replay").glob("lane-*.safetensors"))):
        try:
            rows = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        for name, mine in ring.rows.items():
            if name not in rows or rows[name].shape[1:] != mine.shape[2:]:
                raise ValueError(f"{path}: rows of {name!r} do not fit this configuration")
        ring.import_rows(index % ring.lanes, rows)
