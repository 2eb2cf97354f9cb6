"""What an asynchronous and a serial run share: the memory, restored; the figures; the reasons to stop."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsrl_async.host.signals import StopRequest
from dsrl_async.run import checkpoints
from dsrl_async.run.evaluation import files as evaluation_files
from dsrl_async.run.preflight import CheckedRun
from dsrl_async.run.set_aside import chosen, set_aside
from dsrl_async.run.supervisor import ending
from dsrl_async.run.supervisor.demonstrations import provide
from dsrl_async.run.supervisor.evaluation import Evaluations, scalars
from dsrl_async.sac import metric_names
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import SUCCESS_EPISODES, Counters
from dsrl_async.shm.memory import create_memory
from dsrl_async.shm.replay import DEMONSTRATIONS, ReplayRing
from dsrl_async.telemetry.console import Display
from dsrl_async.telemetry.curves import take_back
from dsrl_async.telemetry.loggers.texts import texts
from dsrl_async.telemetry.monitor import RunMonitor, View, Wait, gif_size, json_safe
from dsrl_async.telemetry.profile.profiler import Profiler
from dsrl_async.telemetry.usage import Pids

logger = logging.getLogger(__name__)


class Session:
    """A run from launch to summary, in the process that was launched.

    Its memory is new, unless an `arena` is given whose counters go on.
    """

    def __init__(
        self, run: CheckedRun, run_dir: Path, stop: StopRequest, console: Display, arena: Arena | None = None
    ) -> None:
        self.run, self.config, self.run_dir = run, run.config, run_dir
        self._stop, self._console, self.wait = stop, console, console.wait
        config = run.config
        self.arena = arena or create_memory(config, run.spec, run.horizon, run.demonstration_rows)
        self.counters, self.ring = Counters(self.arena), ReplayRing(self.arena)
        self.resumed_from: Path | None = None
        aside = self._go_on(Path(config.resume)) if config.resume is not None else None
        if run.demonstration_rows:
            ring = ReplayRing(self.arena, DEMONSTRATIONS)
            with self.wait("inverting the demonstrations") as say:
                provide(run, run_dir, ring, say, lambda: stop.reason)
        start = self.counters.snapshot()
        self._wall_before = take_back(run_dir, start, aside)
        evaluation_files.take_back(run_dir, self.counters.decisions(), aside)
        self.evaluations: Evaluations | None = None
        if config.evaluation.lanes:
            self.evaluations = Evaluations(run, run_dir, self.arena)
        names = metric_names(config.sac.algorithm, run.demonstration_rows > 0)
        with self.wait("opening the loggers"):
            self.monitor = RunMonitor(config, run_dir, start, names, self._wall_before, texts=texts(config))
        self._profiler = None
        if config.profile:
            self._profiler = Profiler(config, run_dir, self.arena, start, run.policy.own_settings)
        self._warnings = self._saves = 0
        self._report_due = False
        self._begin = time.monotonic()
        self._next_tick = self._begin + config.log.interval_s
        self._view: View | None = None

    def _go_on(self, given: Path) -> Path | None:
        """Restore what `--resume` means; where that is an older checkpoint, returns the place of what is set aside."""
        saved, named = chosen(self.run_dir, given)
        assert saved is not None  # `check_resume` has seen it
        with self.wait("checking the checkpoint") as say:
            replay = checkpoints.restore_shared(saved, self.counters, self.ring, len(self.run.spec.prompts), say)
        self.resumed_from = saved
        logger.info("going on from %s", saved)
        if not replay:
            self._warm_up_again("was not saved")
        elif self._lacks_rows():
            self._warm_up_again(f"holds only {self.ring.size()} decisions")
        if not named:
            return None
        aside, moved = set_aside(self.run_dir, saved)
        if moved:
            logger.warning("set aside in %s: %s", aside, ", ".join(path.name for path in moved))
        return aside

    def _lacks_rows(self) -> bool:
        """Whether the warm-up is over and fewer rows are there than it filled: those of a much earlier checkpoint."""
        warmup = self.config.replay.warmup_decisions
        # In a small ring old rows have been overwritten, and not every row is a decision.
        fitting = self.ring.lanes * self.ring.rows_per_lane // 4
        return self.counters.decisions() >= warmup and self.ring.size() < min(warmup, fitting)

    def _warm_up_again(self, why: str) -> None:
        """Have the agent fill the replay buffer before it learns on; no burst of updates makes up for that."""
        config, counters = self.config, self.counters
        decisions, updates = counters.decisions(), int(counters.learner_updates[0])
        counters.control_warmup_end[0] = decisions + config.replay.warmup_decisions
        counters.control_passed_decisions[0] = max(0, decisions - math.floor(updates / config.replay_ratio))
        logger.warning(
            "the replay buffer %s: updates begin again after %d decisions", why, config.replay.warmup_decisions
        )

    def _wall_s(self) -> float:
        """Seconds that the run has taken, over all its launches."""
        return self._wall_before + time.monotonic() - self._begin

    def evaluate(self, wake: Callable[[int], object]) -> None:
        """Get on with the run's evaluations, if there are any; see `Evaluations.step`."""
        if self.evaluations is not None and (finished := self.evaluations.step(self._wall_s(), wake)) is not None:
            env_steps = finished.result["env_steps"]
            self.monitor.draw_evaluation(scalars(finished.result), env_steps)
            for name, gif in finished.previews.items():
                self.monitor.write_image(f"eval/{name}", gif, *gif_size(gif), env_steps)

    def tick(self, pids: Pids, waits: tuple[Wait, ...] = ()) -> None:
        """Write and show the figures of this moment, and what is waited for."""
        now = time.monotonic()
        self._next_tick = max(self._next_tick + self.config.log.interval_s, now)
        self.counters.control_wall_s[0] = self._wall_s()
        self.counters.learner_replay_size[0] = self.ring.size()
        snapshot, pids = self.counters.snapshot(), {"supervisor": [os.getpid()], **pids}
        profile = self._profiler.tick(snapshot, pids) if self._profiler is not None else {}
        if self.evaluations is not None:
            self.monitor.evaluation = self.evaluations.view
        self.monitor.waits = waits
        self._view = self.monitor.tick(snapshot, pids, profile)
        self.monitor.keep(self.counters)
        self._console.update(self._view)
        if self._profiler is not None and self._report_due:
            self._report_due = False
            self._write_profile(self._profiler)

    def _write_profile(self, profiler: Profiler) -> str:
        """Returns the sentence that names the bottleneck."""
        diagnosis, picture = profiler.write(self._view.memory_mb if self._view is not None else {})
        if picture is not None:
            self.monitor.write_image("profile/report", *picture)
        return diagnosis.sentence

    def answer_warnings(self) -> None:
        """After SIGUSR1 or SIGUSR2, have the learner write a checkpoint, and the profile with the next tick."""
        if self._stop.warnings > self._warnings:
            self._warnings = self._stop.warnings
            self.counters.control_saves[0] += 1
            self._report_due = True
            logger.info("a signal asks to save: a checkpoint is written next, and the run goes on")
        if (saves := int(self.counters.learner_saves[0])) > self._saves:
            self._saves = saves
            logger.info("the checkpoint that a signal asked for is written")

    def missing_directory(self) -> str | None:
        """Says that the run directory was deleted or moved, if so: nothing can be saved there."""
        try:
            (self.run_dir / "config.yaml").stat()
        except (FileNotFoundError, NotADirectoryError):
            return f"the run directory {self.run_dir} is gone, or its config.yaml"
        except OSError:  # a file system that does not answer may do so again
            pass
        return None

    def tick_due(self) -> bool:
        return time.monotonic() >= self._next_tick

    def reason_to_stop(self) -> str | None:
        """The signal or limit that ends the run now, if any; the first reached wins."""
        config, view = self.config, self._view
        if self._stop.reason:
            return self._stop.reason
        if (gone := self.missing_directory()) is not None:
            return ending.failure(gone)
        if config.max_minutes is not None and time.monotonic() - self._begin >= config.max_minutes * 60:
            return "max_minutes"
        if config.max_decisions is not None and self.counters.decisions() >= config.max_decisions:
            return "max_decisions"
        if (
            config.stop_at_success is not None
            and view is not None
            and view.success_rate is not None
            and view.success_episodes >= SUCCESS_EPISODES
            and view.success_rate >= config.stop_at_success
        ):
            return "stop_at_success"
        return None

    def finish(self, reason: str, pids: Pids) -> dict[str, Any]:
        """The summary, with last figures; the monitor is closed. Whatever goes wrong with the figures, it is there."""
        summary: dict[str, Any] = {"run_dir": str(self.run_dir), "exit_reason": reason}
        if self.evaluations is not None:
            self.evaluations.end()
        try:
            profile = {}
            if self._profiler is not None:  # up to the tick before: how the processes ended is no part of it
                profile, self._profiler = {"bottleneck": self._write_profile(self._profiler)}, None
            self.tick(pids)
            summary |= {**self.monitor.summary(), **profile}
            if self.evaluations is not None:
                summary["evaluation"] = json_safe(self.evaluations.summary())
            self.monitor.close()
        except Exception:
            logger.exception("the figures of the summary are missing")
        return summary
