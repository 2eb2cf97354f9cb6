"""What a sample takes on an H100 on paper: kernels, bytes and matrix products, and the time that they would take.

Nothing is computed or measured: a policy of full size in bfloat16 goes through the sampler on the meta device, and each
kernel that it would launch is counted with its shapes (`dsrl_async.bench.launches`). The figures of a case are, for the
stages vision, prefill, state (together: encode) and denoise (all steps; `step` is one of them) and their `total`:
  kernels       launches
  gigabytes     read and written by them
  teraflops     of matrix products and attention
  ms            on paper: the sum over the kernels of the time of each
  bound_ms      lower bound of `dsrl_async.pi0.roofline`; the state has none of its own
and `ms` and `kernels` of products, attention, and all others. What a kernel takes is told by `H100` and its
constants, which are printed first.

    python -m dsrl_async.bench paper --tables

prints Markdown tables instead, with the kernels by the function that launches them.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from dsrl_async.bench import synthetic
from dsrl_async.bench.figures import Figure, JsonLines, require_positive
from dsrl_async.bench.launches import Launch, LaunchCount
from dsrl_async.pi0.checkpoint import empty_model
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.model import Pi0
from dsrl_async.pi0.roofline import stages
from dsrl_async.pi0.sampler import Sampler

GPU = "h100"
STAGES = ("vision", "prefill", "state", "encode", "denoise")
"""`encode` is what torch.compile makes one of: vision, prefill and state."""
WAYS = ("eager", "compiled", "triton")
KINDS = ("product", "attention", "other")
UNITS = {
    "us": "us",
    "terabytes": "TB/s",
    "megabytes": "MB",
    "teraflops": "TFLOP/s",
    "processors": "multiprocessors",
    "queries": "queries",
    "share": "share of the rate",
    "bits": "times the rate",
}
"""Unit of a constant, by the last word of its name."""


@dataclass(frozen=True)
class H100:
    """An H100 SXM. The constants were chosen before any kernel was written that they are to judge, and stay.

    A kernel takes `gap_us`, and on top of it the longer of its memory traffic and its matrix products.
    """

    gap_us: float = 1.5
    """From a kernel's end to the start of the next one that depends on it, inside a CUDA graph, with what starting and
    draining cost. It is the same for a kernel of any size. A guess, as in docs/measurements/pi0.md, until
    scripts/gpu_report.py has run."""
    terabytes: float = 3.0
    """Memory bandwidth, 1e12 bytes/s: 0.9 of the data sheet's 3.35, which large copies reach."""
    cache_terabytes: float = 5.5
    """Bandwidth of the L2 cache, which Chips and Cheese measured on an H100 PCIe ("Nvidia's H100: Funny L2, and Tons
    of Bandwidth", 2023). Elementwise kernels get it for what fits, since their operands come from the kernel before."""
    cache_megabytes: float = 25.0
    """Operands of a kernel up to this size are taken to lie in the L2 cache: half of its 50 MB, which is the partition
    near a processor."""
    processors: int = 132
    """Multiprocessors, each of which works on one tile of a product or one block of queries at a time. Below one tile
    for each, a product is split along its inner dimension and uses them all; above, the last round is as long as the
    others."""
    product_teraflops: float = 700.0
    """Rate of bfloat16 products while all processors are busy: cuBLAS was measured at 716 for 8192 x 8192 x 8192
    (P. Shankhdhar, "Outperforming cuBLAS on H100", 2024). Unfilled rounds make 650 of it for the language model."""
    tiles: tuple[tuple[int, int, float], ...] = ((128, 128, 1.0), (64, 128, 0.75))
    """Rows and columns of a product's tiles, and the share of the rate that they reach; the better one is taken. A
    half tile loads 1.5 times as much for each product that it computes."""
    own_share: float = 0.8
    """Share of the library's rate that products in Triton kernels of our own are taken to reach with tiles of 128 by
    128. They are not split along their inner dimension."""
    eight_bits: float = 1.7
    """How many times the rate of bfloat16 products those of float8 reach. Twice, by the data sheet; but torch asks for
    sums in float32 (`use_fast_accum=False`), which costs Hopper some of it."""
    single_teraflops: float = 50.0
    """Rate of float32 products without TF32: 0.75 of the data sheet's 67."""
    flash_teraflops: float = 250.0
    """Rate of attention without a mask, which torch gives to FlashAttention 2. Its kernels do not use what is new in
    Hopper and reach some 350 with long sequences (Shah et al., "FlashAttention-3", 2024, figure 5); with 256 keys, and
    72 channels in a tile of 96, less."""
    masked_teraflops: float = 120.0
    """Rate of attention with a mask, which torch gives to the memory-efficient kernels. They reach about half of
    FlashAttention 2 (Dao, "FlashAttention-2", 2023, figure 5), and beyond 128 channels keep sums in memory."""
    flash_queries: int = 64
    masked_queries: int = 32
    """Queries of a block, as torch compiles these kernels for heads of more than 128 channels."""

    def seconds(self, launch: Launch) -> float:
        """What one kernel takes."""
        return 1e-6 * self.gap_us + max(self._traffic_s(launch), self._matrices_s(launch))

    def _traffic_s(self, launch: Launch) -> float:
        cached = launch.kind == "other" and launch.bytes <= 1e6 * self.cache_megabytes
        return launch.bytes / (1e12 * (self.cache_terabytes if cached else self.terabytes))

    def _matrices_s(self, launch: Launch) -> float:
        if launch.matrices is None:
            return 0.0
        flops_per_s = 1e12 * (self.single_teraflops if launch.single else self.product_teraflops)
        if launch.operation == "_scaled_mm":
            flops_per_s *= self.eight_bits
        products, rows, columns, inner = launch.matrices
        if launch.kind == "product":
            of_library = launch.tile is None
            return min(
                self._rounds(products * math.ceil(rows / high) * math.ceil(columns / wide), split=of_library)
                * (2 * high * wide * inner * self.processors / (share * flops_per_s))
                for high, wide, share in (self.tiles if launch.tile is None else [self._own_tile(*launch.tile)])
            )
        queries = self.masked_queries if launch.masked else self.flash_queries
        if launch.tile is not None:
            queries = launch.tile[0]
        if not launch.single:
            flops_per_s = 1e12 * (self.masked_teraflops if launch.masked else self.flash_teraflops)
        rounds = self._rounds(products * math.ceil(rows / queries), split=False)
        return rounds * 4 * queries * columns * inner * self.processors / flops_per_s

    def _own_tile(self, high: int, wide: int) -> tuple[int, int, float]:
        """A tile of a kernel of our own as one of `tiles`: its share falls with what it loads for each product."""
        return high, wide, self.own_share * min(1.0, 2 * high * wide / (high + wide) / 128)

    def _rounds(self, tiles: int, split: bool) -> float:
        """Time of so many tiles, in that of one."""
        return tiles / self.processors if split and tiles < self.processors else math.ceil(tiles / self.processors)


