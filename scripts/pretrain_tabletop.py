"""Makes the embedded tabletop policy: demonstrations, flow-matching pretraining, checkpoint.

    python scripts/pretrain_tabletop.py --out runs/tabletop_pi0

Two stages. First everything is trained jointly, with an auxiliary loss that asks the language model's last
hidden state where the block is (the flow loss alone is slow to make the image matter). Then the VLM is
frozen, its keys and values are computed once for every frame, and only the expert goes on: many more
updates per minute. The weights that are saved are an exponential moving average of the second stage.

The demonstrations head for a random plate each time, so the policy is multimodal: which plate it chooses
depends on the noise, and that is what DSRL steers.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from dsrl_async.envs import environment_spec
from dsrl_async.pi0.checkpoint import export_tensors, save_policy
from dsrl_async.pi0.config import Pi0Config, tabletop_config
from dsrl_async.pi0.model import Pi0, Prefix, key_mask
from dsrl_async.pi0.processing import Normaliser, NormStats, PromptTokenizer, scale_images

PADDING_WEIGHT = 0.1
"""Loss weight of action dimensions beyond the robot's, whose target is zero."""
BLOCK_WEIGHT = 1.0
"""Weight of the auxiliary block-position loss in the first stage."""
SMALLEST_STD = 1e-3
"""Floor of the standard deviations: small enough to keep constant actions constant when they are sampled."""


@dataclass
class Demonstrations:
    """Frames of all episodes, on the CPU, with the normalised action chunk that starts at each frame."""

    images: Tensor
    state: Tensor
    chunks: Tensor
    block: Tensor

    def __len__(self) -> int:
        return len(self.state)


def build_tokenizer(config: Pi0Config, prompts: tuple[str, ...]) -> PromptTokenizer:
    """A word-level vocabulary that covers the prompts and some variations."""
    words = " ".join((*prompts, "pick up move place take blue yellow green black white left right near far to of in"))
    entries = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", *dict.fromkeys(words.split())]
    assert len(entries) <= config.vocab_size
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PromptTokenizer(tokenizer, config.max_token_len)


def statistics(values: Tensor) -> dict[str, list[float]]:
    """openpi's four statistics per dimension of float32 [F, D]; spreads have a floor."""
    mean, std = values.mean(0), values.std(0).clamp_min(SMALLEST_STD)
    low, high = torch.quantile(values, torch.tensor([0.01, 0.99]), dim=0)
    high = torch.maximum(high, low + 2 * SMALLEST_STD)
    return {"mean": mean.tolist(), "std": std.tolist(), "q01": low.tolist(), "q99": high.tolist()}


def action_chunks(action: Tensor, episode: Tensor, horizon: int) -> Tensor:
    """The `horizon` actions from each frame on, [F, horizon, D].

    Behind the end of an episode the arm stays where it is, with the gripper as in the last frame.
    """
    frames = torch.arange(len(action))
    last = torch.searchsorted(episode, episode, right=True) - 1
    index = frames[:, None] + torch.arange(horizon)
    chunks = action[index.minimum(last[:, None])]
    chunks[..., :-1][index > last[:, None]] = 0
    return chunks


def read_demonstrations(path: Path, config: Pi0Config) -> tuple[Demonstrations, NormStats]:
    data = load_file(path)
    stats = {"state": statistics(data["state"]), "actions": statistics(data["action"])}
    normaliser = Normaliser(config, stats)
    chunks = action_chunks(data["action"], data["episode"], config.action_horizon)
    block = data["block_position"]
    block = (block - block.mean(0)) / block.std(0)
    return Demonstrations(data["images"], normaliser.state(data["state"]), normaliser.actions(chunks), block), stats


