"""The measurements of `gpu_report.py`, which runs each in a process of its own:

    python scripts/gpu_report_sections.py SECTION OPTIONS RESULTS

OPTIONS is the JSON of `Options`, RESULTS the file to which every result is appended as a line of JSON at once. Packages
that a section needs beside torch and numpy are imported in it, so that a missing one stops only what needs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsrl_async.host.device import resolve_device
from dsrl_async.host.graphs import HIGH_PRIORITY, CaptureError, MemoryPool, capture, graphs_of
from dsrl_async.pi0.config import Pi0Config, tabletop_config
from dsrl_async.pi0.memory import activation_bytes, buffer_bytes
from dsrl_async.pi0.model import Pi0, attend, key_mask, rope_frequency, time_frequency
from dsrl_async.pi0.roofline import stages
from dsrl_async.pi0.sampler import Sampler
from dsrl_async.shm.arena import Arena

ROOT = Path(__file__).resolve().parent.parent
MISSING = 3
"""Exit status of a section that needs a package which is not installed."""
MODELS = {
    "full": {"pi0": Pi0Config(), "pi05": Pi0Config(pi05=True, action_horizon=10, max_token_len=200)},
    "toy": {
        "pi0": tabletop_config(),
        "pi05": dataclasses.replace(tabletop_config(), pi05=True),
    },
}
PROMPT_TOKENS = {"full": 24, "toy": 8}
LEARNER_BATCHES = {"full": (64, 256, 512), "toy": (8,)}
MIRRORED_ROWS = {"full": 100_000, "toy": 200}
GOLDEN_SIZES = {"full": ("toy", "two_layers"), "toy": ("toy",)}
SHARED_S = {"full": 8.0, "toy": 0.3}
MPS_START_S = 15.0
"""How long MPS may take to start, and to end."""
KERNELS = 25
"""How many kernels a profile lists."""
HORIZON = 50


@dataclasses.dataclass(frozen=True)
class Options:
    """What `gpu_report.py` tells each section."""

    device: str
    size: str
    dtype: str
    batch_sizes: list[int]
    denoise_steps: int
    repeats: int
    compile: bool
    config: str | None
    """File with the configuration of the learner; None: the tabletop's."""

    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def profiled_sizes(self) -> list[int]:
        """The smallest batch size, and 16 or the next smaller one."""
        sizes = [size for size in self.batch_sizes if size <= 16] or self.batch_sizes
        return sorted({min(self.batch_sizes), max(sizes)})


class Results:
    """Appends lines of JSON; each is in the file when the method returns, whatever becomes of the process."""

    def __init__(self, section: str, path: Path) -> None:
        self._section, self._file = section, path.open("a")

    def _line(self, **fields: object) -> None:
        self._file.write(json.dumps({"section": self._section, **fields}) + "\n")
        self._file.flush()

    def row(self, table: str, **cells: object) -> None:
        """A row of a table. Underscores in the names of the columns stand for spaces."""
        self._line(table=table, row={name.replace("_", " "): cell for name, cell in cells.items()})

    def figure(self, name: str, value: float) -> None:
        """A number that a claim is compared with."""
        self._line(figure=name, value=value)

    def note(self, sentence: str) -> None:
        self._line(note=sentence)

    def problem(self, sentence: str) -> None:
        """What makes the section, and so the report, a failure."""
        self._line(problem=sentence)


# --- what several sections use -------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call on the device, after one that does not count."""
    times = []
    for number in range(repeats + 1):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end) / 1000
        else:
            begin = time.perf_counter()
            function()
            elapsed = time.perf_counter() - begin
        if number:
            times.append(elapsed)
    return statistics.median(times)


def wall_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Time of one call until the device has done it."""
    synchronize(device)
    begin = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begin


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured FLOP/s of a large matrix product of random numbers."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device, 10)


def copy_rate(device: torch.device) -> float:
    """Measured bytes/s of a large copy within the device, read and write counted."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device, 10)


@torch.no_grad()
def random_model(config: Pi0Config, device: torch.device, dtype: torch.dtype) -> Pi0:
    """A model with random weights that keep activations finite, made on the device."""
    with torch.device("meta"):
        model = Pi0(config).set_dtype(dtype)
    model.to_empty(device=device).eval().requires_grad_(False)
    model.inverse_frequency.copy_(rope_frequency(config.head_dim))
    model.time_frequency.copy_(time_frequency(config.expert_width))
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, math.prod(parameter.shape[1:]) ** -0.5, generator=generator)
        else:
            parameter.zero_()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1)
    return model


def fill(sampler: Sampler, seed: int) -> None:
    """Random inputs. Two of three prompts leave language slots empty, the first one among them."""
    generator = torch.Generator(sampler.noise.device).manual_seed(seed)
    sampler.images.uniform_(-1, 1, generator=generator)
    sampler.tokens.random_(0, sampler.model.config.vocab_size, generator=generator)
    sampler.state.normal_(generator=generator)
    sampler.noise.normal_(generator=generator)
    slots = sampler.language_length
    lengths = torch.tensor([slots if row % 3 == 2 else slots - 7 for row in range(sampler.batch_size)])
    sampler.token_mask.copy_(torch.arange(slots) < lengths[:, None])


