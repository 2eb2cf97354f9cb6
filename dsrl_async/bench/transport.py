"""Carrying observations and action chunks between processes, where environment and policy do nothing else.

A decision carries two images of 224 x 224 x 3 and one of 64 x 64 x 3 (uint8) and 8 floats to the policy, and 10 x 7
floats back. Per number of environments and system, the medians of
  decisions_per_s     in all
  cpu                 CPU-microseconds per decision, of all processes; depends less on what else the machine does
and the ratios of this project's decisions_per_s to the best peer's with as many copies (above 1: more decisions), and
of its CPU time to the peers' and to the bare transport's (below 1: less). The systems take turns, each in processes of
its own:
  dsrl_async          the processes of a run, as a run has them, with replay lanes, noise, counters, supervisor; only
                      environment and network are replaced
  slots               this project's slots, wake-ups and gathering alone
  bare                the same design in 60 lines without anything else (bench/bare_transport.py)
  gymnasium           AsyncVectorEnv with shared memory, in lock step
  gymnasium pickled   the same without shared memory
  torchrl             the inference server's process-slot transport with bare clients
  memcpy              the bound: how often one process can copy the payload
each with two copies of an observation (environment to shared memory, and from there to the batch) and, as
`..., one copy`, without the second, where that can be had.

Not measured: simulation, rendering, policies, learning, transfers to a device. The peers are run from environments of
their own, made by `bash scripts/references/setup.sh`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from dsrl_async.bench.report import Report

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENTS = ROOT / ".reference"
OWN, SLOTS, BARE, MEMCPY = "dsrl_async", "slots", "bare", "memcpy"
PEERS = ("gymnasium", "gymnasium pickled", "torchrl")
ONE_COPY = ", one copy"
WITH_ONE_COPY = (OWN, SLOTS, BARE, "gymnasium")

Figures = dict[str, float]
"""`decisions`, `seconds`, `cpu_s`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    systems = [OWN, SLOTS, BARE, MEMCPY, *PEERS]
    parser.add_argument("--system", nargs="+", choices=systems, default=systems)
    parser.add_argument("--environments", nargs="+", type=int, default=[1, 4, 16, 64], help="(default: 1 4 16 64)")
    parser.add_argument("--seconds", type=float, default=2.0, help="that a repeat measures (default: 2)")
    parser.add_argument("--warm-seconds", type=float, default=0.5, help="before that (default: 0.5)")
    parser.add_argument("--repeats", type=int, default=5, help="of each system and number (default: 5)")
    parser.add_argument("--out", type=Path, help="a file to which the JSON lines are written as well")


def peer_command(peer: str) -> list[str]:
    """Raises ValueError when the peer's environment is not there."""
    if not (ENVIRONMENTS / peer / "complete").exists():
        raise ValueError(
            f"the environment {ENVIRONMENTS / peer} is not there; make it with 'bash "
            f"{ROOT}/scripts/references/setup.sh {peer}', or measure without peers with "
            f"'--system {OWN} {SLOTS} {BARE} {MEMCPY}'"
        )
    return [str(ENVIRONMENTS / peer / "bin" / "python"), str(ROOT / "scripts" / "references" / f"{peer}_peer.py")]


def variants(systems: list[str]) -> dict[str, Callable[[int, float, float], Figures]]:
    """Name -> (environments, warm seconds, seconds) -> figures, in the order in which they take turns."""
    found: dict[str, Callable[[int, float, float], Figures]] = {}
    for system in systems:
        for gather in (True, False) if system in WITH_ONE_COPY else (True,):
            found[system if gather else system + ONE_COPY] = _variant(system, gather)
    return found


def _variant(system: str, gather: bool) -> Callable[[int, float, float], Figures]:
    if system == OWN:
        return lambda environments, warm_s, seconds: measure_own(environments, gather, warm_s, seconds)
    settings: dict[str, object] = {} if system == "torchrl" else {"gather": gather}
    if system in PEERS:
        command = peer_command(system.split()[0])
        if system.startswith("gymnasium"):
            settings["pickled"] = system == "gymnasium pickled"
    else:
        command = [sys.executable, "-m", "dsrl_async.bench.systems.transport_process"]
        settings["system"] = system

    def measure(environments: int, warm_s: float, seconds: float) -> Figures:
        asked = {**settings, "environments": environments, "warm_s": warm_s, "seconds": seconds}
        result = subprocess.run([*command, json.dumps(asked)], capture_output=True, text=True, cwd=ROOT)
        if result.returncode != 0:
            raise ValueError(f"{system} failed: {(result.stderr.strip() or 'it left no message').splitlines()[-1]}")
        figures: Figures = json.loads(result.stdout.splitlines()[-1])
        return figures

    return measure


def measure_own(environments: int, gather: bool, warm_s: float, seconds: float) -> Figures:
    from dsrl_async.bench.simulated.run import Simulation, measure
    from dsrl_async.config.settings import InferenceConfig
    from dsrl_async.plan.simulation import EnvironmentTimes

    buckets = InferenceConfig().buckets
    nothing = EnvironmentTimes(0.0, 0.0, 0.0, 0.0)
    run = measure(
        Simulation(environments, nothing, dict.fromkeys(buckets, 0.0), gather=gather, record=False), warm_s, seconds
    )
    cpu_s = run.supervisor.running + run.inference.running + run.actors.running
    return {"decisions": run.decisions, "seconds": run.seconds, "cpu_s": cpu_s}


def summarise(samples: dict[str, list[Figures]]) -> Iterator[tuple[str, str, float, str]]:
    """(system, metric, value, unit); ratios come last."""
    rate, cpu = {}, {}
    for system, figures in samples.items():
        rate[system] = statistics.median(each["decisions"] / each["seconds"] for each in figures)
        cpu[system] = statistics.median(1e6 * each["cpu_s"] / each["decisions"] for each in figures)
        yield system, "decisions_per_s", rate[system], "decisions/s"
        yield system, "cpu", cpu[system], "CPU-us per decision"
    for copies, peers in (("", PEERS), (ONE_COPY, ("gymnasium",))):
        measured = [peer + copies for peer in peers if peer + copies in rate]
        for system in (OWN + copies, SLOTS + copies):
            if system in rate and measured:
                best = max(measured, key=lambda peer: rate[peer])
                yield f"{system}/{best}", "decisions_per_s", rate[system] / rate[best], "ratio"
                leanest = min(measured, key=lambda peer: cpu[peer])
                yield f"{system}/{leanest}", "cpu", cpu[system] / cpu[leanest], "ratio"
            if system in rate and BARE + copies in rate:
                yield f"{system}/{BARE}", "cpu", cpu[system] / cpu[BARE + copies], "ratio"


def run(arguments: argparse.Namespace) -> None:
    """Measures what the options ask for; see `Report` for what is written."""
    if min(arguments.environments) < 1 or arguments.repeats < 1 or arguments.seconds <= 0 or arguments.warm_seconds < 0:
        raise ValueError("--environments, --repeats and --seconds must be positive, --warm-seconds not negative")
    systems = variants(arguments.system)
    report = Report("transport", arguments.repeats, arguments.out)
    for environments in arguments.environments:
        report.case(f"{environments} environments")
        samples: dict[str, list[Figures]] = {name: [] for name in systems}
        for _ in range(arguments.repeats):
            for name, measure in systems.items():
                samples[name].append(measure(environments, arguments.warm_seconds, arguments.seconds))
        for figure in summarise(samples):
            report.add(*figure)
