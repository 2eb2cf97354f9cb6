"""Runs under faults, until there were enough of them: draws, injects, checks, and writes down everything."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.chaos import faults, processes, saved
from support.chaos.disk import Disk
from support.chaos.launch import HEARTBEAT_S, LANES, LATE_S, SETTINGS, WHOLE_JOB, Launch
from support.chaos.plants import EXPECTED
from support.paths import ROOT

START_S = 20.0
"""Upper limit on the start of a process on a busy machine."""
GONE_S = 5.0
"""So long may the processes of a killed supervisor live."""
MOST_EVIDENCE = 30
"""Findings of which the run directory is kept."""
GROWTH_MB = 5.0
WARM_S, SPAN_S = 600.0, 300.0
"""Memory is compared from this age of a process on, over at least so many seconds."""
HANDLERS = {
    # Where these are ignored, as they are in the background of a shell, the runs would ignore them until they have
    # handlers of their own.
    signal.SIGHUP: lambda *_: None,
    signal.SIGQUIT: lambda *_: None,
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.default_int_handler,
}
"""The harness's own signal handlers."""
SITECUSTOMIZE = "from support.chaos import hook\n\nhook.install()\n"


@dataclass(frozen=True)
class Options:
    """What the command was asked for."""

    out: Path
    faults: int
    seed: int
    jobs: int = 1
    plant: str = ""
    longest_stop_s: float = 20.0
    minutes: float = 120.0
    heartbeat_s: float = HEARTBEAT_S
    long_run: bool = False
    """Let the first job's run go on to the end, with faults of its child processes only, to watch its memory."""


