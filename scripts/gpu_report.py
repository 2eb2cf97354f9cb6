"""Runs every check that needs a GPU, times the sampler and the learner's update, and writes a report.

    python scripts/gpu_report.py --out gpu_report.md

The weights are random (the time does not depend on them) and of real size. For each batch size and prompt length, the
report has the largest difference between the captured and the eager run, milliseconds of both halves (median of CUDA
events), the bound of `dsrl_async/pi0/roofline.py` for the device's measured peak rates, and their ratio. For the
learner, with the `sac` settings of `--config` and a mirrored replay ring, it has the largest difference of the weights
after a captured and an eager update, milliseconds of an update run eagerly, replayed alone, and replayed many times in
a row without reading the results, and milliseconds per row of mirroring. `--device cpu --size toy` tests the same code
without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dsrl_async.config.load import read_yaml, validate
from dsrl_async.config.settings import SacConfig
from dsrl_async.host.graphs import capture
from dsrl_async.pi0.config import Pi0Config, tabletop_config
from dsrl_async.pi0.model import Pi0
from dsrl_async.pi0.roofline import stages
from dsrl_async.pi0.sampler import Sampler
from dsrl_async.plan.measure import fill_ring
from dsrl_async.run.learner.sampling import Mirror
from dsrl_async.run.learner.updates import Updates
from dsrl_async.sac.agent import SacAgent

MODELS = {
    "full": {"pi0": Pi0Config(), "pi0.5": Pi0Config(pi05=True, action_horizon=10, max_token_len=200)},
    "toy": {"pi0": tabletop_config(), "pi0.5": dataclasses.replace(tabletop_config(), pi05=True)},
}
PROMPTS = {"full": (16, 24, 48), "toy": (8, 12)}
HORIZON = 50


def seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call on the device."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def peak_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Measured FLOP/s of a large matrix product and bytes/s of a large copy (read and write)."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    big = torch.empty(2**30 if device.type == "cuda" else 2**25, dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    for _ in range(3):
        a @ b
        other.copy_(big)
    return 2 * size**3 / seconds(lambda: a @ b, device, 20), 2 * big.numel() / seconds(
        lambda: other.copy_(big), device, 20
    )


def fill(sampler: Sampler, seed: int) -> None:
    generator = torch.Generator(sampler.noise.device).manual_seed(seed)
    sampler.images.uniform_(-1, 1, generator=generator)
    sampler.tokens.random_(0, sampler.model.config.vocab_size, generator=generator)
    sampler.token_mask.fill_(True)
    sampler.state.normal_(generator=generator)
    sampler.noise.normal_(generator=generator)


def measure(
    model: Pi0, batch_size: int, length: int, args: argparse.Namespace, rates: tuple[float, float]
) -> list[object]:
    """A row of the table."""
    device = model.action_out.weight.device
    sampler = Sampler(model, batch_size, length, args.denoise_steps, compiled=args.compile)
    fill(sampler, seed=1)
    halves = [sampler.encode, sampler.denoise]
    captured = capture(halves, device, None, f"batch size {batch_size}, prompts of {length} tokens", "policy.graphs")
    replays = captured.replays if captured else halves
    fill(sampler, seed=2)
    sampler.run()
    eager = sampler.actions.clone()
    sampler.actions.fill_(torch.nan)  # a replay that does nothing must not look right
    for replay in replays:
        replay()
    difference = float((sampler.actions - eager).abs().max())
    eager_s = seconds(sampler.run, device, args.repeats)
    encode_s, denoise_s = (seconds(replay, device, args.repeats) for replay in replays)
    work = stages(model.config, length, args.denoise_steps)
    weight_bytes = torch.finfo(model.dtype).bits // 8
    bound = {name: stage.bound_s(batch_size, *rates, weight_bytes) for name, stage in work.items()}
    bound_s = sum(bound.values())
    replay_s = encode_s + denoise_s
    return [
        *(batch_size, length, "yes" if captured else "no", f"{difference:.1e}"),
        *(f"{1e3 * value:.2f}" for value in (eager_s, encode_s, denoise_s)),
        *(f"{1e3 * value:.2f}" for value in (bound["vision"] + bound["prefill"], bound["denoise"])),
        *(f"{replay_s / bound_s:.2f}", f"{batch_size / replay_s:.1f}"),
    ]


COLUMNS = (
    *("B", "prompt", "captured", "max difference", "eager ms", "encode ms", "denoise ms"),
    *("bound encode ms", "bound denoise ms", "time / bound", "observations/s"),
)
LEARNER_COLUMNS = (
    *("batch", "captured", "max difference", "eager ms", "replayed ms"),
    *("replayed in a row ms", "mirroring ms per row"),
)
LEARNER_BATCHES = {"full": (64, 256, 512), "toy": (8,)}
RING_ROWS = {"full": 20_000, "toy": 40}
IN_A_ROW = 20


def measure_learner(sac: SacConfig, batch_size: int, args: argparse.Namespace) -> list[object]:
    """A row of the learner's table."""
    device, rows = torch.device(args.device), RING_ROWS[args.size]
    source = Mirror(fill_ring(sac, rows, sac.noise_width(HORIZON)), device)
    begin = time.perf_counter()
    source.refresh()
    float(source.columns.reward.sum())  # waits for the device
    mirroring_s = time.perf_counter() - begin
    updates = Updates(SacAgent(sac, HORIZON, device), source, batch_size)
    updates.capture()
    captured = updates.captured
    updates.random.draw_(updates.agent.generator)
    before = updates.agent.state_tensors()

    def eager() -> None:
        updates.whole(True)

    def replay() -> None:
        if captured is None:
            eager()
        else:
            captured.replays[True]()

    def replay_in_a_row() -> None:
        for _ in range(IN_A_ROW):
            replay()

    weights = []
    for update in (eager, replay):
        updates.agent.load_state_tensors(before)
        update()
        weights.append(
            torch.cat([updates.agent.actor.flat, updates.agent.critic.flat, updates.agent.target_critic.flat])
        )
    eager_s = seconds(eager, device, args.repeats)
    replay_s = seconds(replay, device, args.repeats)
    in_a_row_s = seconds(replay_in_a_row, device, args.repeats) / IN_A_ROW
    return [
        *(batch_size, "yes" if captured else "no", f"{float((weights[0] - weights[1]).abs().max()):.1e}"),
        *(f"{1e3 * value:.3f}" for value in (eager_s, replay_s, in_a_row_s)),
        f"{1e3 * mirroring_s / rows:.5f}",
    ]


