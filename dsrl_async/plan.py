"""The command: `python -m dsrl_async.plan [--measure] [figures] [any option of launch]`.

Predicts decisions, environment steps and gradient updates per second against the number of actors, says how many are
enough and what bounds them, and what many machines would do. The times come from a short measurement of this machine
(--measure), from the options below, or from both: an option goes before what was measured. Each actor is supposed to
have one environment, whatever `envs_per_actor` says.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from dsrl_async import preflight
from dsrl_async.batching import batch_wait_s
from dsrl_async.capacity import (
    BUSY,
    Bound,
    Figures,
    Machines,
    Payload,
    Prediction,
    Verdict,
    curve,
    judge,
    machines,
)
from dsrl_async.config import MOST_ACTORS, Config, ConfigError, Parser, load_config
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.machine import available_cpus, available_memory
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.roofline import stages
from dsrl_async.shm.replay import ROW_FIELDS, replay_fields
from dsrl_async.shm.slots import slot_fields
from dsrl_async.throughput_model import EnvironmentTimes

GPUS = {
    "a10": (125, 0.6),
    "a100": (312, 2.04),
    "b200": (2250, 8.0),
    "h100": (989, 3.35),
    "h200": (989, 4.8),
    "l4": (121, 0.3),
    "l40s": (362, 0.864),
    "rtx4090": (165, 1.01),
}
"""TFLOPS of dense bfloat16 products with float32 sums, and TB/s of memory, of NVIDIA's data sheets (SXM where there is
a choice, A100 with 80 GB)."""
SUSTAINED = 800 / 989
"""Of a data sheet's TFLOPS, what large products reach; 800 on an H100 is what pi0/roofline.py reckons with."""
ABOVE_BOUND = 1.3
"""Times the bound is what a batch is supposed to take."""
GIGABIT = 1e9 / 8  # bytes
BAR = 24  # columns
PLAIN_WIDTH = 120  # where there is no terminal
PICTURES = (".pdf", ".png", ".svg")
MORE: dict[Bound, str] = {
    "device": "a faster device, fewer policy.denoise_steps or policy.compile would give more; more actors would not",
    "cores": "more cores would give more; more actors would not",
    "learner": "a lower replay_ratio or a quicker update would give more; more actors would not",
    "actors": "more machines would give more",
    "memory": "more memory or a smaller replay.capacity would allow more actors, and they would give more",
}


class Plan(NamedTuple):
    """What the command line asks about."""

    config: Config
    figures: Figures
    payload: Payload


def build_parser() -> Parser:
    assert __doc__ is not None
    parser = Parser(prog="python -m dsrl_async.plan", description=__doc__.split("\n\n", 1)[1], allow_abbrev=False)
    parser.epilog = "All other options are those of a run: python -m dsrl_async.launch --help lists them."
    add = parser.add_argument
    add("--measure", action="store_true", help="step the environment, sample the policy, do updates, here")
    add("--seconds", type=float, default=30.0, help="of --measure, beside loading (default: 30)")
    add("--env-ms", type=float, help="mean of a chunk's time, with rendering")
    add("--reset-s", type=float, help="of a reset (default: 0)")
    add("--episode-decisions", type=float, help="mean of an episode (default: 25)")
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--device-ms", nargs="+", metavar="SIZE:MS", help="of a batch, by size: 1:7 8:38 32:153")
    device.add_argument("--gpu", choices=sorted(GPUS), help=f"{ABOVE_BOUND} times the bound of Pi0 as published on it")
    add("--update-ms", type=float, help="of a gradient update (default: the learner is left out)")
    add("--cores", type=float, help="of the CPU (default: this machine's)")
    add("--memory-gib", type=float, help="for the run (default: what is available here)")
    add("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="machines to extrapolate to")
    add("--network-gbit", type=float, default=10.0, help="link of the learner's machine (default: 10)")
    add("--plot", type=Path, metavar="FILE", help="draw the curve, such as plan.png")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def check_options(own: argparse.Namespace) -> None:
    """Raises ConfigError for what is missing, and for what no figure can be."""
    if own.env_ms is None and not own.measure:
        raise ConfigError("--env-ms is missing: the mean time of a chunk; or let it be measured, with --measure")
    if not (own.device_ms or own.gpu or own.measure):
        raise ConfigError("the policy's device is missing: --device-ms or --gpu; or let it be measured, with --measure")
    for name in ("seconds", "env_ms", "update_ms", "cores", "memory_gib", "network_gbit"):
        if (value := getattr(own, name)) is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} must be a positive number, not {value:g}")
    if own.reset_s is not None and not 0 <= own.reset_s < math.inf:
        raise ConfigError(f"--reset-s must not be negative, not {own.reset_s:g}")
    if own.episode_decisions is not None and not 1 <= own.episode_decisions < math.inf:
        raise ConfigError(f"--episode-decisions must be at least 1, not {own.episode_decisions:g}")
    if min(own.nodes) < 1:
        raise ConfigError(f"--nodes must be at least 1, not {min(own.nodes)}")
    if own.plot is not None:
        if find_spec("matplotlib") is None:
            raise ConfigError("--plot needs matplotlib; pip install -e '.[plot]'")
        if own.plot.suffix not in PICTURES or not own.plot.absolute().parent.is_dir():
            raise ConfigError(f"--plot {own.plot}: give a {', '.join(PICTURES)} file in a directory that is there")


