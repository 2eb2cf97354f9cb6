"""A gradient update of DSRL-SAC: this project's against a plain one, and against its matrix products alone.

An update trains critic, actor and temperature and moves the target, from the same parameters and the same batch (uint8
images in memory), in float32. The repeats of three systems are interleaved in one process:
  dsrl_async    the learner's own function (`SacAgent.learn`)
  plain         the same networks in the shape of RLinf's DSRL modules: each Q head is a module of its own, called in a
                loop; the encoders run anew for every loss; torch's Adam; a loop over all parameters for the target
  bound         only the convolutions and matrix products of a dsrl_async update, on operands of the same shapes and
                memory formats
Before anything is timed, the losses and gradients of the two programs are compared; the command fails if they differ.
The figures of a case are
  update          milliseconds (medians), and the ratios plain/dsrl_async (target: 2) and dsrl_async/bound (target: 1.3)
  update_cpu      the same in CPU time, which other programs lengthen less
  arithmetic      GFLOP of convolutions and matrix products, counted by torch
  kernels         ATen operations that are not views: what a GPU would be asked to launch (for dsrl_async with drawing
                  the batch, counted on torch's meta device; target: 400)
  kernels_cpu     those of `update` on this CPU, where the encoder takes the images a few at a time
  host_syncs      operations that no CUDA graph can hold
  draw, draw_cpu  milliseconds to draw a batch from a replay ring in place (random rows, --ring-rows of them)
  convolution_share, gemm_share   shares of an update's time (torch's profiler, one update)
  gradient_difference   Euclidean norm of the difference of the two programs' gradients, relative to a gradient; the
                  larger one of critic and actor

Not measured: anything on a GPU; RLinf itself, whose learner also moves batches through several processes; more than one
thread unless asked (--threads); the publication of weights and checkpoints.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from dsrl_async.bench.figures import Figure, JsonLines, add_output_arguments, require_positive
from dsrl_async.bench.systems.plain_learner import Plain, copy_actor, copy_critic
from dsrl_async.config.files import read_config
from dsrl_async.config.load import validate
from dsrl_async.config.settings import SacConfig
from dsrl_async.host.tracing import OperationTrace
from dsrl_async.plan.measure import fill_ring
from dsrl_async.run.learner.sampling import InPlace, Mirror
from dsrl_async.run.learner.updates import Updates
from dsrl_async.sac.agent import Batch, RandomNumbers, SacAgent
from dsrl_async.sac.flat import FlatModule
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.replay import ReplayRing, replay_fields

OWN, PLAIN, BOUND = "dsrl_async", "plain", "bound"
DEFAULT_CONFIG = "libero_spatial_pi0"
HORIZON = 50
"""Action slots of Pi0. The agent's sizes depend on them only with `sac.noise_layout: per_slot`."""
CONVOLUTIONS = ("convolution", "convolution_backward")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
TOLERANCE = 1e-2
"""Relative difference of losses and gradients that counts as rounding. It is mostly 1e-6, but a single ReLU whose input
is rounded to the other side of zero shows in a gradient."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        default=DEFAULT_CONFIG,
        help=f"configuration whose `sac` is used (default: {DEFAULT_CONFIG})",
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[64, 256, 512], help="transitions (default: 64 256 512)"
    )
    parser.add_argument("--threads", type=int, default=1, help="(default: 1)")
    parser.add_argument("--ring-rows", type=int, default=10_000, help="size of the replay ring (default: 10000)")
    parser.add_argument("--system", nargs="+", choices=[OWN, PLAIN, BOUND], default=[OWN, PLAIN, BOUND])
    parser.add_argument(
        "--images-at-a-time", type=int, help="images that our encoder takes at once (default: what fits into a cache)"
    )
    add_output_arguments(parser, repeats=5)


class Products(TorchDispatchMode):
    """Records the convolutions and matrix products inside it, with operands of its own, one per shape and layout."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []
        self._operands: dict[tuple[Any, ...], Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in CONVOLUTIONS + PRODUCTS:
            self.calls.append((func, *tree_map_only(Tensor, self._operand, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))

    def _operand(self, like: Tensor) -> Tensor:
        key = (like.shape, like.stride())
        if key not in self._operands:
            numbers = 1 + sum((size - 1) * stride for size, stride in zip(*key, strict=True))
            # The values are small, since some products add to their result each time, but not denormal.
            self._operands[key] = torch.empty(numbers).uniform_(-1e-3, 1e-3).as_strided(*key)
        return self._operands[key]

    @torch.no_grad()
    def run(self) -> None:
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


def random_batch(config: SacConfig, size: int, action_dim: int) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Batch(
        images=torch.randint(0, 256, (2 * size, *config.image_shape), dtype=torch.uint8, generator=generator),
        states=normal(2 * size, config.state_dim),
        noise=normal(size, action_dim),
        reward=torch.full((size,), -1.0),
        discount=torch.full((size,), config.gamma),
    )


def compare(agent: SacAgent, plain: Plain, batch: Batch, random: RandomNumbers) -> float:
    """Relative difference of the gradients, the larger one of critic and actor. The agent makes an update.

    Raises ValueError if losses or gradients differ.
    """
    theirs = [loss.item() for loss in plain.losses(batch, random.normal)]
    metrics = agent.learn(batch, random, update_actor=True).tolist()
    ours = [metrics[index] for index in (0, 2, 5)]
    differences = [abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True)]
    critic = copy_critic(plain.critic, agent.critic, lambda parameter: gradient_of(agent.critic, parameter))
    actor = copy_actor(plain.actor, agent.actor, lambda parameter: gradient_of(agent.actor, parameter))
    of_gradients = []
    for pairs, norm, limit in (
        (critic, metrics[1], agent.config.critic_grad_clip),
        (actor, metrics[4], agent.config.actor_grad_clip),
    ):
        unclipped = 1.0 if limit is None else max(1.0, norm / limit)
        total = sum(
            float((plain.grad - unclipped * own).square().sum()) for plain, own in pairs if plain.grad is not None
        )
        of_gradients.append(total**0.5 / norm)
    if max(differences + of_gradients) > TOLERANCE:
        raise ValueError(f"the two programs do not compute the same: {max(differences + of_gradients):.1e} apart")
    return max(of_gradients)


def gradient_of(module: FlatModule, parameter: Tensor) -> Tensor:
    """The gradient of a parameter of the module, from its last update."""
    return module.flat_grad[parameter.storage_offset() :][: parameter.numel()].view(parameter.shape)


def shares(update: Callable[[], object]) -> tuple[float, float]:
    """Shares of convolutions and of matrix products in the time of an update."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        update()
    spent = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in profiler.key_averages()}
    convolutions = sum(spent.get(name, 0.0) for name in ("mkldnn_convolution", "convolution_backward"))
    return convolutions / sum(spent.values()), sum(spent.get(name, 0.0) for name in PRODUCTS) / sum(spent.values())


def measure(sac: SacConfig, size: int, arguments: argparse.Namespace) -> Iterator[Figure]:
    """Figures of one batch size."""
    agent = SacAgent(sac, HORIZON)
    if arguments.images_at_a_time is not None:
        for network in (agent.actor, agent.critic, agent.target_critic):
            network.encoder.images_at_a_time = arguments.images_at_a_time
    plain = Plain(agent)
    updates = Updates(agent, InPlace(fill_ring(sac, arguments.ring_rows, agent.action_dim)), size)
    batch, random = random_batch(sac, size, agent.action_dim), updates.random
    random.draw_(agent.generator)
    difference = compare(agent, plain, batch, random)
    updates.refresh()
    products = Products()
    with products:
        agent.learn(batch, random, True)
    systems: dict[str, Callable[[], object]] = {
        OWN: lambda: agent.learn(batch, random, True),
        PLAIN: lambda: plain.update(batch, random.normal),
        BOUND: products.run,
    }
    systems = {name: update for name, update in systems.items() if name in arguments.system}
    if OWN in systems:
        systems["draw"] = updates.draw_batch
    for update in systems.values():
        update()
    clocks = {"update": time.perf_counter, "update_cpu": time.process_time}
    times: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in systems} for clock in clocks}
    for _ in range(arguments.repeats):
        for name, update in systems.items():
            begin = [clock() for clock in clocks.values()]
            update()
            for (clock, now), before in zip(clocks.items(), begin, strict=True):
                times[clock][name].append(1e3 * (now() - before))
    for clock, of_systems in times.items():
        median = {name: statistics.median(values) for name, values in of_systems.items()}
        for name in arguments.system:
            yield Figure(name, clock, median[name], "ms")
        for slow, fast in ((PLAIN, OWN), (OWN, BOUND), (PLAIN, BOUND)):
            if {slow, fast} <= systems.keys():
                yield Figure(f"{slow}/{fast}", clock, median[slow] / median[fast], "ratio")
        if "draw" in systems:
            yield Figure(OWN, f"draw{clock.removeprefix('update')}", median["draw"], "ms")
    for name in [name for name in (OWN, PLAIN) if name in systems]:
        with FlopCounterMode(display=False) as flops:
            systems[name]()
        yield Figure(name, "arithmetic", flops.get_total_flops() / 1e9, "GFLOP")
        with OperationTrace() as trace:
            systems[name]()
        yield Figure(name, "kernels_cpu", trace.kernels, "operations")
        yield Figure(name, "kernels", kernels_on_a_device(sac, size) if name == OWN else trace.kernels, "operations")
        yield Figure(name, "host_syncs", trace.host_syncs, "operations")
        convolutions, matrix_products = shares(systems[name])
        yield Figure(name, "convolution_share", convolutions, "share of time")
        yield Figure(name, "gemm_share", matrix_products, "share of time")
    yield Figure(f"{OWN}-{PLAIN}", "gradient_difference", difference, "relative")


def kernels_on_a_device(sac: SacConfig, size: int) -> int:
    """Kernels of a full update with drawing, where the encoder takes all images at once."""
    with torch.device("meta"):
        agent = SacAgent(sac, HORIZON, device="meta")
    ring = ReplayRing(Arena.create(replay_fields(1, 16, sac.state_dim, agent.action_dim, len(sac.cameras))))
    updates = Updates(agent, Mirror(ring, agent.device), size)
    with OperationTrace(guarded=True) as trace:
        updates.whole(update_actor=True)
    return trace.kernels


def run(arguments: argparse.Namespace) -> None:
    require_positive(arguments, "repeats", "batch", "threads")
    if arguments.ring_rows < 4 or (arguments.images_at_a_time or 1) < 1:
        raise ValueError("--images-at-a-time must be positive, and --ring-rows at least 4")
    config = validate(read_config(arguments.config))
    if config.sac.augmentation != "none":
        raise ValueError("the plain program has no augmentation; set sac.augmentation to none in the configuration")
    torch.set_num_threads(arguments.threads)
    lines = JsonLines("learner", arguments)
    for size in arguments.batch:
        sliced = f" images {arguments.images_at_a_time}" if arguments.images_at_a_time else ""
        lines.case(f"{Path(arguments.config).stem} batch {size} threads {arguments.threads}{sliced}")
        lines.add(measure(config.sac, size, arguments))