def flow_loss(model: Pi0, prefix: Prefix, actions: Tensor, generator: torch.Generator) -> Tensor:
    """Flow-matching loss at openpi's time distribution, t = 0.999 Beta(1.5, 1) + 0.001."""
    noise = torch.randn(actions.shape, generator=generator)
    uniform = torch.rand(len(actions), generator=generator)
    t = uniform ** (1 / 1.5) * 0.999 + 0.001  # the inverse of Beta(1.5, 1)'s distribution function
    x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * actions
    error = (model.velocity(x_t, t, prefix) - (noise - actions)).square().mean((0, 1))
    robot = model.config.robot_action_dim
    weight = torch.full_like(error, PADDING_WEIGHT)
    weight[:robot] = 1
    return (error * weight).sum() / weight.sum()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over 5 %, then a cosine to 2 % of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Optimiser:
    """AdamW with the schedule above and gradient clipping."""

    def __init__(self, parameters: list[nn.Parameter], peak: float, steps: int) -> None:
        self.parameters = parameters
        self.adam = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=1e-3, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, lambda step: learning_rate(step, steps))

    def update(self, loss: Tensor) -> None:
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.schedule.step()


def progress_bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


class Report:
    """Running means of losses: in the progress bar, printed now and then, and kept for the summary."""

    def __init__(self, progress: Progress, name: str, steps: int) -> None:
        self.progress, self.name, self.steps = progress, name, steps
        self.task = progress.add_task(name, total=steps, losses="")
        self.sums: dict[str, float] = {}
        self.count, self.step, self.start = 0, 0, time.monotonic()
        self.last: dict[str, float] = {}

    def add(self, **losses: float) -> None:
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss
        self.count += 1
        self.step += 1
        if self.step % 250 == 0 or self.step == self.steps:
            self.last = {name: total / self.count for name, total in self.sums.items()}
            text = "  ".join(f"{name} {loss:.4f}" for name, loss in self.last.items())
            minutes = (time.monotonic() - self.start) / 60
            self.progress.console.print(f"{self.name} {self.step}/{self.steps}  {text}  {minutes:.1f} min")
            self.progress.update(self.task, losses=text)
            self.sums, self.count = {}, 0
        self.progress.advance(self.task)


def train_jointly(
    model: Pi0,
    data: Demonstrations,
    prompt: tuple[Tensor, Tensor],
    args: argparse.Namespace,
    progress: Progress,
) -> dict[str, float]:
    """First stage: everything, with the auxiliary block-position loss."""
    config, generator = model.config, torch.Generator().manual_seed(args.seed)
    image_tokens = config.cameras * config.image_tokens
    head = nn.Linear(image_tokens * config.vlm_width, 3)
    optimiser = Optimiser([*model.parameters(), *head.parameters()], args.learning_rate, args.joint_steps)
    report = Report(progress, "joint", args.joint_steps)
    tokens, token_mask = (part.expand(args.joint_batch, -1) for part in prompt)
    for _ in range(args.joint_steps):
        rows = torch.randint(len(data), (args.joint_batch,), generator=generator)
        prefix = model.encode_prefix(scale_images(data.images[rows]), tokens, token_mask, data.state[rows])
        assert prefix.hidden is not None
        block = F.mse_loss(head(prefix.hidden[:, :image_tokens].flatten(1)), data.block[rows])
        actions = data.chunks[rows].repeat_interleave(args.samples, dim=0)
        flow = flow_loss(model, prefix.repeat(args.samples), actions, generator)
        optimiser.update(flow + BLOCK_WEIGHT * block)
        report.add(flow=flow.item(), block=block.item())
    return report.last


@torch.no_grad()
def cache_prefixes(model: Pi0, data: Demonstrations, prompt: tuple[Tensor, Tensor], progress: Progress) -> Tensor:
    """Keys and values of every frame: float16 [F, depth, 2, kv_heads, P, head_dim]."""
    config, batch = model.config, 256
    shape = (len(data), config.depth, 2, config.kv_heads, config.prefix_length, config.head_dim)
    cache = torch.empty(shape, dtype=torch.float16)
    task = progress.add_task("cache", total=len(data), losses="")
    for start in range(0, len(data), batch):
        images = scale_images(data.images[start : start + batch])
        tokens, token_mask = (part.expand(len(images), -1) for part in prompt)
        prefix = model.encode_images(images, tokens, token_mask)
        pairs = [torch.stack(pair, dim=1) for pair in zip(prefix.keys, prefix.values, strict=True)]
        cache[start : start + batch] = torch.stack(pairs, dim=1)
        progress.advance(task, len(images))
    return cache