def table(rows: list[list[object]], columns: Sequence[str] = COLUMNS) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def report(args: argparse.Namespace) -> tuple[str, bool]:
    """The report in Markdown, and whether the tests passed and every difference is a number."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    rates = peak_rates(device, dtype)
    lines = [
        f"# Sampler and learner on {name}",
        "",
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, {args.dtype}, {args.denoise_steps} steps, "
        f"{'compiled' if args.compile else 'not compiled'}. Measured peaks: {rates[0] / 1e12:.1f} TFLOP/s, "
        f"{rates[1] / 1e9:.0f} GB/s.",
        "",
    ]
    good = True
    if args.tests:
        root = Path(__file__).resolve().parent.parent
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
        tests = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        good = tests.returncode == 0
        lines += [
            f"## Tests marked gpu: {'passed' if good else 'FAILED'}",
            "",
            "```",
            *tests.stdout.strip().splitlines()[-15:],
            "```",
            "",
        ]
    for variant, config in MODELS[args.size].items():
        with torch.device(device):
            model = Pi0(config).set_dtype(dtype).eval().requires_grad_(False)
        rows = []
        for batch_size in args.batch_sizes:
            for length in PROMPTS[args.size]:
                rows.append(measure(model, batch_size, length, args, rates))
                good = good and rows[-1][3] != "nan"
                print(variant, *rows[-1], file=sys.stderr)
        lines += [f"## {variant}, {args.size} size", "", *table(rows), ""]
        if device.type == "cuda":
            lines += [f"Peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB.", ""]
            torch.cuda.reset_peak_memory_stats(device)
        del model
    sac = validate(read_yaml(args.config)).sac if args.config else SacConfig()
    rows = [measure_learner(sac, batch_size, args) for batch_size in LEARNER_BATCHES[args.size]]
    good = good and all(row[2] != "nan" for row in rows)
    lines += ["## An update of the learner", "", *table(rows, LEARNER_COLUMNS), ""]
    return "\n".join(lines), good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=sorted(MODELS), default="full")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--denoise-steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--config", type=Path, help="configuration with the learner's `sac` (default: the tabletop's)")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="skip the tests marked gpu")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --device cpu --size toy tries the script without one")
    torch.manual_seed(0)
    text, good = report(args)
    args.out.write_text(text)
    print(args.out)
    if not good:
        parser.exit(1, "something failed, see the report\n")


if __name__ == "__main__":
    main()