def top_kernels(function: Callable[[], object], device: torch.device) -> tuple[list[tuple[str, int, float]], int]:
    """(name, calls, seconds) of the costliest kernels of a call on the device, and the number of all launches.

    On the CPU, which only rehearses, operators stand for kernels.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    function()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        function()
        synchronize(device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in recorded.key_averages() if event.device_type == kind]

    def time_of(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total) * 1e-6

    events.sort(key=time_of, reverse=True)
    return [(event.key, event.count, time_of(event)) for event in events], sum(event.count for event in events)


def report_kernels(results: Results, table: str, function: Callable[[], object], device: torch.device) -> int:
    """Add the costliest kernels of a call to a table of their own; returns how many launches there were."""
    kernels, launches = top_kernels(function, device)
    total = sum(taken for *_, taken in kernels)
    for name, calls, taken in kernels[:KERNELS]:
        results.row(table, kernel=name[:110], calls=calls, ms=f"{1e3 * taken:.3f}", share=f"{taken / total:.1%}")
    if not kernels:
        results.problem(f"{table}: the profiler saw no kernel")
    results.note(f"{table}: {launches} launches of {len(kernels)} kernels, {1e3 * total:.2f} ms in all.")
    return launches


def reserved_gib(device: torch.device) -> float:
    return torch.cuda.memory_reserved(device) / 2**30 if device.type == "cuda" else 0.0


# --- sections ------------------------------------------------------------------------------------------------------


def machine(results: Results, options: Options) -> None:
    device = resolve_device(options.device)
    facts: dict[str, object] = {"torch": torch.__version__, "CUDA of torch": torch.version.cuda}
    facts |= {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory": f"{properties.total_memory / 2**30:.1f} GiB",
            "multiprocessors": properties.multi_processor_count,
            "cuDNN": torch.backends.cudnn.version(),
            "devices": torch.cuda.device_count(),
        }
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version,mig.mode.current,clocks.max.sm", "--format=csv,noheader"]
            facts["driver, MIG, highest clock"] = subprocess.run(
                query, capture_output=True, text=True, timeout=10
            ).stdout.strip()
    for package in ("cupy", "pydantic", "zmq", "mujoco", "tokenizers", "safetensors", "rich", "tensorboard", "pynvml"):
        facts[package] = "there" if importlib.util.find_spec(package) else "not installed"
    for name, value in facts.items():
        results.row("machine", what=name, value=str(value))
    for name, dtype in {"bfloat16": torch.bfloat16, "float32 (IEEE)": torch.float32}.items():
        rate = product_rate(device, dtype)
        results.row("rates", what=f"matrix product, {name}", measured=f"{rate / 1e12:.1f} TFLOP/s")
    results.row("rates", what="copy on the device", measured=f"{copy_rate(device) / 1e9:.0f} GB/s")


def gpu_tests(results: Results, options: Options) -> None:
    """The tests marked gpu, of the files that have such a mark: one that cannot be imported stops no other."""
    for package in ("pytest", "pydantic", "psutil", "tensorboard", "zmq"):
        importlib.import_module(package)  # missing ones end the section, which says so
    paths = sorted(ROOT.joinpath("tests").rglob("test_*.py"))
    files = [str(path.relative_to(ROOT)) for path in paths if "@pytest.mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rs"]
    done = subprocess.run(
        [*command, "--continue-on-collection-errors", *files], cwd=ROOT, capture_output=True, text=True
    )
    for line in done.stdout.strip().splitlines()[-12:]:
        results.note(f"`{line}`")
    results.note(f"Files: {', '.join(files)}.")
    passed = re.search(r"\b(\d+) passed", done.stdout)
    if done.returncode != 0 or (passed is None and options.device != "cpu"):
        results.problem(f"pytest ended with status {done.returncode}, {passed[0] if passed else 'none passed'}")
    if passed or done.returncode != 0:
        results.figure("status of the gpu tests", float(done.returncode))


def goldens(results: Results, options: Options) -> None:
    """openpi's own actions against this policy's on the device."""
    from safetensors.torch import load_file

    from dsrl_async.bench import synthetic
    from dsrl_async.bench.systems.policy import seeded_policy
    from dsrl_async.pi0.sampler import sample_actions

    device = resolve_device(options.device)
    stored = load_file(ROOT / "tests" / "pi0" / "goldens" / "openpi.safetensors")
    worst_float32 = worst_factor = 0.0
    for size, model, dtype in itertools.product(GOLDEN_SIZES[options.size], MODELS["full"], ("float32", "bfloat16")):
        sizes = synthetic.sizes(model, size)
        policy = seeded_policy(Pi0Config(**sizes), getattr(torch, dtype), seed=0).to(device)
        for key in sorted(stored):
            if not key.startswith(f"{size}/{model}/") or not key.endswith("/float32"):
                continue
            batch, steps = (int(part.lstrip("batchsep")) for part in key.split("/")[2:4])
            if options.size == "toy" and (batch, steps) != (1, 4):
                continue
            arrays = synthetic.observation(sizes, synthetic.prompt_lengths(sizes, batch), seed=0)
            inputs = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
            actions = sample_actions(policy, **inputs, denoise_steps=steps).cpu()
            truth, theirs = stored[key], stored[key.replace("/float32", "/bfloat16")]
            largest = float((actions - truth).abs().max())
            rms, their_rms = (
                float(((one - truth).square().mean() / truth.square().mean()).sqrt()) for one in (actions, theirs)
            )
            results.row(
                "openpi's actions",
                case=f"{size}, {model}, batch {batch}, {steps} steps",
                dtype=dtype,
                max_difference=f"{largest:.1e}",
                relative_RMS=f"{rms:.1e}",
                openpi_bfloat16=f"{their_rms:.1e}" if dtype == "bfloat16" else "",
            )
            if dtype == "float32":
                worst_float32 = max(worst_float32, largest)
            else:
                worst_factor = max(worst_factor, rms / their_rms)
        del policy
    results.figure("goldens float32", worst_float32)
    results.figure("goldens bfloat16 factor", worst_factor)


@torch.no_grad()
def sampler(results: Results, options: Options, name: str) -> None:
    """Captures from the largest size to the smallest in one pool, then replays in shuffled order."""
    device, config = resolve_device(options.device), MODELS[options.size][name]
    model = random_model(config, device, options.torch_dtype())
    length, steps = PROMPT_TOKENS[options.size], options.denoise_steps
    rates = product_rate(device, model.dtype), copy_rate(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    work, value_bytes = stages(config, length, steps), torch.finfo(model.dtype).bits // 8
    results.note(f"Weights and what torch keeps beside them: {reserved_gib(device):.2f} GiB reserved.")
    samplers: dict[int, Sampler] = {}
    replays: dict[int, Sequence[Callable[[], None]]] = {}
    expected: dict[tuple[int, int], Tensor] = {}
    pool: MemoryPool | None = None
    seeds, captures = (1, 2), 0
    for size in sorted(options.batch_sizes, reverse=True):
        before = reserved_gib(device)
        one = samplers[size] = Sampler(model, size, length, steps, compiled=options.compile)
        first_s = wall_seconds(one.run, device)
        for seed in seeds:
            fill(one, seed)
            one.run()
            expected[size, seed] = one.actions.clone()
        eager_s = seconds(one.run, device, min(options.repeats, 5))
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the eager run took, so that what the capture takes can be read
        halves, begin = [one.encode, one.denoise], time.perf_counter()
        captured = capture(halves, device, pool, f"{name}, batch size {size}", "policy.graphs", HIGH_PRIORITY)
        capture_s = time.perf_counter() - begin
        replays[size], pool = (captured.replays, captured.pool) if captured else (halves, None)
        captures += captured is not None
        reckoned = buffer_bytes(config, size, length, value_bytes)
        if len(samplers) == 1:
            reckoned += activation_bytes(config, size, length, value_bytes)
        results.row(
            "captures",
            B=size,
            captured="yes" if captured else "no",
            first_run_s=f"{first_s:.2f}",
            capture_s=f"{capture_s:.2f}",
            eager_ms=f"{1e3 * eager_s:.2f}",
            reserved_GiB=f"{reserved_gib(device):.2f}",
            more_GiB=f"{reserved_gib(device) - before:.2f}",
            by_memory_py_GiB=f"{reckoned / 2**30:.2f}",
        )
        if len(samplers) == 1 and captured:
            results.figure(f"{name} memory over memory.py", (reserved_gib(device) - before) * 2**30 / reckoned)
    worst = 0.0
    order = [(size, seed) for size in samplers for seed in seeds] * 2
    random.Random(0).shuffle(order)
    for size, seed in order:
        one = samplers[size]
        fill(one, seed)
        one.actions.fill_(torch.nan)  # a replay that does nothing must not look right
        for replay in replays[size]:
            replay()
        difference = float((one.actions - expected[size, seed]).abs().max() / expected[size, seed].abs().max())
        worst = max(worst, math.inf if math.isnan(difference) else difference)
    results.note(f"Shuffled replays: at most {worst:.1e} of the largest action away from the eager runs.")
    if not worst <= 0.02:
        results.problem(f"replays differ from eager runs by {worst:.1e} of the largest action")
    results.figure(f"{name} captures", captures)
    results.figure(f"{name} replay difference", worst)
    totals: dict[int, float] = {}
    for size in sorted(samplers):
        encode_s, denoise_s = (seconds(replay, device, options.repeats) for replay in replays[size])
        bound = {stage: of.bound_s(size, *rates, value_bytes) for stage, of in work.items()}
        total_s, bound_s = encode_s + denoise_s, sum(bound.values())
        results.row(
            "replays",
            B=size,
            encode_ms=f"{1e3 * encode_s:.2f}",
            denoise_ms=f"{1e3 * denoise_s:.2f}",
            bound_encode_ms=f"{1e3 * (bound['vision'] + bound['prefill']):.2f}",
            bound_denoise_ms=f"{1e3 * bound['denoise']:.2f}",
            time_over_bound=f"{total_s / bound_s:.2f}",
            observations_per_s=f"{size / total_s:.1f}",
        )
        totals[size] = total_s
        results.figure(f"{name} batch {size} over bound", total_s / bound_s)
    for size, total_s in totals.items():
        results.figure(f"{name} batch {size} over batch 1", total_s / totals[min(totals)])


def sampler_pi0(results: Results, options: Options) -> None:
    sampler(results, options, "pi0")


def sampler_pi05(results: Results, options: Options) -> None:
    sampler(results, options, "pi05")


@torch.no_grad()
def kernels(results: Results, options: Options) -> None:
    """The costliest kernels of the two halves of a sample, run eagerly: they are those that are captured."""
    device = resolve_device(options.device)
    model = random_model(MODELS[options.size]["pi0"], device, options.torch_dtype())
    for size in options.profiled_sizes():
        one = Sampler(model, size, PROMPT_TOKENS[options.size], options.denoise_steps, compiled=options.compile)
        fill(one, seed=1)
        for half in ("encode", "denoise"):
            report_kernels(results, f"{half}, batch {size}", getattr(one, half), device)


@torch.no_grad()
def triton_kernels(results: Results, options: Options) -> None:
    """`policy.kernels: triton` beside torch's kernels: how far each is from float32, and the time of each half."""
    if importlib.util.find_spec("triton") is None:
        raise ModuleNotFoundError(name="triton")
    device = resolve_device(options.device)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        results.note("Not measured: Triton's kernels need a GPU, or TRITON_INTERPRET=1 to rehearse them.")
        return
    for name in ("pi0", "pi05"):
        compare_precision(results, options, name, device)
    config = MODELS[options.size]["pi0"]
    if options.size == "toy":
        config = dataclasses.replace(config, depth=2, vision_depth=1)  # the interpreter takes its time
    model = random_model(config, device, options.torch_dtype())
    for size in options.profiled_sizes():
        times: dict[str, dict[str, float]] = {}
        for kernels in ("torch", "triton"):
            one = Sampler(model, size, PROMPT_TOKENS[options.size], options.denoise_steps, kernels=kernels)
            fill(one, seed=1)
            first_s = wall_seconds(one.run, device)
            captured = capture([one.encode, one.denoise], device, None, kernels, "policy.graphs", HIGH_PRIORITY)
            halves = captured.replays if captured else (one.encode, one.denoise)
            encode_s, denoise_s = (seconds(half, device, options.repeats) for half in halves)
            times[kernels] = {"encode": encode_s, "denoise": denoise_s}
            results.row(
                "a sample by kernels",
                B=size,
                kernels=kernels,
                captured="yes" if captured else "no",
                encode_ms=f"{1e3 * encode_s:.2f}",
                denoise_ms=f"{1e3 * denoise_s:.2f}",
                first_run_s=f"{first_s:.1f}",
            )
            if kernels == "triton":
                for half in ("encode", "denoise"):
                    report_kernels(results, f"{half}, batch {size}, Triton", getattr(one, half), device)
        for half, of_torch in times["torch"].items():
            results.figure(f"triton over torch, {half} at batch {size}", times["triton"][half] / of_torch)