def count_sample(
    config: Pi0Config,
    batch_size: int,
    prompt_tokens: int,
    steps: int,
    way: str = "eager",
    fp8: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Launch]:
    """The launches of one call of the sampler. Its steps are alike, so that one is counted for all of them.

    `fp8` is `policy.prefill_precision: fp8`, and has no effect on what is compiled.
    """
    if way == "compiled":
        encode, copy_of_noise, step = _compiled(config, batch_size, prompt_tokens, dtype)
        return [*encode, *copy_of_noise, *step * steps]
    model = empty_model(config, "meta", dtype, fp8)
    kernels: Literal["torch", "triton"] = "triton" if way == "triton" else "torch"
    sampler = Sampler(model, batch_size, prompt_tokens, denoise_steps=1, kernels=kernels)
    count = LaunchCount("prefill")

    def enter(stage: str) -> Callable[..., None]:
        def set_stage(*_: object) -> None:
            count.stage = stage

        return set_stage

    hooks = [
        model.vision.register_forward_pre_hook(enter("vision")),
        model.vision.register_forward_hook(enter("prefill")),
        model.expert.register_forward_pre_hook(enter("state")),
    ]
    with count:
        sampler.encode()
    for hook in hooks:
        hook.remove()
    with LaunchCount("denoise") as denoise:
        sampler.denoise()
    copy, *step = denoise.launches
    assert copy.operation == "copy_"
    return [*count.launches, copy, *step * steps]


