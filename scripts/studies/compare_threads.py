"""Threads and cores of a run's processes: the same run with other numbers of threads, and with pinned processes.

    python scripts/studies/compare_threads.py --actors 2

The systems take turns; each repeat is a run of its own, measured once it learns. `default` is what a run chooses.
`actors unlimited` allows the workers' numerical libraries a thread per core, which is their own default. `models, all
cores` gives the inference process and the learner that many; with `spinning` their threads wait for one another by
spinning, which is their own default. `pinned` keeps each process on one core: the workers in turn, the two others on
the first and the last. With a replay ratio, a decision always costs the same work: CPU time per decision shows what is
wasted, even on a busy machine, and decisions/s what is lost, but only on an idle one. Other options, such as
--config FILE, go to the run. Prints medians as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from dsrl_async.config.command_line import load_config
from dsrl_async.config.load import to_yaml
from dsrl_async.host import processes
from dsrl_async.host.command import guard
from dsrl_async.host.cpu_time import usage
from dsrl_async.host.machine import available_cpus
from dsrl_async.host.signals import StopRequest
from dsrl_async.run import preflight
from dsrl_async.run.supervisor.session import Session
from dsrl_async.run.supervisor.supervisor import Supervisor
from dsrl_async.telemetry.console import NoDisplay

SYSTEMS = ("default", "actors unlimited", "models, all cores", "models, all cores, spinning", "pinned")
SPINNING = {"GOMP_SPINCOUNT": "300000"}
"""The default of libgomp, torch's OpenMP (its manual, GOMP_SPINCOUNT)."""
LEARNING_UPDATES, PATIENCE_S = 20, 90.0
"""The measurement begins after this many updates, or after this time if there are fewer by then."""
KINDS = ("actor", "inference", "learner")


def start_as(system: str) -> None:
    """Make this process start its children as the system requires."""
    start = processes.start
    if system.endswith("spinning"):
        os.environ |= SPINNING

    def start_child(module: str, job: dict[str, Any], fds: Any, log: Path, threads: int) -> subprocess.Popen[bytes]:
        is_template = module == "dsrl_async.run.worker.template"  # workers are forked from it and inherit its threads
        if system.startswith("actors" if is_template else "models"):
            threads = available_cpus()
        return start(module, job, fds, log, threads)

    processes.start = start_child


def pin(pids: dict[str, list[int]]) -> None:
    """Pin the workers to the cores in turn, the inference process to the first and the learner to the last."""
    cores = sorted(os.sched_getaffinity(0))
    for number, pid in enumerate(pids["actor"]):
        os.sched_setaffinity(pid, {cores[number % len(cores)]})
    for kind, core in (("inference", cores[0]), ("learner", cores[-1])):
        os.sched_setaffinity(pids[kind][0], {core})


def measure(system: str, supervisor: Supervisor, stop: StopRequest, seconds: float, figures: dict[str, float]) -> None:
    """Fill `figures` once the run learns, then end the run."""
    counters = supervisor.counters
    patience_ends = time.monotonic() + PATIENCE_S
    while counters.learner_updates[0] < LEARNING_UPDATES and time.monotonic() < patience_ends and not stop.reason:
        time.sleep(0.05)
    pids = supervisor.pids()
    if system == "pinned":
        pin(pids)
    moments = []
    for wait_s in (seconds, 0.0):
        used = {kind: usage(pids[kind]) for kind in KINDS}
        moments.append((time.monotonic(), counters.decisions(), used))
        time.sleep(0.0 if stop.reason else wait_s)
    (begin, before, used_before), (end, after, used_after) = moments
    decisions = max(1, after - before)
    figures["decisions/s"] = (after - before) / (end - begin)
    for kind in KINDS:
        spent = used_after[kind].since(used_before[kind])
        figures[f"{kind}, CPU-ms"] = 1e3 * spent.running / decisions
        figures[f"{kind}, waits"] = spent.waiting / (end - begin) / len(pids[kind])
    stop.reason = stop.reason or "measured"


def run(system: str, seconds: float, options: list[str]) -> dict[str, float]:
    """Make a run and return its figures."""
    start_as(system)
    stop, config = StopRequest(), load_config(options)
    checked = preflight.check_run(config)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in ("logs", "checkpoints"):
            (Path(directory) / name).mkdir()
        (Path(directory) / "config.yaml").write_text(to_yaml(config))
        session = Session(checked, Path(directory), stop, NoDisplay())
        supervisor = Supervisor(session)
        watch = threading.Thread(target=measure, args=(system, supervisor, stop, seconds, figures), daemon=True)
        watch.start()
        summary = supervisor.run()
        if stop.reason != "measured":
            raise SystemExit(f"the run ended: {stop.reason or summary['exit_reason']}")
        watch.join()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the measurement (default: 20)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    own, options = parser.parse_known_args()
    if own.one:
        print(json.dumps(run(own.system[0], own.seconds, options)))
        return
    samples: dict[str, list[dict[str, float]]] = {system: [] for system in own.system}
    for _ in range(own.repeats):
        for system in own.system:
            command = [sys.executable, __file__, "--one", "--system", system, "--seconds", str(own.seconds), *options]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            samples[system].append(json.loads(output.splitlines()[-1]))
    names = list(samples[own.system[0]][0])
    print(
        f"load {os.getloadavg()[0]:.1f} on {available_cpus()} cores; per decision; waits: share of time without a core"
    )
    print("| system | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for system, figures in samples.items():
        cells = (f"{statistics.median(each[name] for each in figures):.2f}" for name in names)
        print(f"| {system} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(guard(main))