def train_expert(
    model: Pi0,
    data: Demonstrations,
    cache: Tensor,
    token_mask: Tensor,
    args: argparse.Namespace,
    progress: Progress,
) -> dict[str, float]:
    """Second stage: expert and projections on cached prefixes; leaves the averaged weights in the model."""
    generator = torch.Generator().manual_seed(args.seed + 1)
    frozen = (model.vision, model.embedding, model.vlm)
    fixed = {id(parameter) for module in frozen for parameter in module.parameters()}
    parameters = [parameter for parameter in model.parameters() if id(parameter) not in fixed]
    optimiser = Optimiser(parameters, args.learning_rate, args.expert_steps)
    averages = [parameter.detach().clone() for parameter in parameters]
    report = Report(progress, "expert", args.expert_steps)
    before = model.config.cameras * model.config.image_tokens
    mask = key_mask(token_mask.expand(args.expert_batch, -1), before, 0, model.dtype)
    position = (before + token_mask.sum(1)).expand(args.expert_batch)
    for step in range(args.expert_steps):
        rows = torch.randint(len(data), (args.expert_batch,), generator=generator)
        layers = cache[rows].float().unbind(1)
        keys, values = [layer[:, 0] for layer in layers], [layer[:, 1] for layer in layers]
        prefix = model.append_state(Prefix(keys, values, mask, position), data.state[rows])
        actions = data.chunks[rows].repeat_interleave(args.samples, dim=0)
        loss = flow_loss(model, prefix.repeat(args.samples), actions, generator)
        optimiser.update(loss)
        decay = min(0.998, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(averages, list[Tensor](parameters), 1 - decay)
        report.add(flow=loss.item())
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)
    return report.last


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tabletop_pi0"), help="checkpoint directory to write")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data/tabletop_demonstrations.safetensors"),
        help="made when missing",
    )
    parser.add_argument("--episodes", type=int, default=1200, help="demonstrations to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the training")
    parser.add_argument("--joint-steps", type=int, default=2000, help="updates of the first stage")
    parser.add_argument("--joint-batch", type=int, default=64, help="observations per update, first stage")
    parser.add_argument("--expert-steps", type=int, default=6000, help="updates of the second stage")
    parser.add_argument("--expert-batch", type=int, default=96, help="observations per update, second stage")
    parser.add_argument("--samples", type=int, default=4, help="noise samples per observation")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak, of both stages")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    console = Console()
    start = time.monotonic()
    if not args.data.is_file():
        from dsrl_async.envs.tabletop_demonstrations import make_demonstrations

        console.print(f"making {args.episodes} demonstrations: {args.data}")
        args.data.parent.mkdir(parents=True, exist_ok=True)
        make_demonstrations(args.data, args.episodes, args.seed, args.threads)
    made = time.monotonic()
    torch.manual_seed(args.seed)
    config = tabletop_config()
    prompts = environment_spec({"name": "tabletop"}).prompts
    tokenizer = build_tokenizer(config, prompts)
    data, stats = read_demonstrations(args.data, config)
    model = Pi0(config)
    prompt = tokenizer(prompts[:1])
    console.print(f"{len(data)} frames, {sum(p.numel() for p in model.parameters()):,} parameters")
    with progress_bar(console) as progress:
        joint = train_jointly(model, data, prompt, args, progress)
        cache = cache_prefixes(model, data, prompt, progress)
        expert = train_expert(model, data, cache, prompt[1], args, progress)
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
    main()