def device_curve(pairs: Sequence[str]) -> dict[int, float]:
    """Seconds by batch size, from `SIZE:MS`; raises ConfigError."""
    times = {}
    for pair in pairs:
        try:
            size, milliseconds = pair.split(":")
            times[int(size)] = float(milliseconds) / 1e3
        except ValueError:
            raise ConfigError(f"--device-ms: {pair!r} is not SIZE:MS; write it like 8:38.2") from None
    if min(times) < 1 or not all(0 < seconds < math.inf for seconds in times.values()):
        raise ConfigError(f"--device-ms: sizes and times must be positive numbers, not {' '.join(pairs)}")
    return times


def roofline(gpu: str, policy: Pi0Config, denoise_steps: int, sizes: Sequence[int]) -> dict[int, float]:
    """Seconds by batch size: `ABOVE_BOUND` times the bound, with all language slots in use."""
    tera_flops, tera_bytes = GPUS[gpu]
    work = stages(policy, policy.max_token_len, denoise_steps).values()
    return {
        size: ABOVE_BOUND * sum(stage.bound_s(size, SUSTAINED * tera_flops * 1e12, tera_bytes * 1e12) for stage in work)
        for size in sizes
    }


def read(own: argparse.Namespace, rest: Sequence[str]) -> Plan:
    """Everything that is asked for, measured if need be. Raises ValueError, of which ConfigError is one."""
    check_options(own)
    config = load_config(rest).model_copy(update={"envs_per_actor": 1})
    curve_s = device_curve(own.device_ms) if own.device_ms else None
    planned = config.model_copy(update={"device": "cuda"}) if own.gpu else config
    policy = Pi0Config() if own.gpu else preflight.check_checkpoint(config).config
    if own.gpu:
        curve_s = roofline(own.gpu, policy, config.policy.denoise_steps, config.inference.buckets)
    # not the environment's own: a simulator need not be installed here
    spec = EnvironmentSpec(policy.cameras, policy.image_size, policy.robot_state_dim, policy.robot_action_dim, ("",))
    need = preflight.memory_needed(planned, spec, policy.action_horizon)
    memory = available_memory() if own.memory_gib is None else own.memory_gib * 2**30
    most_actors = preflight.actors_that_fit(planned, spec, policy.action_horizon, memory)
    if most_actors < 1:
        raise ConfigError(
            f"the memory of {memory / 2**30:.3g} GiB holds no actor beside replay, policy and learner, which need "
            f"{need.without_actors / 2**30:.3g}; lower replay.capacity, or give more with --memory-gib"
        )
    known: dict[str, Any] = {"steps_per_decision": config.env.chunk, "environment": EnvironmentTimes(reset_s=0.0)}
    if own.measure:
        known |= measured(config, own.seconds)
    times = {
        "chunk_s": own.env_ms and own.env_ms / 1e3,
        "reset_s": own.reset_s,
        "reset_probability": own.episode_decisions and 1 / own.episode_decisions,
    }
    known["environment"] = replace(
        known["environment"], **{name: value for name, value in times.items() if value is not None}
    )
    if curve_s is not None:
        known |= {"device_s": curve_s, "device_cores": 1.0}
    if own.update_ms is not None:
        known["update_s"] = own.update_ms / 1e3
    on_gpu = uses_gpu(planned)
    figures = Figures(
        **known,
        batch_sizes=config.inference.buckets,
        batch_wait_s=batch_wait_s(config.inference.batch_wait_ms, not on_gpu),
        cores=own.cores or available_cpus(),
        learner_shares_device=on_gpu and config.learner.device is None,
        replay_ratio=config.replay_ratio,
        most_actors=most_actors,
    )
    return Plan(config, figures, payload_of(config, spec, policy.action_horizon))


