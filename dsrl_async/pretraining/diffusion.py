"""Makes a small diffusion policy for the embedded tabletop: LeRobot's own network, trained on the scripted expert.

    python -m dsrl_async.pretraining.diffusion --out runs/tabletop_diffusion

LeRobot is not among this package's dependencies: docs/your_policy.md says how it is installed. What is written is
LeRobot's own checkpoint (`config.json`, `model.safetensors`, processors with the statistics), as
`DiffusionPolicy.save_pretrained` has it, so that LeRobot can load it, too.

There are two stages, as in `dsrl_async.pretraining.training`. The first trains everything, with an auxiliary loss that
reads the block's position off the encoded images. The second computes the encoded observation of every frame once, and
trains the U-Net alone on them; the result is a moving average of it. An interrupted training goes on with `--resume`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsrl_async import untrusted
from dsrl_async.envs.tabletop_spec import TABLETOP
from dsrl_async.host.command import guard
from dsrl_async.host.files import replacing
from dsrl_async.pretraining import tabletop_demonstrations
from dsrl_async.pretraining.training import LossLog, Optimiser, StageSettings, action_chunks, progress_bar

HORIZON = 8
"""A multiple of 4: the U-Net halves it twice."""
SMALLEST_RANGE = 1e-3
"""Dimensions that hardly move are scaled as if they moved by 1, so that noise in them does not become large."""
CAMERAS = ("observation.images.scene", "observation.images.wrist")
STATE, ACTION = "observation.state", "action"
NAMES = ("joint", "denoiser")
RESUME = "resume.safetensors"
FREE_SETTINGS = ("resume", "threads", "checkpoint_minutes", "out", "data")
"""Options that a resumed training may be given other values of."""


def make_policy() -> Any:
    """LeRobot's `DiffusionPolicy` at a small size, with random weights.

    Raises ValueError if LeRobot is not installed.
    """
    try:
        from lerobot.configs.types import FeatureType, PolicyFeature
        from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
        from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
    except ImportError as error:
        raise ValueError(f"LeRobot cannot be imported ({error}); docs/your_policy.md says what to install") from error
    size = TABLETOP.image_size
    images = {name: PolicyFeature(FeatureType.VISUAL, (3, size, size)) for name in CAMERAS}
    config = DiffusionConfig(
        input_features={STATE: PolicyFeature(FeatureType.STATE, (TABLETOP.state_dim,)), **images},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (TABLETOP.action_dim,))},
        n_obs_steps=1,
        horizon=HORIZON,
        n_action_steps=HORIZON,
        drop_n_last_frames=0,
        down_dims=(64, 128),
        diffusion_step_embed_dim=64,
        noise_scheduler_type="DDIM",
        num_inference_steps=10,
        device="cpu",
        push_to_hub=False,
    )
    return DiffusionPolicy(config)


class Demonstrations:
    """F frames, scaled as LeRobot's processors scale them."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError, naming the file, if it does not hold what `tabletop_demonstrations` writes."""
        untrusted.check_regular(path)
        try:
            data = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {untrusted.in_one_line(error)}") from error
        if missing := {"images", "state", "action", "episode", "block_position"} - data.keys():
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; make it anew")
        self.images = data["images"]
        """uint8 [F, cameras, size, size, 3]"""
        self.stats = {name: image_statistics(self.images[:, index]) for index, name in enumerate(CAMERAS)}
        self.stats |= {STATE: statistics(data["state"]), ACTION: statistics(data["action"])}
        self.state = self._scale(data["state"], STATE)
        chunks = action_chunks(data["action"], data["episode"], HORIZON)
        self.chunks = self._scale(chunks, ACTION)
        """float32 [F, HORIZON, action_dim]"""
        block = data["block_position"]
        self.block = (block - block.mean(0)) / block.std(0)
        """float32 [F, 3]"""
        self._mean, self._std = (
            torch.stack([self.stats[name][which] for name in CAMERAS]) for which in ("mean", "std")
        )

    def _scale(self, values: Tensor, name: str) -> Tensor:
        low, high = self.stats[name]["min"], self.stats[name]["max"]
        return 2 * (values - low) / (high - low) - 1

    def pictures(self, rows: Tensor | slice) -> Tensor:
        """float32 [N, cameras, 3, size, size], standardised."""
        images = self.images[rows].permute(0, 1, 4, 2, 3).float() / 255
        return (images - self._mean) / self._std

    def __len__(self) -> int:
        return len(self.state)