def _compiled(config: Pi0Config, batch_size: int, prompt_tokens: int, dtype: torch.dtype) -> Iterator[list[Launch]]:
    """The launches of the first half, of the copy of the noise, and of one step."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dsrl_async.bench.compiled_launches import launches_of_compiled

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Pi0(config).set_dtype(dtype).eval().requires_grad_(False)
        sampler = Sampler(model, batch_size, prompt_tokens, denoise_steps=1, compiled=True)
        yield launches_of_compiled("encode", sampler.encode)
        yield [Launch("denoise", "Sampler.denoise", "copy_", "other", sampler.noise.nbytes, sampler.noise.nbytes)]
        yield launches_of_compiled("denoise", sampler.denoise)


def seconds(launches: Iterable[Launch]) -> float:
    return sum(map(H100().seconds, launches))


def bounds_ms(config: Pi0Config, batch_size: int, prompt_tokens: int, steps: int) -> dict[str, float]:
    """Of the stages that have one, at the rates of `dsrl_async.pi0.roofline`."""
    work = stages(config, prompt_tokens, steps)
    bounds = {name: 1e3 * stage.bound_s(batch_size, 800e12, 3.35e12) for name, stage in work.items()}
    return bounds | {"encode": bounds["vision"] + bounds["prefill"], "total": sum(bounds.values())}


def by_stage(launches: list[Launch], steps: int) -> dict[str, list[Launch]]:
    """The launches of each stage, of one step and of all; without stages that have none."""
    parts = {stage: [launch for launch in launches if launch.stage == stage] for stage in STAGES}
    denoise = parts["denoise"]
    step = denoise[1 : 1 + (len(denoise) - 1) // steps]
    return {stage: part for stage, part in parts.items() if part} | {"step": step, "total": launches}


def summarise(way: str, launches: list[Launch], steps: int, bounds: dict[str, float]) -> Iterator[Figure]:
    for stage, part in by_stage(launches, steps).items():
        yield Figure(way, f"{stage}_kernels", len(part), "kernels")
        yield Figure(way, f"{stage}_gigabytes", sum(launch.bytes for launch in part) / 1e9, "GB")
        yield Figure(way, f"{stage}_teraflops", sum(launch.flops for launch in part) / 1e12, "TFLOP")
        yield Figure(way, f"{stage}_ms", 1e3 * seconds(part), "ms")
        if stage in bounds:
            yield Figure(way, f"{stage}_bound_ms", bounds[stage], "ms")
        for kind in KINDS:
            of_kind = [launch for launch in part if launch.kind == kind]
            yield Figure(way, f"{stage}_{kind}_kernels", len(of_kind), "kernels")
            yield Figure(way, f"{stage}_{kind}_ms", 1e3 * seconds(of_kind), "ms")


def stage_table(launches: list[Launch], steps: int, bounds: dict[str, float]) -> Iterator[str]:
    """Lines of a Markdown table with a row for each stage."""
    yield f"| | kernels | GB | TFLOP | {' | '.join(f'{kind}, ms' for kind in KINDS)} | ms | bound, ms |"
    yield "|---|" + "---|" * (len(KINDS) + 5)
    for stage, part in by_stage(launches, steps).items():
        gigabytes, teraflops = sum(launch.bytes for launch in part) / 1e9, sum(launch.flops for launch in part) / 1e12
        of_kinds = [1e3 * seconds(launch for launch in part if launch.kind == kind) for kind in KINDS]
        times = " | ".join(f"{ms:.2f}" for ms in (*of_kinds, 1e3 * seconds(part)))
        bound = f"{bounds[stage]:.2f}" if stage in bounds else ""
        yield f"| {stage} | {len(part)} | {gigabytes:.2f} | {teraflops:.2f} | {times} | {bound} |"


def launch_table(launches: list[Launch], least_ms: float) -> Iterator[str]:
    """Lines of a Markdown table with the kernels by who launches them; those of less than `least_ms` in one row."""
    groups: dict[tuple[str, str, str], list[Launch]] = defaultdict(list)
    for launch in launches:
        groups[launch.stage, launch.where, launch.operation].append(launch)
    yield "| stage | launched by | operation | kernels | GB | ms |"
    yield "|---|---|---|---|---|---|"
    rest: list[Launch] = []
    for (stage, where, operation), part in sorted(groups.items(), key=lambda group: -seconds(group[1])):
        if 1e3 * seconds(part) < least_ms:
            rest += part
        else:
            yield f"| {stage} | `{where}` | `{operation}` | {_cells(part)} |"
    yield f"| all others | | | {_cells(rest)} |"


def _cells(launches: list[Launch]) -> str:
    return f"{len(launches)} | {sum(launch.bytes for launch in launches) / 1e9:.2f} | {1e3 * seconds(launches):.2f}"


def constants() -> Iterator[Figure]:
    for name, value in asdict(H100()).items():
        if name == "tiles":
            for high, wide, share in value:
                yield Figure(GPU, f"tile_{high}x{wide}", share, "share of the rate")
        else:
            yield Figure(GPU, name, value, UNITS[name.rpartition("_")[2]])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", choices=list(synthetic.MODELS), default=["pi0"])
    parser.add_argument(
        "--way",
        nargs="+",
        choices=WAYS,
        default=["eager"],
        help="eager: torch's own kernels (default); triton: those of policy.kernels, if Triton is installed; "
        "compiled: those of policy.compile, in some minutes",
    )
    parser.add_argument(
        "--fp8", action="store_true", help="with policy.prefill_precision: fp8, which what is compiled leaves out"
    )
    parser.add_argument("--size", choices=list(synthetic.SIZES), default="full", help="as in `bench denoise` (full)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16], help="observations at once (default: 1 16)")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps (default: 10)")
    parser.add_argument("--prompt-tokens", type=int, default=24, help="language slots (default: 24)")
    parser.add_argument("--tables", action="store_true", help="print Markdown tables instead of JSON lines")
    parser.add_argument(
        "--least-ms", type=float, default=0.3, help="shortest row of the table of kernels (default: 0.3)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON lines to this file, too")
    parser.set_defaults(repeats=1)


def run(arguments: argparse.Namespace) -> None:
    require_positive(arguments, "batch", "steps")
    if not arguments.tables:
        lines = JsonLines("paper", arguments)
        lines.case("constants")
        lines.add(constants())
    for model in arguments.model:
        config = Pi0Config(**synthetic.sizes(model, arguments.size))
        if not 1 <= arguments.prompt_tokens <= config.max_token_len:
            raise ValueError(f"--prompt-tokens must be from 1 to {config.max_token_len} for {model}")
        for batch, way in itertools.product(arguments.batch, arguments.way):
            details = f"batch {batch} steps {arguments.steps} prompt {arguments.prompt_tokens}"
            case = f"{model} {arguments.size} {'fp8 and ' if arguments.fp8 else ''}bfloat16 {details}"
            launches = count_sample(config, batch, arguments.prompt_tokens, arguments.steps, way, arguments.fp8)
            bounds = bounds_ms(config, batch, arguments.prompt_tokens, arguments.steps)
            if arguments.tables:
                print(f"{case}, {way}:\n", *stage_table(launches, arguments.steps, bounds), "", sep="\n")
                print(*launch_table(launches, arguments.least_ms), "", sep="\n")
            else:
                lines.case(case)
                lines.add(summarise(way, launches, arguments.steps, bounds))
