"""Makes the embedded tabletop policy: demonstrations, flow-matching pretraining, checkpoint.

    python -m dsrl_async.pretraining.tabletop --out runs/tabletop_pi0
    python -m dsrl_async.pretraining.tabletop --out runs/tabletop_pi05 --model pi05 --discrete-state-input

It goes through the two stages of `dsrl_async.pretraining.training`, with an auxiliary loss on the block's position in
the first. Each demonstration goes to a random plate, so the policy is multimodal: the plate that it chooses depends on
the noise, and that is what DSRL steers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from dsrl_async import untrusted
from dsrl_async.envs.tabletop_spec import TABLETOP
from dsrl_async.host.command import guard
from dsrl_async.host.waiting import waiting
from dsrl_async.pi0.checkpoint import export_tensors, load_policy, save_policy
from dsrl_async.pi0.config import Pi0Config, tabletop_config
from dsrl_async.pi0.files import NormStats
from dsrl_async.pi0.model import Pi0
from dsrl_async.pi0.processing import Normaliser, PromptTokenizer
from dsrl_async.pretraining import tabletop_demonstrations
from dsrl_async.pretraining.training import (
    Demonstrations,
    Expert,
    Joint,
    StageSettings,
    action_chunks,
    build_tokenizer,
    close_gates,
    progress_bar,
    statistics,
)


def read_demonstrations(
    path: Path, config: Pi0Config, tokenizer: PromptTokenizer, prompt: str
) -> tuple[Demonstrations, NormStats]:
    """Raises ValueError, naming the file, if it does not hold what `tabletop_demonstrations` writes."""
    untrusted.check_regular(path)
    try:
        data = load_file(path)
        missing = {"images", "state", "action", "episode", "block_position"} - data.keys()
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {untrusted.in_one_line(error)}") from error
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; make it anew")
    stats = {"state": statistics(data["state"]), "actions": statistics(data["action"])}
    normaliser = Normaliser(config, stats)
    chunks = action_chunks(data["action"], data["episode"], config.action_horizon)
    block = data["block_position"]
    scale = block.std(0)
    block = (block - block.mean(0)) / scale
    state, chunks = normaliser.state(data["state"]), normaliser.actions(chunks)
    if config.state_in_prompt:
        tokens, token_mask = tokenizer([prompt] * len(state), state[:, : config.robot_state_dim])
    else:
        tokens, token_mask = (part.expand(len(chunks), -1) for part in tokenizer([prompt]))
    return Demonstrations(data["images"], tokens, token_mask, state, chunks, block, scale, ("block",)), stats


def load_trained(directory: Path, config: Pi0Config) -> Pi0:
    """A policy that this command has made, to be trained further. Raises ValueError if it is of another kind."""
    loaded = load_policy(directory)
    if loaded.config != config:
        raise ValueError(f"--start-from {directory}: it is another model; give the --model that it was made with")
    return loaded.model.train().requires_grad_(True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tabletop_pi0"), help="checkpoint directory to write")
    parser.add_argument("--model", choices=("pi0", "pi05"), default="pi0", help="Pi0, or Pi0.5 with its adaptive norms")
    parser.add_argument(
        "--discrete-state-input", action="store_true", help="Pi0.5 reads the state in the prompt, else not at all"
    )
    parser.add_argument("--start-from", type=Path, help="checkpoint directory of the same model, to be trained further")
    tabletop_demonstrations.add_options(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for training")
    parser.add_argument("--joint-steps", type=int, default=2000, help="updates of the first stage")
    parser.add_argument("--joint-batch", type=int, default=64, help="observations per update, first stage")
    parser.add_argument("--expert-steps", type=int, default=6000, help="updates of the second stage")
    parser.add_argument("--expert-batch", type=int, default=96, help="observations per update, second stage")
    parser.add_argument("--samples", type=int, default=4, help="noise samples per observation")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate of both stages")
    return parser.parse_args()


def main() -> None:
    args = parse()
    pi05 = args.model == "pi05"
    if args.discrete_state_input and not pi05:
        raise ValueError("--discrete-state-input is for --model pi05: a Pi0 reads the state from a token of its own")
    config = tabletop_config(pi05, args.discrete_state_input)
    torch.set_num_threads(args.threads)
    console = Console()
    start = time.monotonic()
    model = None if args.start_from is None else load_trained(args.start_from, config)
    tabletop_demonstrations.provide(args, console)
    made = time.monotonic()
    torch.manual_seed(args.seed)
    prompts = TABLETOP.prompts
    tokenizer = build_tokenizer(config, prompts)
    with waiting("reading the demonstrations", console):
        data, stats = read_demonstrations(args.data, config, tokenizer, prompts[0])
    if model is None:
        model = Pi0(config)
        close_gates(model)
    joint_stage = StageSettings(args.joint_steps, args.joint_batch, args.samples, args.learning_rate, args.seed)
    expert_stage = StageSettings(args.expert_steps, args.expert_batch, args.samples, args.learning_rate, args.seed + 1)
    console.print(f"{len(data)} frames, {sum(p.numel() for p in model.parameters()):,} parameters")
    with progress_bar(console) as progress:
        joint = Joint(model, data, joint_stage).train(progress)  # none, with --joint-steps 0
        expert = Expert(model, data, expert_stage).train(progress)
    assert all(bool(tensor.isfinite().all()) for tensor in export_tensors(model).values())
    save_policy(args.out, model, stats, tokenizer)
    summary = {
        "frames": len(data),
        "demonstration_minutes": round((made - start) / 60, 2),
        "training_minutes": round((time.monotonic() - made) / 60, 2),
        "joint_losses": joint,
        "expert_losses": expert,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
    }
    console.print(json.dumps(summary, indent=2))
    console.print(f"checkpoint: {args.out}")


if __name__ == "__main__":
    sys.exit(guard(main))
