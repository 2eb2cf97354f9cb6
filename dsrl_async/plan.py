"""The command: `python -m dsrl_async.plan [--measure] [figures] [--config YAML] [any option of launch]`.

Predicts decisions, environment steps and gradient updates per second against the number of actors, says how many are
enough and what bounds them, and what many machines would do. The times come from a short measurement of this machine
(--measure), from the options below, or from both: an option goes before what was measured.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from dsrl_async import preflight
from dsrl_async.capacity import (
    BUSY,
    Figures,
    Machines,
    Payload,
    Prediction,
    Verdict,
    curve,
    judge,
    machines,
    predict,
)
from dsrl_async.config import Config, ConfigError, Parser, load_config
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.machine import available_cpus, available_memory
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.roofline import stages
from dsrl_async.shm.arena import layout
from dsrl_async.shm.memory import run_fields
from dsrl_async.shm.replay import replay_fields
from dsrl_async.throughput_model import EnvironmentTimes, simulate

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
MODELS = {"pi0": Pi0Config(), "pi05": Pi0Config(pi05=True, action_horizon=10, max_token_len=200)}
"""As published for LIBERO."""
GIGABIT = 1e9 / 8  # bytes
BAR = 24  # columns
PLAIN_WIDTH = 120  # where there is no terminal
SIMULATED_DECISIONS = 6000
ROOM = {
    "device": "a faster device, fewer policy.denoise_steps or policy.compile would give more; more actors would not",
    "cores": "more cores would give more; more actors would not",
    "learner": "a lower replay_ratio or a quicker update would give more; more actors would not",
    "memory": "more memory or a smaller replay.capacity would allow more actors, and they would give more",
    "environments": "more actors would give more",
}


class Given(NamedTuple):
    """What the command line says of the run and its machine."""

    config: Config
    policy: Pi0Config
    spec: EnvironmentSpec
    figures: Figures


def build_parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = Parser(prog="python -m dsrl_async.plan", description=__doc__.split("\n\n", 1)[1], allow_abbrev=False)
    parser.epilog = "All other options are those of a run: python -m dsrl_async.launch --help lists them."
    how = parser.add_argument_group("measurement")
    how.add_argument("--measure", action="store_true", help="step the environment, sample the policy, do updates, here")
    how.add_argument("--seconds", type=float, default=40.0, help="of --measure, beside loading (default: 40)")

    env = parser.add_argument_group("environment")
    env.add_argument("--env-ms", type=float, help="mean of a chunk's time, with rendering")
    env.add_argument("--env-sigma", type=float, help="spread: of the time's logarithm; for --simulate (default: 0.3)")
    env.add_argument("--reset-s", type=float, help="of a reset (default: 0)")
    env.add_argument("--episode-decisions", type=float, help="mean of an episode (default: 25)")
    env.add_argument("--env-cores", type=float, help="busy while it steps: 1 it computes, 0 it waits (default: 1)")

    device = parser.add_argument_group("policy's device")
    device.add_argument(
        "--device-ms", nargs="+", metavar="SIZE:MS", help="time of a batch, by size, such as 1:7 8:38 32:153"
    )
    device.add_argument(
        "--gpu", choices=sorted(GPUS), help="instead: --above-bound times the bound of the policy on it"
    )
    device.add_argument("--above-bound", type=float, default=1.3, help="(default: 1.3)")
    device.add_argument(
        "--model",
        choices=["configured", *MODELS],
        help="whose work and observations; pi0 and pi05 as published (default: pi0 with --gpu, else configured)",
    )
    device.add_argument(
        "--device-cores", type=float, help="CPU cores busy while it computes; a thread waits for a GPU (default: 1)"
    )

    learner = parser.add_argument_group("learner")
    learner.add_argument("--update-ms", type=float, help="of a gradient update (default: the learner is left out)")
    learner.add_argument("--update-cores", type=float, help="busy meanwhile (default: 1)")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--cores", type=float, help="(default: this machine's)")
    machine.add_argument("--memory-gib", type=float, help="for the run (default: what is available here)")
    machine.add_argument("--actor-mb", type=float, help="private memory of an actor (default: an estimate)")
    machine.add_argument(
        "--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="machines to extrapolate to"
    )
    machine.add_argument("--network-gbit", type=float, default=10.0, help="link of the learner's machine (default: 10)")

    out = parser.add_argument_group("output")
    out.add_argument("--simulate", action="store_true", help="simulate the queue as well, with the spread")
    out.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve, such as plan.png")
    out.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def device_curve(pairs: Sequence[str]) -> dict[int, float]:
    """Seconds by batch size, from `SIZE:MS`; raises ConfigError."""
    times = {}
    for pair in pairs:
        size, _, milliseconds = pair.partition(":")
        try:
            times[int(size)] = float(milliseconds) / 1e3
        except ValueError as error:
            raise ConfigError(f"--device-ms: {pair!r} is not SIZE:MS; write it like 8:38.2") from error
    return times


def roofline(gpu: str, policy: Pi0Config, denoise_steps: int, sizes: Sequence[int], factor: float) -> dict[int, float]:
    """Seconds by batch size: `factor` times the bound, with all language slots in use."""
    tera_flops, tera_bytes = GPUS[gpu]
    work = stages(policy, policy.max_token_len, denoise_steps).values()
    return {
        size: factor * sum(stage.bound_s(size, SUSTAINED * tera_flops * 1e12, tera_bytes * 1e12) for stage in work)
        for size in sizes
    }


def read(own: argparse.Namespace, rest: Sequence[str]) -> Given:
    """Everything that is asked for, measured if need be. Raises ConfigError or ModelError, each one sentence."""
    config = load_config(rest)
    if own.device_ms and own.gpu:
        raise ConfigError("give --device-ms or --gpu, not both")
    if not own.measure:
        if own.env_ms is None:
            raise ConfigError("--env-ms is missing: the mean time of a chunk; or let it be measured, with --measure")
        if not own.device_ms and own.gpu is None:
            raise ConfigError(
                "the policy's device is missing: --device-ms or --gpu; or let it be measured, with --measure"
            )
    model = own.model or ("pi0" if own.gpu else "configured")
    policy = MODELS[model] if model in MODELS else preflight.check_checkpoint(config).config
    spec = EnvironmentSpec(
        policy.cameras, policy.image_size, policy.robot_state_dim, policy.robot_action_dim, prompts=("",)
    )
    values = measured(own, config) if own.measure else {}
    on_gpu = own.gpu is not None or (values.pop("on_gpu", config.device == "cuda") and not own.device_ms)
    for name, value in vars(own).items():
        if name in DEFAULTS and value is not None:
            values[name] = value
    values = DEFAULTS | values
    if own.device_ms:
        values["device"] = device_curve(own.device_ms)
    elif own.gpu:
        values["device"] = roofline(
            own.gpu, policy, config.policy.denoise_steps, config.inference.buckets, own.above_bound
        )
    if not values["episode_decisions"] >= 1:
        raise ConfigError(f"--episode-decisions must be at least 1, not {values['episode_decisions']:g}")
    figures = Figures(
        environment=EnvironmentTimes(
            values["env_ms"] / 1e3, values["env_sigma"], values["reset_s"], 1 / values["episode_decisions"]
        ),
        steps_per_decision=values.get("steps", config.env.chunk),
        device_s=values["device"],
        batch_sizes=tuple(config.inference.buckets),
        cores=values["cores"] if values["cores"] is not None else available_cpus(),
        environment_cores=values["env_cores"],
        device_cores=values["device_cores"],
        batch_wait_s=(config.inference.batch_wait_ms or 0.0) / 1e3,
        update_s=values["update_ms"] / 1e3,
        update_cores=values["update_cores"],
        learner_shares_device=on_gpu and config.learner.device is None,
        replay_ratio=config.replay_ratio,
        throttle_actors=config.throttle_actors,
        most_actors=most_actors(own, config, spec, policy.action_horizon, on_gpu or model != "configured"),
    )
    return Given(config, policy, spec, figures)


DEFAULTS: dict[str, Any] = {
    "env_ms": None,
    "env_sigma": 0.3,
    "reset_s": 0.0,
    "episode_decisions": 25.0,
    "env_cores": 1.0,
    "device_cores": 1.0,
    "update_ms": 0.0,
    "update_cores": 1.0,
    "cores": None,
}
"""Of the options that `plan_measure` can answer."""


def measured(own: argparse.Namespace, config: Config) -> dict[str, Any]:
    """The same names as in `DEFAULTS`, and `device`, `steps` and `on_gpu`."""
    from dsrl_async.plan_measure import measure

    if own.seconds <= 0:
        raise ConfigError("--seconds must be positive")
    policy, spec = preflight.check_policy(config)
    preflight.check_memory(config, spec, policy.action_horizon)
    preflight.check_device(config)
    environment, device, update, cores, on_gpu = measure(config, spec, policy.action_horizon, own.seconds)
    return {
        "env_ms": 1e3 * environment.chunk_s,
        "env_sigma": environment.sigma,
        "reset_s": environment.reset_s,
        "episode_decisions": environment.decisions_per_episode,
        "env_cores": environment.cores,
        "steps": environment.steps_per_decision,
        "device": device.seconds,
        "device_cores": device.cores,
        "update_ms": 1e3 * update.seconds,
        "update_cores": update.cores,
        "cores": cores,
        "on_gpu": on_gpu,
    }


def most_actors(own: argparse.Namespace, config: Config, spec: EnvironmentSpec, horizon: int, elsewhere: bool) -> int:
    """That the memory holds, beside the replay ring, the learner and the policy, unless that is `elsewhere`."""
    memory = available_memory() if own.memory_gib is None else own.memory_gib * 2**30
    actor = preflight.actor_bytes(config) if own.actor_mb is None else own.actor_mb * 1e6
    if not actor > 0:
        raise ConfigError(f"--actor-mb must be positive, not {own.actor_mb:g}")
    need = preflight.MemoryNeed(
        shared=layout(run_fields(config, spec, horizon))[1],
        policy=0 if elsewhere else preflight.policy_bytes(config, horizon),
        actor=int(actor),
        actors=config.actors,
    )
    return int(max(0.0, memory - need.without_actors) // actor)


def payload(given: Given) -> Payload:
    """What a decision and a publication of weights would send over a network.

    The noise is not sent: it follows from the episode's seed, and can be drawn where the policy is.
    """
    from dsrl_async.sac.networks import Actor  # only here: it imports torch
    from dsrl_async.shm.slots import SAC_IMAGE_SHAPE
    from dsrl_async.weights import HEADER

    config, spec, horizon = given.config, given.spec, given.policy.action_horizon
    width = config.sac.noise_width(horizon)
    row = {name: field for name, field in replay_fields(1, 1, spec.state_dim, width).items() if name != "replay/head"}
    float32, images = 4, spec.cameras * spec.image_size**2 * 3
    sac_image = SAC_IMAGE_SHAPE[0] * SAC_IMAGE_SHAPE[1] * SAC_IMAGE_SHAPE[2]
    return Payload(
        observation=images + sac_image + float32 * spec.state_dim,
        action_chunk=float32 * config.env.chunk * spec.action_dim,
        transition=field_bytes(row),
        weights=float32 * Actor(config.sac, horizon).flat.numel() + HEADER.size,
    )


def field_bytes(fields: dict[str, tuple[tuple[int, ...], str]]) -> int:
    """Bytes of arrays, without the gaps that `shm.arena.layout` leaves between them."""
    import numpy as np

    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in fields.values())


def sentence(figures: Figures, verdict: Verdict) -> str:
    """The verdict in words."""
    at = predict(figures, verdict.actors)
    count = "1 actor" if verdict.actors == 1 else f"{verdict.actors} actors"
    reach = f"{at.decisions_per_s:,.4g} decisions/s ({at.env_steps_per_s:,.4g} env steps/s, "
    reach += f"{at.updates_per_s:,.4g} updates/s), {BUSY:.0%} of the most that is possible here"
    if verdict.bound == "device":
        return f"{count} saturate the device: {reach}. The device is the bound: {ROOM['device']}."
    share = f"the device computes the policy for {at.device_busy:.0%} of the time"
    what = {
        "cores": f"The {figures.cores:.3g} CPU cores are the bound",
        "learner": "The learner is the bound: it keeps the replay ratio of "
        f"{figures.replay_ratio:g} with {1 / figures.update_s if figures.update_s else 0:,.4g} updates/s at most",
        "memory": f"Memory is the bound: it holds {figures.most_actors} actors",
        "environments": "The environments are the bound",
    }[verdict.bound]
    return f"{count} reach {reach}; {share}. {what}: {ROOM[verdict.bound]}."


def cost(figures: Figures, at: Prediction) -> str:
    """Where the core-seconds of a decision go."""
    batches = at.device_busy * figures.device_cores / at.decisions_per_s
    update = figures.update_s * figures.update_cores * at.updates_per_s / at.decisions_per_s
    parts = {"environment": figures.think_s * figures.environment_cores, "policy": batches, "learner": update}
    of = ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in parts.items())
    return f"CPU work of a decision with {at.actors} actors, in ms of a core: {of}; {figures.cores:.3g} cores."


def command_line(figures: Figures) -> str:
    """The options that give the same figures again."""
    times = figures.environment
    options = {
        "--env-ms": 1e3 * times.chunk_s,
        "--env-sigma": times.sigma,
        "--reset-s": times.reset_s,
        "--episode-decisions": 1 / times.reset_probability,
        "--env-cores": figures.environment_cores,
        "--device-cores": figures.device_cores,
        "--update-ms": 1e3 * figures.update_s,
        "--update-cores": figures.update_cores,
        "--cores": figures.cores,
    }
    words = [word for name, value in options.items() for word in (name, f"{value:.4g}")]
    points = [f"{size}:{1e3 * seconds:.4g}" for size, seconds in sorted(figures.device_s.items())]
    return shlex.join(["python", "-m", "dsrl_async.plan", *words, "--device-ms", *points])


def simulated(figures: Figures, point: Prediction) -> float | None:
    """Decisions per second of the simulated queue; None where cores or learner hold it back, which it knows nothing
    of."""
    if point.bound in ("cores", "learner") or (figures.learner_shares_device and figures.update_s):
        return None
    return simulate(
        [figures.environment.totals(0, lane) for lane in range(point.actors)],
        figures.service_s,
        figures.batch_sizes,
        decisions=SIMULATED_DECISIONS,
        skip=SIMULATED_DECISIONS // 2,
        batch_wait_s=figures.batch_wait_s,
    ).decisions_per_s


def show(
    console: Console,
    given: Given,
    points: Sequence[Prediction],
    verdict: Verdict,
    payload: Payload,
    network: Sequence[Machines],
    check: dict[int, float | None] | None,
) -> None:
    figures, times = given.figures, given.figures.environment
    console.print(
        f"environment  {1e3 * times.chunk_s:.4g} ms per chunk of {figures.steps_per_decision:.3g} steps (spread "
        f"{times.sigma:.2f}), reset {times.reset_s:.3g} s every {1 / times.reset_probability:.3g} decisions, "
        f"{figures.environment_cores:.2g} cores"
    )
    curve_text = ", ".join(f"{size}: {1e3 * seconds:.4g}" for size, seconds in sorted(figures.device_s.items()))
    console.print(f"device       ms by batch size: {curve_text}; {figures.device_cores:.2g} cores")
    shared = ", on the policy's device" if figures.learner_shares_device else ""
    if figures.update_s:
        console.print(
            f"learner      {1e3 * figures.update_s:.4g} ms per update{shared}, {figures.replay_ratio:g} updates per "
            f"decision, {figures.update_cores:.2g} cores"
        )
    else:
        console.print("learner      left out (--update-ms)")
    console.print(f"machine      {figures.cores:.3g} cores, memory for {figures.most_actors:,} actors\n")

    top = max(point.decisions_per_s for point in points)
    columns = ["actors", "decisions/s", "", "env steps/s", "updates/s", "device", "batch", "bound"]
    columns += ["simulated"] if check is not None else []
    table = Table(*columns, box=None, padding=(0, 1, 0, 0), header_style="")
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header in ("", "bound") else "right"
    for point in points:
        cells = [
            f"{point.actors}",
            f"{point.decisions_per_s:,.4g}",
            "█" * max(1, round(BAR * point.decisions_per_s / top)),
            f"{point.env_steps_per_s:,.4g}",
            f"{point.updates_per_s:,.4g}",
            f"{point.device_busy:.0%}",
            f"{point.batch_size:.3g}",
            point.bound,
        ]
        if check is not None:
            rate = check[point.actors]
            cells.append("–" if rate is None else f"{rate:,.4g}")
        table.add_row(*cells)
    console.print(table)
    console.print(f"\n{sentence(figures, verdict)}")
    console.print(cost(figures, predict(figures, verdict.actors)))

    console.print(
        f"\nMany machines, each with {verdict.actors} actors and a policy, and one with the learner "
        f"({payload.transition:,} bytes per decision to it, {payload.weights:,} per machine and publication from it):"
    )
    table = Table("machines", "actors", "decisions/s", "updates/s", "in MB/s", "out MB/s", "bound", box=None)
    table.padding = (0, 1, 0, 0)
    for column in table.columns:
        column.justify = "left" if column.header == "bound" else "right"
    for one in network:
        table.add_row(
            f"{one.nodes}",
            f"{one.actors:,}",
            f"{one.decisions_per_s:,.4g}",
            f"{one.updates_per_s:,.4g}",
            f"{one.transition_bytes_per_s / 1e6:,.3g}",
            f"{one.weights_bytes_per_s / 1e6:,.3g}",
            one.bound,
        )
    console.print(table)
    console.print(
        f"Were only the environments elsewhere, a decision would take {payload.observation:,} bytes to the policy and "
        f"{payload.action_chunk:,} back."
    )


def plot(path: Path, points: Sequence[Prediction], verdict: Verdict) -> None:
    """Draw the curve; raises ConfigError if the file cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    actors = [point.actors for point in points]
    axes.plot(actors, [point.decisions_per_s for point in points], "o-", label="decisions/s")
    axes.plot(actors, [point.updates_per_s for point in points], "--", label="updates/s")
    axes.axvline(verdict.actors, color="grey", linewidth=1)
    axes.annotate(
        f" {verdict.actors} actors\n bound: {verdict.bound}", (verdict.actors, 0), (2, 4), textcoords="offset points"
    )
    axes.set(xscale="log", xlabel="actors", ylabel="per second", ylim=(0, None), title="predicted throughput")
    axes.set_xticks(actors, [str(number) for number in actors], minor=False)
    axes.minorticks_off()
    busy = axes.twinx()
    busy.plot(actors, [100 * point.device_busy for point in points], ":", color="tab:red", label="device busy")
    busy.set(ylabel="device busy, %", ylim=(0, 105))
    handles = [*axes.get_legend_handles_labels()[0], *busy.get_legend_handles_labels()[0]]
    axes.legend(handles, [str(handle.get_label()) for handle in handles], loc="center right", frameon=False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path} cannot be written: {error}") from error
    finally:
        plt.close(figure)