def compare_precision(results: Results, options: Options, name: str, device: torch.device) -> None:
    """Two layers of full width, in float32 and bfloat16, with torch's kernels and with Triton's."""
    config = dataclasses.replace(MODELS[options.size][name], depth=2, vision_depth=2)
    actions: dict[str, Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(config, device, torch.bfloat16)  # the same numbers for both
        model = model.float() if dtype == torch.float32 else model
        for kernels in ("torch", "triton"):
            one = Sampler(model, 2, PROMPT_TOKENS[options.size], 2, kernels=kernels)
            fill(one, seed=1)
            one.run()
            actions[f"{kernels} {str(dtype).removeprefix('torch.')}"] = one.actions.double()
    exact = actions.pop("torch float32")
    distances = {way: float((found - exact).square().mean().sqrt()) for way, found in actions.items()}
    for way, distance in distances.items():
        results.row("distance from torch in float32", model=name, kernels=way, root_mean_square=f"{distance:.1e}")
    single, factor = distances["triton float32"], distances["triton bfloat16"] / distances["torch bfloat16"]
    results.figure(f"{name} triton float32 difference", single)
    results.figure(f"{name} triton bfloat16 factor", factor)
    if not (single <= 2e-5 and factor <= 1.1):
        results.problem(
            f"{name}: Triton's kernels are {single:.1e} off, in bfloat16 {factor:.2f} times as far as torch's"
        )


@torch.no_grad()
def attention(results: Results, options: Options) -> None:
    """`model.attend` as it is, and torch's backends over both layouts of the query heads."""
    device, dtype = resolve_device(options.device), options.torch_dtype()
    config, length = MODELS[options.size]["pi0"], PROMPT_TOKENS[options.size]
    prefix = config.cameras * config.image_tokens + length
    keys = prefix + config.state_tokens + config.action_horizon
    keys += -keys % 8
    for size in options.profiled_sizes():
        width = config.vision_width // config.vision_heads
        shape = size * config.cameras, config.vision_heads, config.image_tokens, width
        query, key, value = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        time_backends(results, options, f"vision, batch {size}", query, key, value, None, device)
        for stage, queries, visible in (("prefill", prefix, prefix), ("denoise", config.action_horizon, keys)):
            heads = torch.randn(size, queries, config.heads, config.head_dim, device=device).to(dtype)
            keys_values = torch.randn(size, 2, config.kv_heads, visible, config.head_dim, device=device).to(dtype)
            token_mask = torch.ones(size, length, dtype=torch.bool, device=device)
            token_mask[0, -3:] = False
            before = config.cameras * config.image_tokens
            mask = key_mask(token_mask, before, visible - prefix, dtype)
            run = lambda heads=heads, keys_values=keys_values, mask=mask: attend(heads, keys_values, mask)  # noqa: E731
            top = top_kernels(run, device)[0]
            results.row(
                "attention as it is",
                shape=f"{stage}, batch {size}",
                ms=f"{1e3 * seconds(run, device, options.repeats):.3f}",
                kernel=top[0][0][:90] if top else "none seen",
            )
            share = config.heads // config.kv_heads
            key, value = keys_values.unbind(1)
            folded = heads.transpose(1, 2).reshape(size, config.kv_heads, share * queries, config.head_dim)
            time_backends(results, options, f"{stage}, batch {size}, folded", folded, key, value, mask, device)
            if config.kv_heads == 1:
                key, value = (one.expand(-1, config.heads, -1, -1) for one in (key, value))
                name = f"{stage}, batch {size}, stride 0"
                time_backends(results, options, name, heads.transpose(1, 2), key, value, mask, device)


def time_backends(
    results: Results,
    options: Options,
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    device: torch.device,
) -> None:
    def run() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    cells: dict[str, str] = {}
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    chosen = SDPBackend(torch._fused_sdp_choice(query, key, value, attn_mask=mask))
    for column, backend in backends.items():
        try:
            with sdpa_kernel(backend):
                cells[f"{column}_ms"] = f"{1e3 * seconds(run, device, options.repeats):.3f}"
        except RuntimeError as error:
            cells[f"{column}_ms"] = "out of memory" if "out of memory" in str(error) else "refused"
    results.row("backends", shape=name, chosen=chosen.name.removesuffix("_ATTENTION").lower(), **cells)


def learner(results: Results, options: Options) -> None:
    """Updates by precision and batch size, captured; and what mirroring the ring costs."""
    from dsrl_async.config.load import read_yaml, validate
    from dsrl_async.plan.measure import fill_ring
    from dsrl_async.run.learner import learner as module
    from dsrl_async.run.learner.sampling import Mirror
    from dsrl_async.run.learner.updates import Updates

    rows, captures, worst = MIRRORED_ROWS[options.size], 0, 0.0
    settings = read_yaml(Path(options.config)) if options.config else {}
    sac = validate(settings).sac
    ring = fill_ring(sac, rows, sac.noise_width(HORIZON))
    device = resolve_device(options.device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    mirror = Mirror(ring, device)
    first_s = wall_seconds(mirror.refresh, device)
    if device.type == "cuda":
        results.figure("mirror bytes per row", (torch.cuda.memory_allocated(device) - before) / rows)
    results.row("mirror", what=f"first refresh, {rows} rows", ms=f"{1e3 * first_s:.2f}")
    again = []
    for _ in range(5):
        ring.head[:] += 1
        again.append(wall_seconds(mirror.refresh, device))
    results.row("mirror", what=f"refresh of one new row, {rows} rows", ms=f"{1e3 * statistics.median(again):.3f}")

    def prepare(precision: str, batch: int) -> tuple[Updates, Callable[[], None], Callable[[], None]]:
        """Captured updates, and one of them eagerly and replayed."""
        of_learner = {**settings.get("learner", {}), "precision": precision, "device": options.device}
        config = validate({**settings, "learner": of_learner})
        device = module.learner_device(config)
        updates = Updates(module.make_agent(config, HORIZON, device), mirror, batch)
        updates.capture()
        updates.random.draw_(updates.agent.generator)

        def eager() -> None:
            updates.whole(True)

        return updates, eager, updates.captured.replays[True] if updates.captured else eager

    times: dict[str, float] = {}
    for precision in ("ieee", "tf32", "bf16"):
        # Adam's first step makes a difference of any size of a gradient whose sign depends on the order of a sum.
        torch.backends.cudnn.deterministic = True
        updates, *both = prepare(precision, LEARNER_BATCHES[options.size][0])
        start, weights = updates.agent.state_tensors(), []
        for update in both:
            updates.agent.load_state_tensors(start)
            update()
            parts = updates.agent.actor.flat, updates.agent.critic.flat, updates.agent.target_critic.flat
            weights.append(torch.cat(parts))
        difference = float((weights[0] - weights[1]).abs().max())
        worst = max(worst, math.inf if math.isnan(difference) else difference)
        results.row("a replay against an eager update", precision=precision, max_difference=f"{difference:.1e}")
        torch.backends.cudnn.deterministic = False
        for batch in LEARNER_BATCHES[options.size]:
            updates, eager, replay = prepare(precision, batch)
            captures += updates.captured is not None

            def in_a_row(replay: Callable[[], None] = replay) -> None:
                for _ in range(20):
                    replay()

            row_s = seconds(in_a_row, device, max(1, options.repeats // 5)) / 20
            times[f"{precision} {batch}"] = row_s
            results.row(
                "updates",
                precision=precision,
                batch=batch,
                captured="yes" if updates.captured else "no",
                eager_ms=f"{1e3 * seconds(eager, device, min(5, options.repeats)):.3f}",
                replayed_ms=f"{1e3 * seconds(replay, device, options.repeats):.3f}",
                replayed_in_a_row_ms=f"{1e3 * row_s:.3f}",
            )
            if precision == "ieee" and batch == LEARNER_BATCHES[options.size][-1]:
                launches = report_kernels(results, f"update, batch {batch}", eager, device)
                if device.type == "cuda":  # on the CPU, operators were counted
                    results.figure("kernels of an update", launches)
    largest = LEARNER_BATCHES[options.size][-1]
    results.figure("update tf32 over ieee", times[f"tf32 {largest}"] / times[f"ieee {largest}"])
    results.figure("learner captures", captures)
    results.figure("update difference", worst)


def copies(results: Results, options: Options) -> None:
    """16 observations up to the device: from pageable, page-locked and registered memory, by row and at once."""
    from dsrl_async.run.inference.copies import Copies, prepare_uploads
    from dsrl_async.shm.counters import Uploads

    device = resolve_device(options.device)
    count = 16
    shapes = {"images": (2, 224, 224, 3), "sac_image": (64, 64, 3), "state": (8,), "standard_normal": (HORIZON * 32,)}
    dtypes = {"images": "uint8", "sac_image": "uint8", "state": "float32", "standard_normal": "float32"}
    arena = Arena.create({f"slot/{name}": ((count, *shape), dtypes[name]) for name, shape in shapes.items()})
    host = {name: torch.from_numpy(arena[f"slot/{name}"]) for name in shapes}
    rng = np.random.default_rng(0)
    for rows in host.values():
        rows.numpy()[...] = rng.integers(0, 100, rows.shape)
    buffers = {name: torch.zeros_like(rows, device=device) for name, rows in host.items()}
    size = sum(rows.numel() * rows.element_size() for rows in host.values())
    locked = {name: rows.pin_memory() for name, rows in host.items()} if device.type == "cuda" else host

    def by_row(source: dict[str, Tensor]) -> None:
        for name, rows in source.items():
            for index in range(count):
                buffers[name][index].copy_(rows[index], non_blocking=True)

    def at_once(source: dict[str, Tensor]) -> None:
        for name, rows in source.items():
            buffers[name].copy_(rows, non_blocking=True)

    rate: dict[str, float] = {}

    def measure(memory: str, ways: dict[str, Callable[[], None]]) -> None:
        for how, copy in ways.items():
            copy()
            enqueued, done = [], []
            for _ in range(options.repeats):
                synchronize(device)
                begin = time.perf_counter()
                copy()
                enqueued.append(time.perf_counter() - begin)
                synchronize(device)
                done.append(time.perf_counter() - begin)
            taken = statistics.median(done)
            rate[f"{memory}, {how}"] = size / taken
            results.row(
                "copies up",
                memory=memory,
                how=how,
                host_ms=f"{1e3 * statistics.median(enqueued):.3f}",
                done_ms=f"{1e3 * taken:.3f}",
                GB_per_s=f"{size / taken / 1e9:.1f}",
            )

    def both(source: dict[str, Tensor]) -> dict[str, Callable[[], None]]:
        return {"64 rows": lambda: by_row(source), "4 buffers": lambda: at_once(source)}

    measure("pageable", both(host))
    measure("page-locked", both(locked))
    way = prepare_uploads(arena, device)
    if way.reason:
        results.note(f"Observations would go up row by row: {way.reason}.")
    if way.gather is not None:
        batch: Any = SimpleNamespace(inputs=buffers, outputs=torch.zeros(count, 1, device=device))
        policies: Any = SimpleNamespace(steered_batches={(count, 0): batch}, device=device)
        copier = Copies(arena, policies, way)
        for buffer in buffers.values():
            buffer.zero_()
        measure("registered", {"one launch": lambda: copier.up((count, 0), np.arange(count))})
        synchronize(device)
        wrong = [name for name, rows in host.items() if not torch.equal(buffers[name].cpu(), rows)]
        if wrong:
            results.problem(f"the kernel does not gather what numpy does: {', '.join(wrong)}")
    if way.uploads >= Uploads.PAGE_LOCKED:
        measure("registered", both(host))
        if way.gather is not None:
            results.figure("one launch over 64 copies", rate["registered, 64 rows"] / rate["registered, one launch"])
        results.figure("registered over page-locked", rate["registered, 4 buffers"] / rate["page-locked, 4 buffers"])
    else:
        results.note("The shared memory could not be registered with CUDA; the log of this section says why.")


def launches(results: Results, options: Options) -> None:
    """What launching a graph costs the host, and what a small kernel costs in one."""
    device = resolve_device(options.device)
    x = torch.zeros(64, device=device)
    device_s: dict[int, float] = {}
    for count in (1, 100, 1000):

        def small(count: int = count) -> None:
            for _ in range(count):
                x.add_(1)

        captured = capture([small], device, None, f"{count} small kernels", "policy.graphs")
        replay = captured.replays[0] if captured else small
        device_s[count] = seconds(replay, device, options.repeats)
        enqueued = []
        for _ in range(options.repeats):
            synchronize(device)
            begin = time.perf_counter()
            replay()
            enqueued.append(time.perf_counter() - begin)
        results.row(
            "graphs of small kernels",
            kernels=count,
            captured="yes" if captured else "no",
            host_us=f"{1e6 * statistics.median(enqueued):.1f}",
            device_us=f"{1e6 * device_s[count]:.1f}",
            eager_device_us=f"{1e6 * seconds(small, device, options.repeats):.1f}",
        )
    if device.type == "cuda":
        results.figure("us per kernel in a graph", 1e6 * (device_s[1000] - device_s[100]) / 900)


def fallback(results: Results, options: Options) -> None:
    """A capture that must fail: it says why, leaves the stream, and the next process would run without graphs."""
    from dsrl_async.shm.counters import Graphs

    device = resolve_device(options.device)
    x = torch.ones(8, device=device)

    def waits() -> None:
        x.add_(float(x.sum()))

    state = np.zeros(1, np.int64)
    before = torch.cuda.current_stream(device) if device.type == "cuda" else None
    try:
        with graphs_of("auto", device, state) as wanted:
            if wanted:
                capture([waits], device, None, "a planted failure", "policy.graphs")
                results.problem("a function that waits for the device was captured")
    except CaptureError as error:
        results.note(f"What it says: {error}")
    if device.type != "cuda":
        results.note("Nothing is captured on the CPU, so nothing can fail.")
        return
    with graphs_of("auto", device, state) as wanted:
        left = torch.cuda.current_stream(device) == before
        results.row(
            "after a planted failure",
            state=Graphs(int(state[0])).name,
            stream_restored="yes" if left else "no",
            next_process_captures="yes" if wanted else "no",
        )
    results.figure("fallback works", float(left and not wanted))
    if not left or wanted:
        results.problem("a failed capture left something behind")
    os._exit(
        0
    )  # as after `CaptureError` a process must end, and torch may find its allocator in the middle of a capture


@contextlib.contextmanager
def serving(options: Options, model: str, state_in_prompt: bool, results: Results) -> Iterator[tuple[Any, Any]]:
    """A real `InferenceServer` over a real `load_policies`, with random weights in the place of a checkpoint's."""
    from tokenizers import Tokenizer

    from dsrl_async.config.load import validate
    from dsrl_async.envs import EnvironmentSpec
    from dsrl_async.pi0.checkpoint import LoadedPolicy
    from dsrl_async.pi0.policy import Pi0Policy
    from dsrl_async.pi0.processing import Normaliser, PromptTokenizer
    from dsrl_async.pi0.synthetic import random_norm_stats, write_tokenizer
    from dsrl_async.run.inference import policies as module
    from dsrl_async.run.inference.server import InferenceServer
    from dsrl_async.shm.counters import Counters, NoiseMode, Uploads
    from dsrl_async.shm.memory import create_memory

    device = resolve_device(options.device)
    pi0 = dataclasses.replace(MODELS[options.size][model], state_in_prompt=state_in_prompt, vocab_size=257152)
    if options.size == "toy":
        pi0 = dataclasses.replace(pi0, vocab_size=128, max_token_len=96)
    actors = max(options.batch_sizes)
    config = validate(
        {
            "device": options.device,
            "actors": actors,
            "inference": {"buckets": sorted(options.batch_sizes)},
            "policy": {"denoise_steps": options.denoise_steps, "compile": options.compile},
            "replay": {"capacity": 64 * actors, "warmup_decisions": 16},
            "sac": {"batch_size": 16},
        }
    )
    spec = EnvironmentSpec(pi0.cameras, pi0.image_size, pi0.robot_state_dim, pi0.robot_action_dim, ("pick it up",))
    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(Path(directory) / "tokenizer.json")
        tokenizer = PromptTokenizer(Tokenizer.from_file(f"{directory}/tokenizer.json"), pi0.max_token_len)
    normaliser = Normaliser(pi0, random_norm_stats(pi0, 0)).to(device)
    loaded = LoadedPolicy(pi0, random_model(pi0, device, options.torch_dtype()), normaliser, tokenizer)
    arena = create_memory(config, spec, pi0.action_horizon)
    original = module.load_frozen_policy
    module.load_frozen_policy = lambda config, record, device, prompts, progress: Pi0Policy(
        loaded, prompts, config.policy.denoise_steps, config.policy.compile
    )
    try:
        begin = time.perf_counter()
        policies = module.load_policies(config, spec, device, None, Counters(arena))  # type: ignore[arg-type]
        synchronize(device)
        results.note(
            f"`load_policies` without reading weights: {time.perf_counter() - begin:.1f} s, "
            f"{reserved_gib(device):.2f} GiB reserved, sizes and prompt lengths {sorted(policies.steered_batches)}."
        )
    finally:
        module.load_frozen_policy = original
    server = InferenceServer(config, arena, policies, lambda lanes: None, NoiseMode.STOCHASTIC)
    results.note(f"Observations go up: {Uploads(int(server.counters.inference_uploads[0])).name.lower()}.")
    yield server, policies


def serve(results: Results, options: Options, model: str, state_in_prompt: bool) -> None:
    rng = np.random.default_rng(0)
    with serving(options, model, state_in_prompt, results) as (server, policies):
        slots, device = server.slots, policies.device
        for name in ("images", "sac_image"):
            getattr(slots, name)[:] = rng.integers(0, 256, getattr(slots, name).shape, dtype=np.uint8)
        for name in ("state", "standard_normal"):
            getattr(slots, name)[:] = rng.standard_normal(getattr(slots, name).shape)
        captured = {size for (size, _), policy in policies.steered_batches.items() if policy.captured}
        number = 0
        for size in sorted(options.batch_sizes):
            times = []
            for _ in range(3 * options.repeats + 1):
                number += 1
                for lane in range(size):
                    slots.request(lane, 1, number)
                begin = time.perf_counter()
                answered = server.serve_ready(slots.ready())
                times.append(time.perf_counter() - begin)
                assert answered == size, f"{answered} of {size} requests were answered"
            if not np.isfinite(slots.action_chunk[:size]).all():
                results.problem(f"batch {size}: the robot would get numbers that are not finite")
            policy = next(one for (rows, _), one in policies.steered_batches.items() if rows == size)
            run_s, batch_s = seconds(policy.run, device, options.repeats), statistics.median(times[1:])
            p99 = float(np.percentile(times[1:], 99))
            results.row(
                "batches",
                B=size,
                captured="yes" if size in captured else "no",
                batch_p50_ms=f"{1e3 * batch_s:.2f}",
                batch_p99_ms=f"{1e3 * p99:.2f}",
                device_ms=f"{1e3 * run_s:.2f}",
                gap_ms=f"{1e3 * (batch_s - run_s):.2f}",
                gap_share=f"{(batch_s - run_s) / batch_s:.1%}",
                observations_per_s=f"{size / batch_s:.1f}",
            )
            results.figure(f"{model} gap share at batch {size}", (batch_s - run_s) / batch_s)
        results.figure(f"{model} server captures", len(captured))
        results.figure(f"{model} served", 1.0)


def serve_pi0(results: Results, options: Options) -> None:
    serve(results, options, "pi0", state_in_prompt=False)


def serve_pi05(results: Results, options: Options) -> None:
    serve(results, options, "pi05", state_in_prompt=True)


@torch.no_grad()
def sharing(results: Results, options: Options, how: str = "") -> None:
    """The policy's batches alone, and while another process on the same device learns as fast as it can.

    `how` is behind the names of what is measured.
    """
    importlib.import_module("pydantic")  # the other process needs it
    device = resolve_device(options.device)
    model = random_model(MODELS[options.size]["pi0"], device, options.torch_dtype())
    one = Sampler(model, options.profiled_sizes()[-1], PROMPT_TOKENS[options.size], options.denoise_steps)
    fill(one, seed=1)
    halves = [one.encode, one.denoise]
    captured = capture(halves, device, None, "the policy beside a learner", "policy.graphs", HIGH_PRIORITY)
    replays = captured.replays if captured else halves

    def batches() -> list[float]:
        times: list[float] = []
        until = time.perf_counter() + SHARED_S[options.size]
        while time.perf_counter() < until or len(times) < 3:
            times.append(wall_seconds(lambda: [replay() for replay in replays], device))
        return times

    def note(situation: str, times: list[float]) -> float:
        p50, p99 = (1e3 * float(np.percentile(times, percent)) for percent in (50, 99))
        results.row("one GPU", situation=situation + how, batches=len(times), p50_ms=f"{p50:.2f}", p99_ms=f"{p99:.2f}")
        return p50

    batches()  # warm
    alone = note(f"policy alone, batch {one.batch_size}", batches())
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "updates"
        command = [sys.executable, __file__, "learner_load", json.dumps(dataclasses.asdict(options)), str(path)]
        environment = os.environ | {"CUDA_MPS_CLIENT_PRIORITY": "1"}
        other = subprocess.Popen(command, env=environment)
        try:
            while not path.exists():
                if other.poll() is not None:
                    raise RuntimeError(f"the learner's process ended with status {other.returncode}")
                time.sleep(0.05)
            count = int(path.read_text().split()[-1])
            beside, begin = batches(), time.perf_counter() - SHARED_S[options.size]
            updates_per_s = (int(path.read_text().split()[-1]) - count) / (time.perf_counter() - begin)
        finally:
            other.kill()
            other.wait()
    with_learner = note("policy beside a learner", beside)
    results.note(f"The learner did {updates_per_s:.0f} updates a second beside the policy.")
    results.figure(f"batch beside a learner over alone{how}", with_learner / alone)


def mps(results: Results, options: Options) -> None:
    """`sharing` under NVIDIA's Multi-Process Service, of which it starts one of its own, and ends it."""
    program = shutil.which("nvidia-cuda-mps-control")
    if program is None or not options.device.startswith("cuda"):
        why = "there is no nvidia-cuda-mps-control" if program is None else "it is NVIDIA's"
        results.note(f"Not measured: MPS is not there ({why}).")
        return
    with tempfile.TemporaryDirectory(prefix="dsrl_async-mps-") as directory:
        # before CUDA is asked for anything, which reads them then
        os.environ.update(CUDA_MPS_PIPE_DIRECTORY=directory, CUDA_MPS_LOG_DIRECTORY=directory)
        control = subprocess.Popen([program, "-f"])  # in the foreground, so that it ends with this section
        try:
            until = time.monotonic() + MPS_START_S
            while not Path(directory, "control").exists():
                if control.poll() is not None or time.monotonic() > until:
                    results.note(f"Not measured: MPS did not start (status {control.poll()}); the log says more.")
                    return
                time.sleep(0.05)
            sharing(results, options, ", with MPS")
        finally:
            control.terminate()
            control.wait(MPS_START_S)


def learner_load(results_path: Path, options: Options) -> None:
    """The other process of `sharing`: updates without end; it notes how many it has done."""
    from dsrl_async.config.load import validate
    from dsrl_async.plan.measure import fill_ring
    from dsrl_async.run.learner.sampling import source_for
    from dsrl_async.run.learner.updates import Updates
    from dsrl_async.sac.agent import SacAgent

    device, sac = resolve_device(options.device), validate({}).sac
    source = source_for(fill_ring(sac, MIRRORED_ROWS["toy"], sac.noise_width(HORIZON)), device)
    updates = Updates(SacAgent(sac, HORIZON, device), source, LEARNER_BATCHES[options.size][-1])
    source.refresh()
    updates.capture()
    for count in itertools.count(1):
        updates.draw_batch()
        updates.run()
        if count % 10 == 0:
            synchronize(device)
            temporary = results_path.with_suffix(".new")
            temporary.write_text(f"{count}\n")
            temporary.replace(results_path)


def write_checkpoint(directory: Path, config: Pi0Config) -> None:
    """A checkpoint of this project's layout, of the same few million random numbers again and again, for speed."""
    from dsrl_async.pi0 import synthetic
    from dsrl_async.pi0.config import CONFIG, NORM_STATS, TOKENIZER, WEIGHTS
    from dsrl_async.pi0.files import save_norm_stats
    from dsrl_async.pi0.tensors import Part, model_tensors

    normal = np.random.default_rng(0).standard_normal(synthetic.CHUNK, dtype=np.float32)

    def repeated(part: Part, seed: int) -> Iterator[np.ndarray]:
        mean, spread = synthetic.moments(part)
        piece = ((normal * np.float32(spread) + np.float32(mean)).view(np.uint32) >> 16).astype(np.uint16)
        for left in range(math.prod(part.shape), 0, -synthetic.CHUNK):
            yield piece[:left]

    parts = [part for rows in model_tensors(config).values() for part in rows]
    synthetic.write_tensors(directory / WEIGHTS, parts, "", 0, {}, repeated)
    config.save(directory / CONFIG)
    save_norm_stats(synthetic.random_norm_stats(config, 0), directory / NORM_STATS)
    synthetic.write_tokenizer(directory / TOKENIZER)


def waits_of_workers(arena: Arena, since_s: float) -> list[float]:
    """Seconds from each worker's observation to its answer, of those that were begun after `since_s` and are kept."""
    from dsrl_async.shm.counters import ACTOR_PHASES
    from dsrl_async.shm.spans import newest_spans

    waits: list[float] = []
    for lane in range(len(arena["span/actor"])):
        name, start, end, step = newest_spans(arena, "actor", lane).T
        of_answers = (name == ACTOR_PHASES.index("wait_action")) & (start > since_s * 1e9)
        for one in np.unique(step[of_answers]):  # a wait is looked after now and then, so that it may have parts
            waits.append(float((end - start)[of_answers & (step == one)].sum()) * 1e-9)
    return waits


def end_to_end(results: Results, options: Options) -> None:
    """A run's own processes with a full-size checkpoint, which the kernel has in its page cache, as it was just
    written; only the environments are simulated."""
    from dsrl_async.bench.simulated.environment import CHUNK, SPEC
    from dsrl_async.config.load import to_yaml, validate
    from dsrl_async.envs import environment_record
    from dsrl_async.host.files import write_text
    from dsrl_async.host.processes import Program
    from dsrl_async.host.signals import StopRequest
    from dsrl_async.pi0.files import find_policy
    from dsrl_async.plan.simulation import EnvironmentTimes
    from dsrl_async.policies.pi0 import pi0_record
    from dsrl_async.run.preflight import CheckedRun
    from dsrl_async.run.supervisor.child import Kind
    from dsrl_async.run.supervisor.session import Session
    from dsrl_async.run.supervisor.supervisor import PROGRAMS, Supervisor
    from dsrl_async.shm.counters import INFERENCE_PHASES
    from dsrl_async.telemetry.console import NoDisplay

    pi0 = MODELS[options.size]["pi0"]
    if options.size == "toy":
        pi0 = dataclasses.replace(pi0, image_size=224, patch_size=56, vocab_size=128, max_token_len=48)
    workers = max(options.batch_sizes)
    times = EnvironmentTimes(0.060, 0.3, 0.6, 1 / 25)
    with tempfile.TemporaryDirectory(prefix="dsrl_async-") as directory:
        run_dir, policy = Path(directory) / "run", Path(directory) / "policy"
        (run_dir / "logs").mkdir(parents=True)
        policy.mkdir()
        begin = time.perf_counter()
        write_checkpoint(policy, pi0)
        results.note(f"The checkpoint was written in {time.perf_counter() - begin:.1f} s.")
        config = validate(
            {
                "device": options.device,
                "actors": workers,
                "env": {"chunk": CHUNK},
                "policy": {
                    "checkpoint": str(policy),
                    "denoise_steps": options.denoise_steps,
                    "compile": options.compile,
                    "dtype": options.dtype,
                },
                "inference": {"buckets": sorted(options.batch_sizes)},
                "replay": {"capacity": max(64 * workers, 1000), "warmup_decisions": 64},
                "sac": {"batch_size": 64},
                "throttle_actors": False,
                "profile": True,  # it notes how long each worker waits for each answer
            }
        )
        write_text(run_dir / "config.yaml", to_yaml(config))
        stop = StopRequest()
        run = CheckedRun(config, environment_record(config.env.model_dump()), SPEC, pi0_record(find_policy(policy)))
        session = Session(run, run_dir, stop, NoDisplay())
        asleep = {"times": dataclasses.asdict(times), "image_size": SPEC.image_size}
        sleeping = Program("dsrl_async.bench.simulated.environment", asleep)
        supervisor = Supervisor(session, {**PROGRAMS, Kind.WORKER: sleeping})
        counters, moments = session.counters, list[tuple[float, dict[str, np.ndarray]]]()
        answers_s: list[float] = []
        begin = time.perf_counter()

        def watch() -> None:
            prepared = counters.inference_prepared
            steps: dict[str, Callable[[], bool]] = {
                "weights read and buffers made": lambda: bool(prepared[1] > 0),
                "every batch size and prompt length ready": lambda: bool(prepared[0] == prepared[1] > 0),
                f"all {workers} workers at work": lambda: bool(counters.actor_decisions.min() > 0),
            }
            for what, there in steps.items():
                while not there() and stop.reason is None:
                    time.sleep(0.02)
                results.row("the start of a run", what=what, s_after_the_start=f"{time.perf_counter() - begin:.2f}")
            for pause in (SHARED_S[options.size], 2 * SHARED_S[options.size]):
                time.sleep(pause)
                moments.append((time.perf_counter(), counters.snapshot()))
            answers_s.extend(waits_of_workers(session.arena, time.monotonic() - 2 * SHARED_S[options.size]))
            stop.reason = stop.reason or "measured"

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        summary = supervisor.run()
        ended, stop.reason = stop.reason, stop.reason or summary["exit_reason"]
        watcher.join()
        if ended != "measured":
            for log in sorted((run_dir / "logs").glob("*.log")):
                print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-15:], sep="\n")
            raise RuntimeError(f"the run ended: {summary['exit_reason']}")
    (start, before), (end, after) = moments
    taken = end - start

    def change(name: str) -> float:
        return float((after[name] - before[name]).sum())

    results.row(
        "a run with simulated environments",
        workers=workers,
        seconds=f"{taken:.1f}",
        decisions_per_s=f"{change('actor_decisions') / taken:.1f}",
        updates_per_s=f"{change('learner_updates') / taken:.1f}",
        rows_per_batch=f"{change('inference_rows') / max(1.0, change('inference_batches')):.1f}",
        fill=f"{change('inference_rows') / max(1.0, change('inference_padded_rows')):.2f}",
        queue_wait_ms=f"{1e3 * change('inference_queue_wait_s') / max(1.0, change('inference_rows')):.1f}",
        answer_p50_ms=f"{1e3 * float(np.percentile(answers_s, 50)):.1f}",
        answer_p99_ms=f"{1e3 * float(np.percentile(answers_s, 99)):.1f}",
    )
    shares = (after["inference_phase_s"] - before["inference_phase_s"]) / taken
    for phase, share in zip(INFERENCE_PHASES, shares.tolist(), strict=True):
        results.row("time of the inference process", phase=phase, share=f"{share:.1%}")
    states = summary["cuda_graphs"]
    results.note(f"CUDA graphs by the summary: {states}.")
    results.figure("run captures", float(list(states.values()).count("captured")))
    results.figure("run decisions", change("actor_decisions"))


SECTIONS: dict[str, Callable[[Results, Options], None]] = {
    "machine": machine,
    "tests": gpu_tests,
    "goldens": goldens,
    "sampler_pi0": sampler_pi0,
    "sampler_pi05": sampler_pi05,
    "launches": launches,
    "attention": attention,
    "kernels": kernels,
    "triton": triton_kernels,
    "learner": learner,
    "copies": copies,
    "serve_pi0": serve_pi0,
    "serve_pi05": serve_pi05,
    "sharing": sharing,
    "mps": mps,
    "end_to_end": end_to_end,
    "fallback": fallback,
}


def main(name: str, options_json: str, path: str) -> None:
    options = Options(**json.loads(options_json))
    torch.manual_seed(0)
    if options.device == "cpu":
        torch.set_num_threads(1)  # a rehearsal is not to take the cores from others
    if name == "learner_load":
        learner_load(Path(path), options)
        return
    results = Results(name, Path(path))
    try:
        SECTIONS[name](results, options)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("dsrl_async"):
            raise
        results.note(f"Not measured: this needs the package `{error.name.partition('.')[0]}`, which is not installed.")
        sys.exit(MISSING)


if __name__ == "__main__":
    main(*sys.argv[1:])