class Log:
    """The append-only log of faults, findings and launches, a JSON object per line, which a later call continues."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self.entries: list[dict[str, Any]] = []
        if path.is_file():
            text = path.read_text()
            whole = text[: text.rfind("\n") + 1]  # a harness that is killed may leave half a line
            self.entries = [json.loads(line) for line in whole.splitlines()]
            if whole != text:
                path.write_text(whole)
        self._file = path.open("a")

    def add(self, entry_type: str, **details: Any) -> None:
        with self._lock:
            entry = {"type": entry_type, "time": round(time.time(), 3), **details}
            self.entries.append(entry)
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def of(self, entry_type: str) -> list[dict[str, Any]]:
        with self._lock:
            return [entry for entry in self.entries if entry["type"] == entry_type]


class Harness:
    """Everything of one call of the command."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self.options, self.say = options, say
        options.out.mkdir(parents=True, exist_ok=True)
        self.log = Log(options.out / "log.jsonl")
        self.findings_file = options.out / "rows.jsonl"
        self._told = len(self._row_findings())
        self._lock = threading.Lock()
        self.marker = f"DSRL_CHAOS_OUT={options.out.resolve()}"
        clear(options.out, self.marker)  # what a harness that was killed has left
        self.faults = len(self.log.of("fault"))
        self._runs = max((entry["run"] for entry in self.log.of("run")), default=0)
        self.deadline = time.monotonic() + options.minutes * 60
        hook = options.out / "hook"
        hook.mkdir(exist_ok=True)
        (hook / "sitecustomize.py").write_text(SITECUSTOMIZE)
        paths = [str(hook), str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        self.search = os.pathsep.join(filter(None, paths))

    def enough(self) -> bool:
        """Whether the faults are injected, the time is up, or what was planted is found."""
        planted = EXPECTED.get(self.options.plant)
        return (
            self.faults >= self.options.faults
            or time.monotonic() > self.deadline
            or any(entry["kind"] == planted for entry in self.log.of("finding"))
        )

    def next_run(self) -> int:
        with self._lock:
            self._runs += 1
            self.log.add("run", run=self._runs, seed=self.options.seed, plant=self.options.plant)
            return self._runs

    def fault(self, run: int, what: str, name: str, seconds: float, moment: str) -> bool:
        """Count a fault; False if no more are wanted."""
        with self._lock:
            self.faults += 1
            number = self.faults
        self.log.add("fault", number=number, run=run, what=what, name=name, seconds=round(seconds, 2), moment=moment)
        if number % 20 == 0:
            self.say(f"{number} faults, {len(self.log.of('finding'))} findings")
        return not self.enough()

    def finding(self, run: int, kind: str, sentence: str, run_dir: Path | None = None) -> None:
        kept = len(self.log.of("finding"))
        evidence = self.options.out / "evidence" / f"{kept + 1:03d}-run{run:04d}"
        if run_dir is not None and kept < MOST_EVIDENCE and run_dir.is_dir():
            with contextlib.suppress(OSError, shutil.Error):
                shutil.copytree(run_dir, evidence, ignore=shutil.ignore_patterns("filler"), dirs_exist_ok=True)
        self.log.add("finding", run=run, kind=kind, sentence=sentence, after=self.faults, evidence=str(evidence))
        self.say(f"FOUND after {self.faults} faults, run {run}: {kind}: {sentence}")

    def _row_findings(self) -> list[str]:
        return self.findings_file.read_text().splitlines() if self.findings_file.is_file() else []

    def take_row_findings(self, run_dir: Path | None = None) -> None:
        """Take over what the processes of the runs have found in rows and files."""
        with self._lock:
            lines = self._row_findings()
            new, self._told = lines[self._told :], len(lines)
        for line in new[:20]:
            entry = json.loads(line)
            self.finding(int(entry["run"]), entry["what"], line[:600], run_dir)

    def run(self) -> int:
        """Returns the exit code: 1 if something was found."""
        before = [signal.signal(number, handler) for number, handler in HANDLERS.items()]
        try:
            self._work_all()
        finally:
            for number, handler in zip(HANDLERS, before, strict=True):
                signal.signal(number, handler)
        self.take_row_findings()
        self.say(self.table())
        return 1 if self.log.of("finding") else 0

    def _work_all(self) -> None:
        jobs = [threading.Thread(target=self._work, args=(number,)) for number in range(self.options.jobs)]
        for job in jobs:
            job.start()
        try:
            for job in jobs:
                job.join()
        except KeyboardInterrupt:
            self.deadline = 0.0
            for job in jobs:
                job.join()

    def _work(self, job: int) -> None:
        """Play runs one after another, until there were enough faults."""
        long_run = self.options.long_run and job == 0
        while not self.enough():
            try:
                Run(self, self.next_run(), long_run).play()
            except Exception as error:  # a defect of the harness
                self.finding(0, "harness", f"{type(error).__name__}: {error}")
                raise

    def table(self) -> str:
        """What was done and found, in words."""
        injected, findings = self.log.of("fault"), self.log.of("finding")
        launches = self.log.of("launch")
        lines = ["", f"{len(injected)} faults in {len(launches)} launches of {len(self.log.of('run'))} runs"]
        lines += [f"  {count:5d} {kind}" for kind, count in Counter(_kind(fault) for fault in injected).most_common()]
        lines += ["by moment: " + ", ".join(f"{n} {m}" for m, n in Counter(f["moment"] for f in injected).items())]
        drawn, in_files = sum(launch["rows"] for launch in launches), sum(launch["saved"] for launch in launches)
        found = Counter(entry["kind"] for entry in findings)
        lines += [
            f"{drawn} drawn rows, {in_files} rows of checkpoints and {sum(launch['answers'] for launch in launches)} "
            f"answers checked: {sum(launch['bad'] for launch in launches)} torn or foreign",
            f"{found['hang']} hangs, {sum(found[kind] for kind in ('leak', 'descriptors', 'memory'))} leaks, "
            f"{found['false report']} false reports, "
            f"{sum(launch['renames'] for launch in launches)} files and checkpoints put into their places",
        ]
        lines += [f"  {count:5d} findings: {kind}" for kind, count in found.most_common()]
        if planted := self.options.plant:
            seen = [entry for entry in findings if entry["kind"] == EXPECTED[planted]]
            how = f"found as: {seen[0]['kind']}, after {seen[0]['after']} faults" if seen else "NOT FOUND"
            lines.append(f"planted {planted}: {how}")
        for entry in self.log.of("memory"):
            lines.append(f"  {entry['name']}: {entry['mb_per_hour']:+.1f} MB an hour over {entry['seconds']:.0f} s")
        return "\n".join(lines)


def _kind(fault: dict[str, Any]) -> str:
    name = fault["name"].partition("-")[0]
    return fault["what"] if fault["what"] in ("freeze", "disk full", "cleaned") else f"{fault['what']} {name}"


class Run:
    """A run directory, and the launches on it."""

    def __init__(self, harness: Harness, number: int, long_run: bool) -> None:
        self.harness, self.number, self.long = harness, number, long_run
        options = harness.options
        self.rng = random.Random(f"{options.seed}/{number}")
        self.scratch = (options.out / "runs" / f"{number:04d}").resolve()
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        self.disk = Disk(self.scratch / "disk")
        self.run_dir = self.disk.path / "run"
        self.moment = "running"
        self.injector = faults.Injector(self.rng, self.disk, self._record, options.longest_stop_s, spare=long_run)
        self.token = secrets.token_hex(8)
        prefix = "DSRL_CHAOS_"
        self.variables = {
            "PYTHONPATH": harness.search,
            f"{prefix}TOKEN": self.token,
            f"{prefix}OUT": str(options.out.resolve()),
            f"{prefix}BOARD": str(self.scratch / "board"),
            f"{prefix}FINDINGS": str(harness.findings_file.resolve()),
            f"{prefix}RUN": str(number),
            f"{prefix}LANES": str(LANES),
            f"{prefix}PLANT": options.plant,
            # A child that dies within so many seconds counts as one that cannot start: the product's own value would
            # end nearly every launch at its third fault.
            f"{prefix}QUICK_S": "" if self.rng.random() < 0.15 and not long_run else "1.0",
        }
        self._descriptors: list[int] = []
        self._memory: dict[tuple[str, int], list[tuple[float, float, int]]] = {}

    def _record(self, what: str, name: str, seconds: float) -> bool:
        return self.harness.fault(self.number, what, name, seconds, self.moment)

    def finding(self, kind: str, sentence: str) -> None:
        self.harness.finding(self.number, kind, sentence, self.run_dir)

    # ---- from launch to launch

    def play(self) -> None:
        """Launch, break and resume, until the directory is of no use any more or there were enough faults."""
        try:
            for number in range(1 if self.long else self.rng.randint(3, 8)):
                if self.harness.enough() or not self._launch(number):
                    break
        finally:
            self.injector.close()
            for process in processes.marked(f"DSRL_CHAOS_TOKEN={self.token}"):
                process.send(signal.SIGKILL)
            self.disk.close()
            shutil.rmtree(self.scratch, ignore_errors=True)

    def _launch(self, number: int) -> bool:
        """One launch; False if there is nothing to go on with."""
        resume = number > 0 and bool(saved.checkpoints(self.run_dir))
        if not resume:
            shutil.rmtree(self.run_dir, ignore_errors=True)
        minutes = "0.2" if self.rng.random() < 0.1 and not self.long else "600"
        arguments = ["--resume" if resume else "--run-dir", str(self.run_dir), "--max-minutes", minutes]
        arguments += [] if resume else [*SETTINGS, "--seed", str(self.rng.randrange(1000))]
        arguments += ["--heartbeat-timeout-s", f"{self.harness.options.heartbeat_s:g}"]
        launch = Launch(self.run_dir, self.scratch, number, self.variables, arguments)
        launch.asked.add("max_minutes" if minutes != "600" else "never")
        before = launch.board.counts()
        try:
            self._break(launch)
            self._end(launch)
        finally:
            whole = self._check(launch, before, resume)
        return whole and not launch.disturbed("deleted")

    def _break(self, launch: Launch) -> None:
        rng, injector = self.rng, self.injector
        self.moment = "starting"
        if rng.random() < 0.3 and not self.long:
            time.sleep(rng.uniform(0.0, 3.0))
            if not self._strike_start(launch):
                return
        if not self._recovered(launch):
            return
        self._descriptors = [processes.open_files(launch.supervisor.pid)]
        drawn: dict[Callable[[Launch], bool], int] = {
            injector.strike: 12,
            injector.answer_nobody_waits_for: 2,
            injector.strike_while_saving: 4,
            injector.strike_supervisor: 0 if self.long else 2,
            injector.freeze: 1,
            injector.fill_disk: 1,
            injector.clean_temporary: 1,
        }
        for _ in range(10**9 if self.long else rng.randint(2, 8)):
            if self.harness.enough() or launch.over() or launch.ending is not None:
                return
            strike = rng.choices(list(drawn), list(drawn.values()))[0]
            self.moment = "saving" if strike == injector.strike_while_saving else "running"
            if not strike(launch):
                return
            if rng.random() < 0.75:
                if not self._recovered(launch):
                    return
            else:
                time.sleep(rng.uniform(0.0, 1.0))
        if rng.random() < 0.06:
            self.moment = "running"
            injector.delete(launch)
            time.sleep(rng.uniform(0.5, 4.0))

    def _strike_start(self, launch: Launch) -> bool:
        if launch.children() and self.rng.random() < 0.8:
            return self.injector.strike(launch)
        number = self.rng.choice([signal.SIGKILL, signal.SIGUSR1, signal.SIGSTOP, *faults.ENDS])
        if number in faults.ENDS:
            return self._tell(launch, number)
        if number == signal.SIGKILL:
            launch.tell_to_end()
        return self.injector.send(launch, "supervisor", launch.supervisor, number)

    def _tell(self, launch: Launch, number: signal.Signals) -> bool:
        """Ask the supervisor to end."""
        launch.asked.add(faults.ENDS[number])
        launch.tell_to_end()
        return self.injector.send(launch, "supervisor", launch.supervisor, number)

    def _recovered(self, launch: Launch) -> bool:
        """Wait until everyone is there and gets on; False if the launch has ended or hangs."""
        began = time.monotonic()
        limit_s = self.harness.options.heartbeat_s + START_S + LATE_S
        thawed = began + self.injector.pending_s
        while time.monotonic() < thawed + limit_s:
            before = launch.progress()
            for _ in range(20):
                time.sleep(0.05)
                if launch.over():
                    return False
                grown = all(now > then for now, then in zip(launch.progress(), before, strict=True))
                if grown and self.injector.pending_s == 0 and launch.complete():
                    self._sample(launch)
                    self.harness.take_row_findings()
                    return True
                if launch.ending is not None and time.monotonic() > launch.deadline():
                    return False  # it was told to end: `_end` looks after that
            if launch.asked == {"max_minutes"} and time.monotonic() > launch.began + 12 + 30:
                return False
        there = sorted(launch.children())
        self.finding("hang", f"no progress within {limit_s:.0f} s of {self._last(launch)}; there are {there}")
        launch.tell_to_end()
        launch.hit("supervisor", "SIGKILL")
        launch.supervisor.send(signal.SIGKILL)
        return False

    @staticmethod
    def _last(launch: Launch) -> str:
        return ", ".join(f"{hit.what} {hit.name}" for hit in launch.hits[-3:]) or "its start"

    # ---- the end of a launch

    def _end(self, launch: Launch) -> None:
        """Have the launch end, in some way or other, if it does not already."""
        rng, self.moment = self.rng, "stopping"
        if "max_minutes" in launch.asked and launch.ending is None and not launch.over():
            launch.ending = max(time.monotonic(), launch.began + 12 + 15)
        if launch.ending is None and not launch.over():
            how = 1.0 if self.harness.enough() else rng.random()
            if how < 0.1 and not self.harness.enough():
                self.injector.pursue(launch)
                launch.tell_to_end()
                if not launch.over() and not self._ends_within(launch, 20.0):
                    self._tell(launch, signal.SIGTERM)
            elif how < 0.4 and not self.long:
                launch.tell_to_end()
                number = rng.choice([signal.SIGKILL, signal.SIGSEGV])
                self.injector.send(launch, "supervisor", launch.supervisor, number)
            else:
                number = rng.choice(list(faults.ENDS))
                if rng.random() < 0.15:  # as a batch system does
                    for child in launch.children().values():
                        child.send(number)
                full = rng.random() < 0.08 and not self.harness.enough()
                if full:
                    self.injector.fill(launch)
                self._tell(launch, number)
                if rng.random() < 0.5 and not self.harness.enough():
                    time.sleep(rng.uniform(0.0, 1.5))
                    self._strike_stop(launch)
                if full:
                    self._ends_within(launch, rng.uniform(2.0, 60.0))
                    self.injector.free(launch)
        while not launch.over() and time.monotonic() < launch.deadline() + LATE_S:
            time.sleep(0.02)
        if not launch.over():
            late = time.monotonic() - launch.deadline()
            there = sorted(launch.children())
            self.finding("hang", f"{late:.0f} s past the deadline of its end; hit: {self._last(launch)}; {there}")
            launch.hit("supervisor", "SIGKILL")
            launch.supervisor.send(signal.SIGKILL)
            launch.popen.wait(20)

    def _strike_stop(self, launch: Launch) -> None:
        """Signals while the launch ends, for a child or, now and then, for the supervisor."""
        if self.rng.random() < 0.75 or self.long:
            self.injector.strike(launch)
            return
        number = self.rng.choice([signal.SIGKILL, signal.SIGSTOP, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
        self.injector.send(launch, "supervisor", launch.supervisor, number)

    @staticmethod
    def _ends_within(launch: Launch, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not launch.over() and time.monotonic() < deadline:
            time.sleep(0.05)
        return launch.over()

    def _check(self, launch: Launch, before: dict[str, int], resumed: bool) -> bool:
        """Look at what the launch has left; whether its directory can be gone on with."""
        if not launch.over():
            launch.supervisor.send(signal.SIGKILL)
            launch.popen.wait(20)
        left = processes.wait_gone(f"DSRL_CHAOS_TOKEN={self.token}", GONE_S + self._stopped_s(launch))
        if left:
            names = [f"{process.pid} ({processes.kind_of(process.pid)})" for process in left]
            self.finding("leak", f"left after the end: {', '.join(names)}")
            for process in left:
                process.send(signal.SIGKILL)
        if named := [name for name in os.listdir("/dev/shm") if "dsrl" in name and "fuzz" not in name]:
            self.finding("leak", f"in /dev/shm: {named}")
        deleted = launch.disturbed("deleted")
        for kind, sentence in launch.problems():
            kind = "resume" if resumed and launch.popen.returncode == 2 else kind
            self.finding(kind, sentence)
        rows, whole = 0, True
        if not deleted:
            for checkpoint in saved.checkpoints(self.run_dir):
                count, wrong = saved.problems(checkpoint, LANES)
                rows += count
                for sentence in wrong:
                    self.finding("checkpoint", sentence)
                whole = whole and not wrong
        after = launch.board.counts()
        met = {name: after[name] - before[name] for name in after}
        if launch.ever_had_children and met["rows"] == 0 and met["answers"] > 400:
            self.finding("hook", f"nothing was checked: {met}")
        self._leaked(launch)
        summary = launch.summary()
        self.harness.log.add(
            "launch",
            run=self.number,
            launch=launch.number,
            seconds=round(time.monotonic() - launch.began, 1),
            code=launch.popen.returncode,
            reason=summary and summary.get("exit_reason"),
            hits=[f"{hit.what} {hit.name}" for hit in launch.hits],
            rows=met["rows"],
            bad=met["bad_rows"] + met["bad_answers"],
            answers=met["answers"],
            renames=met["renames"],
            saved=rows,
        )
        self.harness.take_row_findings(self.run_dir)
        return whole and launch.popen.returncode != 2

    @staticmethod
    def _stopped_s(launch: Launch) -> float:
        return 1.0 if any(hit.name == WHOLE_JOB for hit in launch.hits) else 0.0

    # ---- memory and open files

    def _sample(self, launch: Launch) -> None:
        """Note the descriptors and the memory of processes that are all well."""
        self._descriptors.append(processes.open_files(launch.supervisor.pid))
        now = time.monotonic()
        for name, process in {"supervisor": launch.supervisor, **launch.children()}.items():
            age = now - launch.began if name == "supervisor" else None
            series = self._memory.setdefault((name, process.pid), [])
            first = series[0][0] if series else now
            series.append((now, now - first if age is None else age, processes.private_bytes(process.pid)))

    def _leaked(self, launch: Launch) -> None:
        if len(self._descriptors) > 2 and min(self._descriptors[-2:]) > self._descriptors[0] + 3:
            counts = f"{self._descriptors[0]} at first, {self._descriptors[-1]} at last"
            self.finding("descriptors", f"open files of the supervisor: {counts}")
        for (name, _), series in self._memory.items():
            warm = [(now, size) for now, age, size in series if age > WARM_S]
            if len(warm) > 1 and (span := warm[-1][0] - warm[0][0]) > SPAN_S:
                grown = (warm[-1][1] - warm[0][1]) / 1e6 / span * 3600
                self.harness.log.add("memory", name=name, mb_per_hour=round(grown, 2), seconds=span)
                if grown > GROWTH_MB:
                    self.finding("memory", f"{name} grows by {grown:.1f} MB an hour, seen over {span:.0f} s")
        self._memory.clear()


def clear(out: Path, marker: str) -> None:
    """End the processes of runs in this directory, and unmount their file systems."""
    for process in processes.marked(marker):
        process.send(signal.SIGKILL)
    for path in (out / "runs").glob("*/disk"):
        if os.path.ismount(path):
            subprocess.run(["umount", "-l", str(path)], timeout=20)


def run(options: Options) -> int:
    """The command; returns its exit code."""
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:6.1f} s] {text}", file=sys.stderr, flush=True)

    harness = Harness(options, say)
    try:
        return harness.run()
    finally:
        clear(options.out, harness.marker)