def statistics(values: Tensor) -> dict[str, Tensor]:
    """LeRobot's statistics of each dimension of float32 [F, D]."""
    low, high = values.amin(0), values.amax(0)
    still = high - low < SMALLEST_RANGE
    low, high = torch.where(still, low - 0.5, low), torch.where(still, high + 0.5, high)
    return {"min": low, "max": high, "mean": values.mean(0), "std": values.std(0)}


def image_statistics(images: Tensor) -> dict[str, Tensor]:
    """Mean and deviation of the colours in every tenth of uint8 [F, size, size, 3], each float32 [3, 1, 1]."""
    pixels = images[::10].float().div_(255).flatten(0, 2)
    return {"mean": pixels.mean(0)[:, None, None], "std": pixels.std(0)[:, None, None]}


class Stage:
    """One of the two stages, and everything but the demonstrations that the rest of it depends on."""

    def __init__(self, name: str, policy: Any, data: Demonstrations, settings: StageSettings) -> None:
        self.name, self.policy, self.data, self.settings = name, policy, data, settings
        width = len(CAMERAS) * policy.diffusion.rgb_encoder.feature_dim
        modules = {"diffusion": policy.diffusion} | ({"head": nn.Linear(width, 3)} if name == "joint" else {})
        self.modules = nn.ModuleDict(modules)
        policy.diffusion.rgb_encoder.to(memory_format=torch.channels_last)  # quicker on a CPU
        trained = dict(self.modules.named_parameters())
        if name == "denoiser":
            trained = {key: value for key, value in trained.items() if ".unet." in key}
        self.optimiser = Optimiser(trained, settings, average=name == "denoiser")

    def train(self, log: LossLog, after_update: Callable[[Stage], None]) -> None:
        """Do the rest of the stage, and leave the averages in the policy if there are any."""
        encoded = self._encode_all() if self.name == "denoiser" else None
        data, generator = self.data, self.optimiser.generator
        while self.optimiser.step < self.settings.steps:
            rows = torch.randint(len(data), (self.settings.batch,), generator=generator)
            if encoded is None:
                condition = self._encode(rows)
                found = self.modules["head"](condition[:, TABLETOP.state_dim :])
                position = F.mse_loss(found, data.block[rows])
                losses = {"noise": self._noise_loss(condition, data.chunks[rows]), "position": position}
            else:
                losses = {"noise": self._noise_loss(encoded[rows], data.chunks[rows])}
            self.optimiser.update(torch.stack(list(losses.values())).sum())
            log.add(None, **{name: loss.item() for name, loss in losses.items()})
            after_update(self)
        self.optimiser.swap()

    def _encode(self, rows: Tensor | slice) -> Tensor:
        """What the U-Net is conditioned on, float32 [N, width]: the state, then the features of every camera.

        The convolutions are in bfloat16, which takes half the time on a CPU that has it.
        """
        with torch.autocast("cpu", torch.bfloat16):
            batch = {
                STATE: self.data.state[rows][:, None],
                "observation.images": self.data.pictures(rows)[:, None],
            }
            return self.policy.diffusion._prepare_global_conditioning(batch).float()

    @torch.no_grad()
    def _encode_all(self) -> Tensor:
        starts = range(0, len(self.data), 256)
        return torch.cat([self._encode(slice(start, start + 256)) for start in starts])

    def _noise_loss(self, condition: Tensor, chunks: Tensor) -> Tensor:
        """LeRobot's loss, with several noise samples for each observation, which is encoded once."""
        diffusion, generator = self.policy.diffusion, self.optimiser.generator
        condition, chunks = (part.repeat_interleave(self.settings.samples, 0) for part in (condition, chunks))
        noise = torch.randn(chunks.shape, generator=generator)
        most = diffusion.noise_scheduler.config.num_train_timesteps
        steps = torch.randint(most, (len(chunks),), generator=generator)
        noisy = diffusion.noise_scheduler.add_noise(chunks, noise, steps)
        return F.mse_loss(diffusion.unet(noisy, steps, global_cond=condition), noise)

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        tensors = {**self.modules.state_dict(prefix="modules."), **self.optimiser.state()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            metadata = {"stage": self.name, "settings": json.dumps(settings)}
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, metadata)

    def load(self, state: dict[str, Tensor]) -> None:
        prefix = "modules."
        self.modules.load_state_dict(
            {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        )
        self.optimiser.load_state(state)


def save_policy(policy: Any, stats: dict[str, dict[str, Tensor]], directory: Path) -> None:
    """Write LeRobot's checkpoint."""
    from lerobot.policies.diffusion.processor_diffusion import make_diffusion_pre_post_processors

    policy.eval().save_pretrained(directory)
    for processor in make_diffusion_pre_post_processors(policy.config, dataset_stats=stats):
        processor.save_pretrained(directory)


def read_state(path: Path, settings: dict[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Name and state of the interrupted stage; raises ValueError if there is none, or it had other settings."""
    if not os.path.exists(path):
        raise ValueError(f"there is no interrupted training in {path.parent}; leave out --resume")
    untrusted.check_regular(path)
    with safe_open(path, "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    before = json.loads(metadata["settings"])
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"the interrupted training had --{name.replace('_', '-')} {before.get(name)}, not {value}; give the "
                "same options, or leave out --resume"
            )
    return metadata["stage"], state


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tabletop_diffusion"), help="checkpoint to write")
    tabletop_demonstrations.add_options(parser)
    parser.add_argument("--resume", action="store_true", help="continue the interrupted training in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for training; more gain little")
    parser.add_argument("--joint-steps", type=int, default=900, help="updates of the first stage")
    parser.add_argument("--joint-batch", type=int, default=32, help="observations per update, first stage")
    parser.add_argument("--denoiser-steps", type=int, default=2500, help="updates of the second stage")
    parser.add_argument("--denoiser-batch", type=int, default=96, help="observations per update, second stage")
    parser.add_argument("--samples", type=int, default=2, help="noise samples per observation")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate of both stages")
    parser.add_argument("--checkpoint-minutes", type=float, default=2.0, help="minutes between two checkpoints")
    return parser.parse_args()


def pretrain(args: argparse.Namespace, console: Console) -> None:
    """Train or resume. Raises ValueError if LeRobot, demonstrations or the interrupted training are unusable."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    policy = make_policy()
    tabletop_demonstrations.provide(args, console)
    data = Demonstrations(args.data)
    settings = {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS}
    path = args.out / RESUME
    begun, state = read_state(path, settings) if args.resume else (NAMES[0], None)
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    console.print(f"{len(data)} frames, {parameters:,} parameters")
    written = time.monotonic()

    def after_update(stage: Stage) -> None:
        nonlocal written
        if time.monotonic() - written >= 60 * args.checkpoint_minutes:
            stage.save(path, settings)
            stage.optimiser.swap()
            save_policy(policy, data.stats, args.out)
            policy.train()
            stage.optimiser.swap()
            written = time.monotonic()

    with progress_bar(console) as progress:
        for name in NAMES[NAMES.index(begun) :]:
            steps, batch = getattr(args, f"{name}_steps"), getattr(args, f"{name}_batch")
            seed = args.seed + NAMES.index(name)
            stage = Stage(name, policy, data, StageSettings(steps, batch, args.samples, args.learning_rate, seed))
            if state is not None:
                stage.load(state)
                state = None
            stage.train(LossLog(progress, name, steps, stage.optimiser.step), after_update)
    save_policy(policy, data.stats, args.out)
    path.unlink(missing_ok=True)
    console.print(f"checkpoint: {args.out}")


def main() -> int:
    pretrain(parse(), Console())
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
