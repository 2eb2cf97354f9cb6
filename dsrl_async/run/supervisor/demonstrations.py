"""Has a process invert a run's demonstrations before any other starts, and puts the rows into memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from dsrl_async.host import processes
from dsrl_async.host.machine import cpu_threads
from dsrl_async.host.waiting import Say
from dsrl_async.run import demonstrations
from dsrl_async.run.preflight import CheckedRun
from dsrl_async.shm.replay import ReplayRing

logger = logging.getLogger(__name__)

PROGRAM = processes.Program("dsrl_async.run.inversion.process")
LOOK_S = 0.1


def provide(run: CheckedRun, run_dir: Path, ring: ReplayRing, say: Say, stopped: Callable[[], object]) -> None:
    """Fill the ring with the demonstrations' rows, those that the run has made already, or new ones.

    Raises:
        ValueError: they cannot be made, or do not fit; one sentence says why.
        KeyboardInterrupt: `stopped` said so meanwhile.
    """
    if not demonstrations.rows_path(run_dir).is_file():
        _invert(run, run_dir, say, stopped)
    path = demonstrations.rows_path(run_dir)
    near, decisions = demonstrations.load_rows(run_dir, ring, len(run.spec.prompts))
    logger.info("demonstrations: noise was found for %d of %d decisions, see %s", near, decisions, path)
    if near < decisions / 2:
        logger.warning(
            "of most demonstrated decisions the agent has no noise within replay.demonstration_error; so few rows are "
            "soon learned by heart: lower replay.demonstration_share, or raise sac.action_magnitude"
        )


def _invert(run: CheckedRun, run_dir: Path, say: Say, stopped: Callable[[], object]) -> None:
    log = run_dir / "logs" / "inversion.log"
    job = {
        "config": run.config.model_dump(mode="json"),
        "spec": run.spec,
        "rows": run.demonstration_rows,
        "run_dir": str(run_dir),
        **PROGRAM.settings,
    }
    since = log.stat().st_size if log.is_file() else 0
    process = processes.start(PROGRAM.module, job, (), log, cpu_threads(run.config.inference.threads))
    try:
        while (code := process.poll()) is None:
            if stopped():
                raise KeyboardInterrupt
            time.sleep(LOOK_S)
            if line := processes.last_line(log, since, otherwise=""):
                say(line.rpartition(" INFO ")[2])
    finally:
        processes.kill_all([process])
    if code == processes.FATAL:
        raise ValueError(processes.last_line(log, since))
    if code:
        raise ValueError(
            f"replay.demonstrations: the process that inverts them ended ({processes.how_ended(code)}): "
            f"{processes.last_line(log, since)} (all of its output is in {log})"
        )
