"""What a GPU can hold and how fast it can be, on paper: the Markdown tables of docs/gpu.md.

    python scripts/studies/gpu_on_paper.py

The first table is the memory of a run, as it is checked before a start (`dsrl_async.run.preflight.gpu_memory` says what
is counted), the second the workers that fit on a card, the third the least time of a batch (`dsrl_async.pi0.roofline`
with the data sheets of `dsrl_async.plan.gpus`).
"""

from __future__ import annotations

import argparse
import bisect
import sys

from dsrl_async.config.load import validate
from dsrl_async.host.command import guard
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.roofline import stages
from dsrl_async.plan.gpus import GPUS, SUSTAINED
from dsrl_async.policies.pi0 import pi0_needs
from dsrl_async.run.preflight.gpu_memory import GpuNeed, gpu_needs

POLICIES = {
    "Pi0, bfloat16": (Pi0Config(), "bfloat16"),
    "Pi0.5, bfloat16": (Pi0Config(pi05=True, action_horizon=10, max_token_len=200), "bfloat16"),
    "Pi0, float32": (Pi0Config(), "float32"),
}
CARDS = (24, 48, 80)
"""GB as they are sold."""
CONTEXT_BYTES = 1 << 29
"""Assumed for the first CUDA context, which a check before a start finds in the memory that is not free."""
WORKERS = BATCH_SIZES = (1, 8, 16, 32)
MOST = 256


def need(policy: Pi0Config, dtype: str, workers: int, args: argparse.Namespace) -> GpuNeed:
    """What a run takes of its only GPU."""
    config = validate(
        {
            "device": "cuda",
            "actors": workers,
            "policy": {"dtype": dtype},
            "replay": {"capacity": args.replay_rows},
            "sac": {"batch_size": args.batch_size},
        }
    )
    lengths = [args.prompt_tokens + 8 * number for number in range(args.prompt_lengths)]
    (found,) = gpu_needs(config, pi0_needs(policy), lengths).values()
    return found


def least_ms(gpu: str, batch_size: int, prompt_tokens: int) -> float:
    """Bound of a batch of Pi0 in bfloat16 with ten steps, in milliseconds."""
    tera_flops, tera_bytes = GPUS[gpu]
    work = stages(Pi0Config(), prompt_tokens, denoise_steps=10).values()
    return 1e3 * sum(stage.bound_s(batch_size, SUSTAINED * tera_flops * 1e12, tera_bytes * 1e12) for stage in work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=24, help="of the shortest prompts (default: 24)")
    parser.add_argument("--prompt-lengths", type=int, default=2, help="different ones, in steps of 8 (default: 2)")
    parser.add_argument("--replay-rows", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=256, help="of the learner (default: 256)")
    args = parser.parse_args()
    needs = {
        (name, workers): need(policy, dtype, workers, args)
        for name, (policy, dtype) in POLICIES.items()
        for workers in WORKERS
    }
    columns = [part for part in GpuNeed._fields if any(getattr(found, part) for found in needs.values())]
    print(f"| GiB | workers | {' | '.join(columns)} | total |")
    print("|---|---|" + "---|" * (len(columns) + 1))
    for (name, workers), found in needs.items():
        cells = [f"{getattr(found, part) / 2**30:.1f}" for part in (*columns, "total")]
        print(f"| {name} | {workers} | {' | '.join(cells)} |")
    fits: dict[str, dict[int, int]] = {}
    for name, (policy, dtype) in POLICIES.items():
        for card in CARDS:
            room = card * 1e9 - CONTEXT_BYTES
            fits.setdefault(name, {})[card] = bisect.bisect_right(
                range(1, MOST + 1), room, key=lambda workers: need(policy, dtype, workers, args).total
            )  # no worker makes the need smaller
    print(f"\n| workers that fit | {' | '.join(f'{card} GB' for card in CARDS)} |")
    print("|---|" + "---|" * len(CARDS))
    for name, most_of in fits.items():
        cells = [
            "none" if most == 0 else "any number" if most == MOST else f"up to {most}" for most in most_of.values()
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\n| ms at least, batch of | {' | '.join(map(str, BATCH_SIZES))} | observations/s at most |")
    print("|---|" + "---|" * (len(BATCH_SIZES) + 1))
    for gpu in GPUS:
        bounds = [least_ms(gpu, size, args.prompt_tokens) for size in BATCH_SIZES]
        print(f"| {gpu} | {' | '.join(f'{ms:.1f}' for ms in bounds)} | {1e3 * BATCH_SIZES[-1] / bounds[-1]:.0f} |")


if __name__ == "__main__":
    sys.exit(guard(main))
