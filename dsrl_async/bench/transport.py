"""Carrying observations and action chunks between processes whose environments and policy do nothing else.

A decision carries two images of 224 x 224 x 3 and one of 64 x 64 x 3 (uint8) and 8 floats to the policy, and 10 x 7
floats back. The figures of a system with a number of environments are the medians of
  decisions_per_s     decisions per second of all environments
  cpu                 CPU-microseconds per decision of all processes; depends less on what else the machine does
and the ratios of this project's decisions_per_s to the best peer's with as many copies (above 1: more decisions), and
of its CPU time to the peers' and to the bare transport's (below 1: less). The systems take turns, each in processes of
its own:
  dsrl_async          the processes of a run with replay lanes, noise, counters and supervisor; only environment and
                      network are replaced
  slots               only this project's slots, wake-ups and gathering
  bare                the same design in 60 lines and nothing else (bench/systems/bare_transport.py)
  gymnasium           AsyncVectorEnv with shared memory, in lock step
  gymnasium pickled   the same without shared memory
  torchrl             the inference server's process-slot transport with bare clients
  memcpy              the bound: how often one process can copy the payload
each with two copies of an observation (from the environment to shared memory, and from there to the batch) and, as
`..., one copy`, without the second if the system can do that.

Not measured: simulation, rendering, policies, learning, transfers to a device. The peers run in environments of their
own, made by `bash scripts/references/setup.sh`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

from dsrl_async.bench.figures import (
    Figure,
    JsonLines,
    Metrics,
    add_output_arguments,
    medians,
    require_positive,
    take_turns,
)
from dsrl_async.bench.references import ROOT, reference_command

OWN, SLOTS, BARE, MEMCPY = "dsrl_async", "slots", "bare", "memcpy"
PEERS = ("gymnasium", "gymnasium pickled", "torchrl")
ONE_COPY = ", one copy"
WITH_ONE_COPY = (OWN, SLOTS, BARE, "gymnasium")

Measure = Callable[[int, float, float], Metrics]
"""(environments, warm seconds, seconds) -> `decisions`, `seconds`, `cpu_s`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    systems = [OWN, SLOTS, BARE, MEMCPY, *PEERS]
    parser.add_argument("--system", nargs="+", choices=systems, default=systems)
    parser.add_argument("--environments", nargs="+", type=int, default=[1, 4, 16, 64], help="(default: 1 4 16 64)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a repeat (default: 2)")
    parser.add_argument("--warm-seconds", type=float, default=0.5, help="time before it (default: 0.5)")
    add_output_arguments(parser, repeats=5)


def peer_command(peer: str) -> list[str]:
    """Raises ValueError if the peer's environment does not exist."""
    return reference_command(peer, f"{peer}_peer.py", f"--system {OWN} {SLOTS} {BARE} {MEMCPY}")


def variants(systems: list[str]) -> dict[str, Measure]:
    """The systems with two copies and with one, in the order in which they take turns."""
    found: dict[str, Measure] = {}
    for system in systems:
        for gather in (True, False) if system in WITH_ONE_COPY else (True,):
            found[system if gather else system + ONE_COPY] = _variant(system, gather)
    return found


def _variant(system: str, gather: bool) -> Measure:
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

    def measure(environments: int, warm_s: float, seconds: float) -> Metrics:
        asked = {**settings, "environments": environments, "warm_s": warm_s, "seconds": seconds}
        result = subprocess.run([*command, json.dumps(asked)], capture_output=True, text=True, cwd=ROOT)
        if result.returncode != 0:
            raise ValueError(f"{system} failed: {(result.stderr.strip() or 'it left no message').splitlines()[-1]}")
        sample: Metrics = json.loads(result.stdout.splitlines()[-1])
        return sample

    return measure


def measure_own(environments: int, gather: bool, warm_s: float, seconds: float) -> Metrics:
    from dsrl_async.bench.simulated.run import Simulation, measure
    from dsrl_async.config.settings import InferenceConfig
    from dsrl_async.plan.simulation import EnvironmentTimes

    buckets = InferenceConfig().buckets
    nothing = EnvironmentTimes(0.0, 0.0, 0.0, 0.0)
    run = measure(
        Simulation(environments, nothing, dict.fromkeys(buckets, 0.0), gather=gather, record=False), warm_s, seconds
    )
    return {"decisions": run.decisions, "seconds": run.seconds, "cpu_s": run.cpu_s}


def summarise(samples: dict[str, list[Metrics]]) -> Iterator[Figure]:
    """Medians, then ratios."""
    rate, cpu = {}, {}
    for system, of_system in samples.items():
        values = medians(
            [
                {"rate": each["decisions"] / each["seconds"], "cpu": 1e6 * each["cpu_s"] / each["decisions"]}
                for each in of_system
            ]
        )
        rate[system], cpu[system] = values["rate"], values["cpu"]
        yield Figure(system, "decisions_per_s", rate[system], "decisions/s")
        yield Figure(system, "cpu", cpu[system], "CPU-us per decision")
    for copies, peers in (("", PEERS), (ONE_COPY, ("gymnasium",))):
        measured = [peer + copies for peer in peers if peer + copies in rate]
        for system in (OWN + copies, SLOTS + copies):
            if system in rate and measured:
                best = max(measured, key=lambda peer: rate[peer])
                yield Figure(f"{system}/{best}", "decisions_per_s", rate[system] / rate[best], "ratio")
                leanest = min(measured, key=lambda peer: cpu[peer])
                yield Figure(f"{system}/{leanest}", "cpu", cpu[system] / cpu[leanest], "ratio")
            if system in rate and BARE + copies in rate:
                yield Figure(f"{system}/{BARE}", "cpu", cpu[system] / cpu[BARE + copies], "ratio")


def run(arguments: argparse.Namespace) -> None:
    require_positive(arguments, "environments", "repeats", "seconds")
    if arguments.warm_seconds < 0:
        raise ValueError("--warm-seconds must not be negative")
    systems = variants(arguments.system)
    lines = JsonLines("transport", arguments)
    for environments in arguments.environments:
        lines.case(f"{environments} environments")
        runs = {
            name: partial(measure, environments, arguments.warm_seconds, arguments.seconds)
            for name, measure in systems.items()
        }
        lines.add(summarise(take_turns(runs, arguments.repeats)))