def uses_gpu(config: Config) -> bool:
    import torch  # only here, as below: it takes seconds, and mistakes should be told before

    return config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())


def measured(config: Config, seconds: float) -> dict[str, Any]:
    """Fields of `Figures`; tells on stderr what it does."""
    policy, spec = preflight.check_policy(config)
    preflight.check_device("device", config.device)
    preflight.check_device("learner.device", config.learner.device)
    from dsrl_async.plan_measure import measure, measuring_config

    def say(what: str) -> None:
        print(f"measuring: {what}", file=sys.stderr, flush=True)

    return measure(measuring_config(config), spec, policy.action_horizon, seconds, say)._asdict()


def payload_of(config: Config, spec: EnvironmentSpec, horizon: int) -> Payload:
    """What a decision and a publication of weights would send over a network.

    The noise is not sent: it follows from the episode's seed, and can be drawn where the policy is.
    """
    from dsrl_async.sac.networks import Actor
    from dsrl_async.weights import HEADER

    width = config.sac.noise_width(horizon)
    fields = slot_fields(1, spec, config.env.chunk, width, 0) | replay_fields(1, 1, spec.state_dim, width)
    size = {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (shape, dtype) in fields.items()}
    return Payload(
        observation=size["slot/images"] + size["slot/sac_image"] + size["slot/state"],
        action_chunk=size["slot/action_chunk"],
        transition=sum(size[f"replay/{name}"] for name in ROW_FIELDS),
        weights=Actor(config.sac, horizon).flat.nbytes + HEADER.size,
    )


def sentence(figures: Figures, verdict: Verdict) -> str:
    """The verdict in words."""
    at, bound = verdict
    actors, saturate, reach = f"{at.actors} actors", "saturate", "reach"
    if at.actors == 1:
        actors, saturate, reach = "1 actor", "saturates", "reaches"
    rates = f"{at.decisions_per_s:,.4g} decisions/s ({at.env_steps_per_s:,.4g} env steps/s, "
    rates += f"{at.updates_per_s:,.4g} updates/s), {BUSY:.0%} of the most that is possible here"
    if bound == "device":
        return f"{actors} {saturate} the device: {rates}. The device is the bound: {MORE[bound]}."
    what = {
        "cores": f"The {figures.cores:g} CPU cores are the bound",
        "learner": f"The learner is the bound, at a replay ratio of {figures.replay_ratio:g}",
        "actors": f"The {MOST_ACTORS} actors that a run may have are the bound",
        "memory": f"Memory is the bound: it holds {figures.most_actors} actors",
    }[bound]
    busy = f"The device computes the policy for {at.device_busy:.0%} of the time."
    return f"{actors} {reach} {rates}. {busy} {what}: {MORE[bound]}."


