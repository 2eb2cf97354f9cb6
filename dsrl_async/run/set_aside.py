"""Going back to an older checkpoint of a run: what was saved after it is set aside, and nothing is deleted.

    <run>/checkpoints/set-aside-20261129-174203/
      00002345-00002761/        the checkpoints that were newer, and the recovery file
      metrics.jsonl             the lines that were written after the older one

A checkpoint that is moved back to where it was is one again.
"""

from __future__ import annotations

import itertools
import os
from datetime import datetime
from pathlib import Path

from dsrl_async.host.files import sync
from dsrl_async.run import checkpoints


def chosen(run_dir: Path, given: Path) -> tuple[Path | None, bool]:
    """What `--resume given` means: what was saved, None if nothing was, and whether it was named itself.

    `given` is the run directory, its `checkpoints`, or something in there, also through links.

    Raises:
        ValueError: `given` is nothing of the kind.
    """
    root, recovery = run_dir / "checkpoints", checkpoints.recovery_path(run_dir)
    if _same(given, run_dir) or _same(given, root):
        return checkpoints.latest(run_dir), False
    for saved in [*checkpoints.complete(root), recovery]:
        if _same(given, saved):
            return saved.absolute(), True
    raise ValueError(
        f"--resume {given}: it is not one of the checkpoints of {run_dir}, which are the directories "
        f"{root}/UPDATES-DECISIONS with a state.json; give one of them, or {run_dir} for the newest"
    )


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def set_aside(run_dir: Path, saved: Path) -> tuple[Path, list[Path]]:
    """Move what was saved later than `saved`, and the recovery file, away, so that the run goes on from `saved`.

    The newest checkpoint goes last: if this ends half-way, it still counts, and a second attempt moves the rest.

    Returns:
        A directory for what is set aside, which is there if anything was moved, and where that had been.

    Raises:
        OSError: something cannot be moved.
    """
    root, recovery = run_dir / "checkpoints", checkpoints.recovery_path(run_dir)
    stem = f"set-aside-{datetime.now():%Y%m%d-%H%M%S}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    aside = next(root / name for name in names if not os.path.lexists(root / name))
    everything = [path.absolute() for path in checkpoints.complete(root)]
    later = everything[everything.index(saved) + 1 :] if saved in everything else []
    if os.path.lexists(recovery) and recovery.absolute() != saved:
        later.insert(0, recovery)
    for path in later:
        aside.mkdir(exist_ok=True)
        path.rename(aside / path.name)
    if later:
        sync(aside)
        sync(root)
    return aside, later
