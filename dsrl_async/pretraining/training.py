"""Pretraining of a small Pi0 by flow matching, in two stages that fit a CPU.

The first stage trains everything jointly, with an auxiliary loss that reads positions of objects off the language
model's last hidden state (with the flow loss alone, the policy is slow to use the images). The second freezes the VLM,
computes its keys and values once for every frame, and trains only the expert, at many more updates per minute. The
result is an exponential moving average of the second stage.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.model import GemmaNorm, Pi0, Prefix, key_mask
from dsrl_async.pi0.processing import PromptTokenizer, scale_images
from dsrl_async.pi0.tokenizer import STATE_BINS

PADDING_WEIGHT = 0.1
"""Loss weight of the action dimensions beyond those of the robot, whose target is zero."""
POSITION_WEIGHT = 1.0
"""Weight of the auxiliary position loss in the first stage."""
SMALLEST_STD = 1e-3
"""Floor of the standard deviations: small enough to keep constant actions constant when they are sampled."""
GENERIC_WORDS = "pick up move place take blue yellow green black white left right near far to of in"
LOG_INTERVAL = 250
"""Number of updates between two printed lines."""
HELD_OUT_BATCH = 256
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Demonstrations:
    """F frames on the CPU, each with the action chunk that starts at it, ready for the model."""

    images: Tensor
    """uint8 [F, cameras, size, size, 3]"""
    tokens: Tensor
    """int64 [F, L], the instruction."""
    token_mask: Tensor
    """bool [F, L]"""
    state: Tensor
    """float32 [F, action_dim], normalised."""
    chunks: Tensor
    """float32 [F, action_horizon, action_dim], normalised."""
    positions: Tensor
    """float32 [F, 3 K], the K positions of the auxiliary loss, standardised."""
    position_scale: Tensor
    """float32 [3 K], metres per unit of `positions`."""
    position_names: tuple[str, ...]
    """[K]"""

    def __len__(self) -> int:
        return len(self.state)


@dataclass(frozen=True)
class StageSettings:
    """Hyperparameters of a stage."""

    steps: int
    """Number of updates."""
    batch: int
    """Number of observations per update."""
    samples: int
    """Number of noise samples per observation."""
    learning_rate: float
    """Peak learning rate."""
    seed: int


def build_tokenizer(config: Pi0Config, prompts: Sequence[str]) -> PromptTokenizer:
    """Makes a word-level tokenizer for the prompts and some variations.

    Where prompts hold the state (`tokenizer.prompt_ids`), each of its numbers is a word.

    Raises ValueError when the prompts have more words than the config embeds.
    """
    words = " ".join((*prompts, GENERIC_WORDS)).split()
    separators = [" "]
    if config.state_in_prompt:
        separators += [",", ";", "\n"]
        words += ["Task:", ",", "State:", ";", "Action:", *map(str, range(-1, STATE_BINS))]
    entries = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", *dict.fromkeys(words)]
    if len(entries) > config.vocab_size:
        raise ValueError(f"the prompts need {len(entries)} tokens, the policy embeds {config.vocab_size}")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token="<unk>"))
    splits = [pre_tokenizers.Split(text, "removed" if text == " " else "isolated") for text in separators]
    tokenizer.pre_tokenizer = splits[0] if len(splits) == 1 else pre_tokenizers.Sequence(splits)
    return PromptTokenizer(tokenizer, config.max_token_len)


@torch.no_grad()
def close_gates(model: Pi0) -> None:
    """Start a Pi0.5's adaptive norms as plain ones, whose sublayers add nothing yet, as openpi does."""
    for module in model.modules():
        if isinstance(module, GemmaNorm) and module.adaptive:
            nn.init.zeros_(module.dense.weight)
            nn.init.zeros_(module.dense.bias)


def statistics(values: Tensor, smallest_std: float = SMALLEST_STD) -> dict[str, list[float]]:
    """openpi's four statistics of each dimension of float32 [F, D], with a floor for the spreads."""
    mean, std = values.mean(0), values.std(0).clamp_min(smallest_std)
    low, high = torch.quantile(values, torch.tensor([0.01, 0.99]), dim=0)
    high = torch.maximum(high, low + 2 * smallest_std)
    return {"mean": mean.tolist(), "std": std.tolist(), "q01": low.tolist(), "q99": high.tolist()}