def table_of(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(*columns, box=None, padding=(0, 1, 0, 0), header_style="")
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header in ("", "bound") else "right"
    for row in rows:
        table.add_row(*row)
    return table


def show(
    console: Console, plan: Plan, points: Sequence[Prediction], verdict: Verdict, network: Sequence[Machines]
) -> None:
    figures, times, payload = plan.figures, plan.figures.environment, plan.payload
    console.print(
        f"environment  {1e3 * times.chunk_s:.4g} ms per chunk of {figures.steps_per_decision:.3g} steps (spread "
        f"{times.sigma:.2f}), reset {times.reset_s:.3g} s every {1 / times.reset_probability:.3g} decisions, "
        f"{figures.environment_cores:.2g} cores"
    )
    batches = ", ".join(f"{size}: {1e3 * seconds:.4g}" for size, seconds in sorted(figures.device_s.items()))
    console.print(f"device       ms by batch size: {batches}; {figures.device_cores:.2g} cores")
    shared = ", on the policy's device" if figures.learner_shares_device else ""
    learner = f"{1e3 * figures.update_s:.4g} ms per update{shared}, {figures.replay_ratio:g} updates per decision, "
    learner += f"{figures.update_cores:.2g} cores"
    console.print(f"learner      {learner if figures.update_s else 'left out (--update-ms)'}")
    console.print(f"machine      {figures.cores:g} cores, memory for {figures.most_actors:,} actors\n")

    top = max(point.decisions_per_s for point in points)
    rows = [
        (
            f"{point.actors}",
            f"{point.decisions_per_s:,.4g}",
            "█" * max(1, round(BAR * point.decisions_per_s / top)),
            f"{point.env_steps_per_s:,.4g}",
            f"{point.updates_per_s:,.4g}",
            f"{point.device_busy:.0%}",
            f"{point.cores_busy:.3g}",
            point.bound,
        )
        for point in points
    ]
    console.print(table_of(["actors", "decisions/s", "", "env steps/s", "updates/s", "device", "cores", "bound"], rows))
    console.print(f"\n{sentence(figures, verdict)}")

    each = network[0].actors // network[0].nodes
    console.print(
        f"\nMany machines, each with a policy and {each} actors, and one with the learner "
        f"({payload.transition:,} bytes per decision to it, {payload.weights:,} per machine and publication from it):"
    )
    rows_of_machines = [
        (
            f"{one.nodes}",
            f"{one.actors:,}",
            f"{one.decisions_per_s:,.4g}",
            f"{one.updates_per_s:,.4g}",
            f"{one.transition_bytes_per_s / 1e6:,.3g}",
            f"{one.weights_bytes_per_s / 1e6:,.3g}",
            one.bound,
        )
        for one in network
    ]
    columns = ["machines", "actors", "decisions/s", "updates/s", "in MB/s", "out MB/s", "bound"]
    console.print(table_of(columns, rows_of_machines))
    console.print(
        f"Were only the environments elsewhere, a decision would take {payload.observation:,} bytes to the policy and "
        f"{payload.action_chunk:,} back."
    )


def plot(path: Path, points: Sequence[Prediction], verdict: Verdict) -> None:
    """Draw the curve; raises OSError if the file cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    actors = [point.actors for point in points]
    axes.plot(actors, [point.decisions_per_s for point in points], "o-", label="decisions/s")
    axes.plot(actors, [point.updates_per_s for point in points], "--", label="updates/s")
    axes.axvline(verdict.enough.actors, color="grey", linewidth=1)
    text = f" {verdict.enough.actors} actors\n bound: {verdict.bound}"
    axes.annotate(text, (verdict.enough.actors, 0), (2, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel="actors", ylabel="per second", ylim=(0, None), title="predicted throughput")
    axes.set_xticks(actors, [str(number) for number in actors], minor=False)
    axes.minorticks_off()
    busy = axes.twinx()
    busy.plot(actors, [100 * point.device_busy for point in points], ":", color="tab:red", label="device busy")
    busy.set(ylabel="device busy, %", ylim=(0, 105))
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str]) -> int:
    try:
        own, rest = build_parser().parse_known_args(list(argv))
        plan = read(own, rest)
        config, figures = plan.config, plan.figures
        points = curve(figures)
        verdict = judge(figures, points)
        link = own.network_gbit * GIGABIT
        network = machines(figures, own.nodes, plan.payload, config.learner.publish_interval, link)
        if own.plot:
            plot(own.plot, points, verdict)
    except (OSError, ValueError) as error:  # ConfigError, a policy's files, or a picture that cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if own.json:
        content = {
            "figures": asdict(figures),
            "curve": [point._asdict() for point in points],
            "enough": verdict.enough._asdict(),
            "bound": verdict.bound,
            "payload": plan.payload._asdict(),
            "machines": [one._asdict() for one in network],
        }
        print(json.dumps(content))
        return 0
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    show(console, plan, points, verdict, network)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
