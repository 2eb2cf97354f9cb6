"""The faults: what is done to the processes of a launch, to its disk and to its directories."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from threading import Timer

from support.chaos.disk import Disk
from support.chaos.launch import LANES, WHOLE_JOB, Launch
from support.chaos.processes import Found

KILL, SEGV, STOP = signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP
CHILD_SIGNALS = {KILL: 5, SEGV: 4, STOP: 3, signal.SIGTERM: 1, signal.SIGUSR1: 1}
"""Signals for child processes, and how often each is drawn."""
VICTIMS = {"actor": 6, "template": 3, "inference": 3, "learner": 3}
ENDS = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted", signal.SIGHUP: "hangup"}
"""Signals that end a run, and the reason that it gives."""
SAVE_WAIT_S = 6.0


class Injector:
    """Injects faults into the launches of a run, one after another, and says so to `record`.

    Args:
        record: is called with the kind of a fault, the name of whom it befell and its seconds; False if no more are
            wanted.
        longest_stop_s: upper limit on how long a process is stopped.
        spare: do not kill the supervisor.
    """

    def __init__(
        self,
        rng: random.Random,
        disk: Disk,
        record: Callable[[str, str, float], bool],
        longest_stop_s: float,
        spare: bool = False,
    ) -> None:
        self.spare = spare
        self.rng, self.disk, self._record, self._longest_stop_s = rng, disk, record, longest_stop_s
        self._thaw_at = 0.0
        self._timers: list[Timer] = []

    @property
    def pending_s(self) -> float:
        """Seconds until everyone who was stopped goes on."""
        return max(0.0, self._thaw_at - time.monotonic())

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()

    def _stop_seconds(self) -> float:
        return min(self._longest_stop_s, 20.0 ** self.rng.random())

    def _draw(self, weights: Mapping[signal.Signals, int]) -> signal.Signals:
        return self.rng.choices(list(weights), list(weights.values()))[0]

    def send(self, launch: Launch, name: str, process: Found, number: signal.Signals) -> bool:
        """Send a signal, which is taken back after a while if it is SIGSTOP; False if no more faults are wanted."""
        seconds = self._stop_seconds() if number == STOP else 0.0
        launch.hit(name, number.name, seconds)
        if not process.send(number):
            launch.hits.pop()
            return True
        if number == STOP:
            self._thaw_later({name: process}, seconds)
        return self._record(number.name, name, seconds)

    def _thaw_later(self, stopped: Mapping[str, Found], seconds: float) -> None:
        order = list(stopped.values())
        self.rng.shuffle(order)

        def thaw() -> None:
            for process in order:
                process.send(signal.SIGCONT)

        self._thaw_at = max(self._thaw_at, time.monotonic() + seconds)
        timer = Timer(seconds, thaw)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def victims(self, launch: Launch, count: int) -> list[tuple[str, Found]]:
        """Living child processes, drawn by kind."""
        children, drawn = launch.children(), []
        for _ in range(count):
            weights = {
                name: VICTIMS["actor"] / LANES if name.startswith("actor") else float(VICTIMS[name])
                for name in children
            }
            if not weights:
                break
            name = self.rng.choices(list(weights), list(weights.values()))[0]
            drawn.append((name, children.pop(name)))
        return drawn

    # ---- what is drawn

    def strike(self, launch: Launch) -> bool:
        """Signals for one child or several at once."""
        count = self.rng.choices([1, 2, 3], [6, 3, 1])[0]
        more = True
        for name, process in self.victims(launch, count):
            more = more and self.send(launch, name, process, self._draw(CHILD_SIGNALS))
        return more

    def answer_nobody_waits_for(self, launch: Launch) -> bool:
        """The inference process is stopped while it computes, and a worker that waits for its answer dies meanwhile."""
        children = launch.children()
        worker = f"actor-{self.rng.randrange(LANES):03d}"
        if "inference" not in children or worker not in children:
            return True
        launch.hit("inference", STOP.name, seconds := self.rng.uniform(1.0, 3.0))
        children["inference"].send(STOP)
        self._thaw_later({"inference": children["inference"]}, seconds)
        time.sleep(self.rng.uniform(0.0, 0.1))
        more = self._record(STOP.name, "inference", seconds)
        return more and self.send(launch, worker, children[worker], self._draw({KILL: 1, SEGV: 1}))

    def strike_supervisor(self, launch: Launch) -> bool:
        """Signals that the supervisor outlives."""
        number = self.rng.choice([STOP, STOP, signal.SIGUSR1])
        return self.send(launch, "supervisor", launch.supervisor, number)

    def freeze(self, launch: Launch) -> bool:
        """The whole job stops, in any order, and goes on."""
        everyone = {"supervisor": launch.supervisor, **launch.children()}
        order = list(everyone.values())
        self.rng.shuffle(order)
        seconds = self._stop_seconds()
        launch.hit(WHOLE_JOB, STOP.name, seconds)
        for process in order:
            process.send(STOP)
        self._thaw_later(everyone, seconds)
        return self._record("freeze", WHOLE_JOB, seconds)

    def strike_while_saving(self, launch: Launch) -> bool:
        """The learner, or now and then the supervisor, meets a signal in the middle of a checkpoint's write."""
        deadline, before = time.monotonic() + SAVE_WAIT_S, launch.board["saves"]
        while launch.board["saves"] == before:
            if time.monotonic() > deadline or launch.over():
                return True
            time.sleep(0.0005)
        time.sleep(self.rng.uniform(0.0, 0.06))
        if self.rng.random() < 0.2 and not self.spare:
            launch.tell_to_end()
            return self.send(launch, "supervisor", launch.supervisor, KILL)
        learner = launch.children().get("learner")
        if learner is None:
            return True
        return self.send(launch, "learner", learner, self._draw({KILL: 4, SEGV: 3, STOP: 1}))

    def fill_disk(self, launch: Launch) -> bool:
        """The disk is full for a while; sometimes somebody dies meanwhile."""
        seconds = self.rng.uniform(1.0, 6.0)
        more = self.fill(launch, seconds)
        try:
            time.sleep(seconds / 2)
            if more and self.rng.random() < 0.4:
                more = self.strike(launch)
            time.sleep(seconds / 2)
        finally:
            self.free(launch)
        return more

    def fill(self, launch: Launch, seconds: float = 0.0) -> bool:
        launch.hit("disk", "disk full", seconds)
        self.disk.fill(self.rng.choice([0, 0, 4096, 100_000, 1_000_000]), self._pids(launch))
        return self._record("disk full", "disk", seconds)

    def free(self, launch: Launch) -> None:
        self.disk.free(self._pids(launch))

    def clean_temporary(self, launch: Launch) -> bool:
        """What a cleaner of temporary directories does, followed by the end of one of those who met there."""
        launch.hit("disk", "cleaned")
        for path in launch.temporary.iterdir():
            shutil.rmtree(path, ignore_errors=True)
        more, children = self._record("cleaned", "temporary directory", 0.0), launch.children()
        name = self.rng.choice(["learner", "inference"])
        return more and (name not in children or self.send(launch, name, children[name], KILL))

    def delete(self, launch: Launch) -> bool:
        """A directory of the run goes. What comes then is an end, sooner or later."""
        target = self.rng.choice(["", "checkpoints", "logs"])
        launch.hit("disk", "deleted")
        shutil.rmtree(launch.run_dir / target if target else launch.run_dir, ignore_errors=True)
        return self._record("deleted", target or "run directory", 0.0)

    def pursue(self, launch: Launch, limit_s: float = 60.0) -> bool:
        """Kill one process again and again, soon after each of its starts, until the run gives up."""
        name = self.rng.choice(["inference", "learner", "template", "actor-000"])
        deadline, last, more = time.monotonic() + limit_s, None, True
        while not launch.over() and more and time.monotonic() < deadline:
            process = launch.children().get(name)
            if process is not None and process != last:
                time.sleep(self.rng.uniform(0.0, 0.4))
                more, last = self.send(launch, name, process, self._draw({KILL: 1, SEGV: 1})), process
            time.sleep(0.02)
        return more

    def _pids(self, launch: Launch) -> list[int]:
        return [launch.supervisor.pid, *(child.pid for child in launch.children().values())]