def action_chunks(action: Tensor, episode: Tensor, horizon: int) -> Tensor:
    """The `horizon` actions that begin at each frame, [F, horizon, D].

    Beyond the end of an episode the arm stays where it is, with the gripper as in the last frame.
    """
    frames = torch.arange(len(action))
    last = torch.searchsorted(episode, episode, right=True) - 1
    index = frames[:, None] + torch.arange(horizon)
    chunks = action[index.minimum(last[:, None])]
    chunks[..., :-1][index > last[:, None]] = 0
    return chunks


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
    """The fraction of the peak learning rate: linear warm-up over 5 % of the steps, then a cosine to 2 %."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Optimiser:
    """AdamW with the schedule above and gradient clipping; optionally keeps a moving average of the parameters."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: StageSettings, average: bool) -> None:
        self.parameters, self.settings = dict(parameters), settings
        self.adam = torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=1e-3, fused=True
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        """Source of all random numbers of the stage."""
        self.averages = [p.detach().clone() for p in self.parameters.values()] if average else []
        self.step = 0

    def update(self, loss: Tensor) -> None:
        for group in self.adam.param_groups:
            group["lr"] = self.settings.learning_rate * learning_rate(self.step, self.settings.steps)
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.adam.step()
        if self.averages:
            decay = min(0.998, self.step / (self.step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(self.averages, list[Tensor](self.parameters.values()), 1 - decay)
        self.step += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the parameters with their averages, if there are any."""
        for parameter, average in zip(self.parameters.values(), self.averages, strict=False):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state(self) -> dict[str, Tensor]:
        """Everything but the parameters that the next update depends on."""
        state = {"generator": self.generator.get_state(), "step": torch.tensor(self.step)}
        for index, (name, parameter) in enumerate(self.parameters.items()):
            state |= {f"{moment}.{name}": self.adam.state[parameter][moment] for moment in ADAM_STATE}
            if self.averages:
                state[f"average.{name}"] = self.averages[index]
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state()`. Raises KeyError or RuntimeError if it belongs to other parameters."""
        for index, (name, parameter) in enumerate(self.parameters.items()):
            self.adam.state[parameter] = {moment: state[f"{moment}.{name}"].clone() for moment in ADAM_STATE}
            if self.averages:
                self.averages[index].copy_(state[f"average.{name}"])
        self.generator.set_state(state["generator"])
        self.step = int(state["step"])


AfterUpdate = Callable[["Joint | Expert"], None]
"""Hook that is called after every update, for checkpoints."""


def progress_bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


class LossLog:
    """Means of losses, shown in the progress bar, printed every LOG_INTERVAL updates and kept for the summary."""

    def __init__(self, progress: Progress, name: str, steps: int, start: int = 0) -> None:
        self.progress, self.name, self.steps = progress, name, steps
        self.task = progress.add_task(name, total=steps, completed=start, losses="")
        self.sums: dict[str, float] = {}
        self.count, self.step, self.start = 0, start, time.monotonic()
        self.last: dict[str, float] = {}

    def add(self, held_out: Callable[[], dict[str, float]] | None = None, **losses: float) -> None:
        """Take in an update's losses. `held_out` computes those of held-out frames, which are not averaged."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss
        self.count += 1
        self.step += 1
        if self.step % LOG_INTERVAL == 0 or self.step == self.steps:
            self.last = {name: total / self.count for name, total in self.sums.items()}
            if held_out is not None:
                self.last |= {f"held-out {name}": loss for name, loss in held_out().items()}
            text = "  ".join(f"{name} {loss:.4f}" for name, loss in self.last.items())
            minutes = (time.monotonic() - self.start) / 60
            line = f"{self.name} {self.step}/{self.steps}  {text}  {minutes:.1f} min"
            self.progress.console.print(line, soft_wrap=True)  # stays one line in a log file
            self.progress.update(self.task, losses=text)
            self.sums, self.count = {}, 0
        self.progress.advance(self.task)


class Joint:
    """The first stage, which trains everything with the auxiliary position loss."""

    def __init__(
        self, model: Pi0, data: Demonstrations, settings: StageSettings, held_out: Demonstrations | None = None
    ) -> None:
        self.model, self.data, self.settings, self.held_out = model, data, settings, held_out
        self.image_tokens = model.config.cameras * model.config.image_tokens
        self.head = nn.Linear(self.image_tokens * model.config.vlm_width, data.positions.shape[1])
        self.modules = nn.ModuleDict({"model": model, "head": self.head})
        self.optimiser = Optimiser(dict(self.modules.named_parameters()), settings, average=False)

    def train(self, progress: Progress, after_update: AfterUpdate | None = None) -> dict[str, float]:
        """Runs the rest of the stage. Returns the last logged losses."""
        data, generator = self.data, self.optimiser.generator
        log = LossLog(progress, "joint", self.settings.steps, self.optimiser.step)
        while self.optimiser.step < self.settings.steps:
            rows = torch.randint(len(data), (self.settings.batch,), generator=generator)
            flow, found = self._run(data, rows, generator)
            position = F.mse_loss(found, data.positions[rows])
            self.optimiser.update(flow + POSITION_WEIGHT * position)
            log.add(self._measure if self.held_out else None, flow=flow.item(), position=position.item())
            if after_update is not None:
                after_update(self)
        return log.last

    def _run(self, data: Demonstrations, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The flow loss and the positions [N, K] that the head reads off the images."""
        model = self.model
        images = scale_images(data.images[rows])
        prefix = model.encode_prefix(images, data.tokens[rows], data.token_mask[rows], data.state[rows])
        assert prefix.hidden is not None
        found = self.head(prefix.hidden[:, : self.image_tokens].flatten(1))
        actions = data.chunks[rows].repeat_interleave(self.settings.samples, dim=0)
        return flow_loss(model, prefix.repeat(self.settings.samples), actions, generator), found

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        data = self.held_out
        assert data is not None
        generator = torch.Generator().manual_seed(0)
        flows, found = [], []
        for rows in torch.arange(len(data)).split(HELD_OUT_BATCH):
            flow, positions = self._run(data, rows, generator)
            flows.append(flow * len(rows))
            found.append(positions)
        error = torch.cat(found) - data.positions
        distance = (error * data.position_scale).unflatten(1, (-1, 3)).square().sum(2).mean(0).sqrt()
        centimetres = {
            f"{name} (cm)": 100 * metres for name, metres in zip(data.position_names, distance.tolist(), strict=True)
        }
        flow = torch.stack(flows).sum() / len(data)
        return {"flow": flow.item(), "position": error.square().mean().item(), **centimetres}


@torch.no_grad()
def cache_prefixes(model: Pi0, data: Demonstrations, progress: Progress) -> Tensor:
    """Keys and values of every frame, float16 [F, depth, 2, kv_heads, P, head_dim]."""
    config, batch = model.config, 256
    shape = (len(data), config.depth, 2, config.kv_heads, config.prefix_length, config.head_dim)
    cache = torch.empty(shape, dtype=torch.float16)
    task = progress.add_task("cache", total=len(data), losses="")
    for start in range(0, len(data), batch):
        rows = slice(start, start + batch)
        images = scale_images(data.images[rows])
        prefix = model.encode_images(images, data.tokens[rows], data.token_mask[rows])
        cache[rows] = torch.stack(prefix.keys_values, dim=1)
        progress.advance(task, len(images))
    return cache


class Expert:
    """The second stage, which trains the expert and the projections on cached prefixes."""

    def __init__(
        self, model: Pi0, data: Demonstrations, settings: StageSettings, held_out: Demonstrations | None = None
    ) -> None:
        self.model, self.data, self.settings, self.held_out = model, data, settings, held_out
        frozen = (model.vision, model.embedding, model.vlm)
        fixed = {id(parameter) for module in frozen for parameter in module.parameters()}
        self.modules = nn.ModuleDict({"model": model})
        parameters = {name: p for name, p in self.modules.named_parameters() if id(p) not in fixed}
        self.optimiser = Optimiser(parameters, settings, average=True)

    def train(
        self, progress: Progress, after_update: AfterUpdate | None = None, stop_after: int | None = None
    ) -> dict[str, float]:
        """Runs the rest of the stage and leaves the averages in the model. Returns the last logged losses.

        `stop_after` ends it early, after that many updates of the stage; the schedule stays that of the whole stage.
        """
        data, generator = self.data, self.optimiser.generator
        end = self.settings.steps if stop_after is None else min(stop_after, self.settings.steps)
        cache = cache_prefixes(self.model, data, progress)
        measure = None
        if self.held_out is not None:
            held_out_cache = cache_prefixes(self.model, self.held_out, progress)

            def measure() -> dict[str, float]:
                return self._measure(held_out_cache)

        log = LossLog(progress, "expert", self.settings.steps, self.optimiser.step)
        while self.optimiser.step < end:
            rows = torch.randint(len(data), (self.settings.batch,), generator=generator)
            loss = self._loss(data, cache, rows, generator)
            self.optimiser.update(loss)
            log.add(measure, flow=loss.item())
            if after_update is not None:
                after_update(self)
        self.optimiser.swap()
        return log.last

    def _loss(self, data: Demonstrations, cache: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
        model, token_mask = self.model, data.token_mask[rows]
        before = model.config.cameras * model.config.image_tokens
        mask = key_mask(token_mask, before, 0, model.dtype)
        layers = list(cache[rows].float().unbind(1))
        prefix = model.append_state(Prefix(layers, mask, before + token_mask.sum(1)), data.state[rows])
        actions = data.chunks[rows].repeat_interleave(self.settings.samples, dim=0)
        return flow_loss(model, prefix.repeat(self.settings.samples), actions, generator)

    @torch.no_grad()
    def _measure(self, cache: Tensor) -> dict[str, float]:
        """The loss of the averaged weights."""
        assert self.held_out is not None
        generator = torch.Generator().manual_seed(0)
        self.optimiser.swap()
        batches = torch.arange(len(self.held_out)).split(HELD_OUT_BATCH)
        losses = [self._loss(self.held_out, cache, rows, generator) * len(rows) for rows in batches]
        self.optimiser.swap()
        return {"flow": torch.stack(losses).sum().item() / len(self.held_out)}


def training_state(stage: Joint | Expert) -> dict[str, Tensor]:
    """Everything but the demonstrations that the rest of a stage depends on."""
    return {**stage.modules.state_dict(prefix="modules."), **stage.optimiser.state()}


def load_training_state(stage: Joint | Expert, state: Mapping[str, Tensor]) -> None:
    """Restores `training_state`. Raises KeyError or RuntimeError if it belongs to another stage or model."""
    prefix = "modules."
    stage.modules.load_state_dict(
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    )
    stage.optimiser.load_state(state)