def check_options(own: argparse.Namespace) -> None:
    """Raises ConfigError for what no figure can be."""
    if min(own.nodes) < 1:
        raise ConfigError("--nodes must be positive")
    for name in ("network_gbit", "above_bound"):
        if not getattr(own, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be positive, not {getattr(own, name):g}")
    if own.plot and find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib; pip install -e '.[plot]'")


def main(argv: Sequence[str]) -> int:
    try:
        own, rest = build_parser().parse_known_args(list(argv))
        check_options(own)
        given = read(own, rest)
        figures, config = given.figures, given.config
        points = curve(figures, also=[config.actors])
        verdict = judge(figures, points)
        sizes = payload(given)
        network = [
            machines(figures, verdict.actors, nodes, sizes, config.learner.publish_interval, own.network_gbit * GIGABIT)
            for nodes in sorted(set(own.nodes))
        ]
        check = {point.actors: simulated(figures, point) for point in points} if own.simulate else None
        if own.plot:
            plot(own.plot, points, verdict)
    except ValueError as error:  # ConfigError, ModelError, or what a policy's files say
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if own.json:
        content = {
            "figures": asdict(figures),
            "curve": [point._asdict() for point in points],
            "simulated": check,
            "verdict": {
                "actors": verdict.actors,
                "bound": verdict.bound,
                "most_decisions_per_s": verdict.at_most.decisions_per_s,
                "text": sentence(figures, verdict),
            },
            "payload": sizes._asdict(),
            "machines": [one._asdict() for one in network],
        }
        print(json.dumps(content))
        return 0
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    show(console, given, points, verdict, sizes, network, check)
    if own.measure:
        console.print("\nThe same without measuring:")
        console.print(command_line(figures), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
