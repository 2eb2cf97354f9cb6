"""What a GPU can hold and how fast it can be, on paper: the Markdown tables of docs/gpu.md.

    python scripts/studies/gpu_on_paper.py

The first table is the memory of a run, the second the workers that fit on a card, the third the least time of a batch
(`dsrl_async.pi0.roofline` with the data sheets of `dsrl_async.plan.gpus`). Of memory, counted are the weights, the
samplers' buffers for every batch size and prompt length, the activations of the largest batch twice (torch keeps what
the rehearsals of a capture took beside what the graphs share), and the mirror of the replay ring. The CUDA contexts of
the two processes and what an update takes are allowances, since nobody has measured them yet.
"""

from __future__ import annotations

import argparse

from dsrl_async.config.load import validate
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.memory import activation_bytes, buffer_bytes
from dsrl_async.pi0.roofline import stages
from dsrl_async.pi0.tensors import parameter_count
from dsrl_async.plan.gpus import GPUS, SUSTAINED
from dsrl_async.shm.arena import layout
from dsrl_async.shm.replay import replay_fields

POLICIES = {
    "Pi0, bfloat16": (Pi0Config(), 2),
    "Pi0.5, bfloat16": (Pi0Config(pi05=True, action_horizon=10, max_token_len=200), 2),
    "Pi0, float32": (Pi0Config(), 4),
}
CARDS = (24, 48, 80)
"""GB as they are sold; a driver shows a little less, which the allowance for contexts has to hold."""
WORKERS = BATCH_SIZES = (1, 8, 16, 32)
PARTS = ("weights", "buffers", "activations", "mirror", "allowances")
TABLE_ROW_BYTES = 2 * 8
"""Of the mirror, beside the ring's columns: the table and the successors, int64 each."""


def parts(policy: Pi0Config, bytes_per_value: int, workers: int, args: argparse.Namespace) -> dict[str, int]:
    """Bytes by `PARTS`."""
    config = validate({"actors": workers, "replay": {"capacity": args.replay_rows}})
    sizes = config.batch_sizes()
    lengths = [args.prompt_tokens + 8 * number for number in range(args.prompt_lengths)]
    of_rows = [buffer_bytes(policy, 1, length, bytes_per_value) for length in lengths]
    width = config.sac.noise_width(policy.action_horizon)
    ring = layout(replay_fields(1, args.replay_rows, policy.robot_state_dim, width))[1]
    return {
        "weights": parameter_count(policy) * bytes_per_value,
        "buffers": sum(sizes) * sum(of_rows),
        "activations": 2 * activation_bytes(policy, sizes[-1], max(lengths), bytes_per_value),
        "mirror": ring + TABLE_ROW_BYTES * args.replay_rows,
        "allowances": int(args.allowance_gib * 2**30),
    }


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
    parser.add_argument(
        "--allowance-gib", type=float, default=2.0, help="for CUDA contexts and the learner (default: 2)"
    )
    args = parser.parse_args()
    print(f"| GiB | workers | {' | '.join(PARTS)} | total |")
    print("|---|---|" + "---|" * (len(PARTS) + 1))
    fits: dict[str, dict[int, int]] = {}
    for name, (policy, bytes_per_value) in POLICIES.items():
        for workers in WORKERS:
            found = parts(policy, bytes_per_value, workers, args)
            total = sum(found.values())
            cells = [f"{found[part] / 2**30:.1f}" for part in PARTS]
            print(f"| {name} | {workers} | {' | '.join(cells)} | {total / 2**30:.1f} |")
        for card in CARDS:
            most = [
                size for size in range(1, 257) if sum(parts(policy, bytes_per_value, size, args).values()) <= card * 1e9
            ]
            fits.setdefault(name, {})[card] = max(most, default=0)
    print(f"\n| workers that fit | {' | '.join(f'{card} GB' for card in CARDS)} |")
    print("|---|" + "---|" * len(CARDS))
    for name, most_of in fits.items():
        cells = ["none" if most == 0 else "any number" if most == 256 else f"up to {most}" for most in most_of.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\n| ms at least, batch of | {' | '.join(map(str, BATCH_SIZES))} | observations/s at most |")
    print("|---|" + "---|" * (len(BATCH_SIZES) + 1))
    for gpu in GPUS:
        bounds = [least_ms(gpu, size, args.prompt_tokens) for size in BATCH_SIZES]
        print(f"| {gpu} | {' | '.join(f'{ms:.1f}' for ms in bounds)} | {1e3 * BATCH_SIZES[-1] / bounds[-1]:.0f} |")


if __name__ == "__main__":
    main()
