"""LeRobot's diffusion policy, steered through the noise that DDIM begins with.

LeRobot's own class is the network. The loop over DDIM's steps is here, since the one of diffusers asks the device for
numbers in each step; it computes the same (Song et al., "Denoising Diffusion Implicit Models", equation 12, eta 0).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsrl_async.pi0.config import CONFIG, WEIGHTS
from dsrl_async.pi0.lerobot import check_order
from dsrl_async.pi0.tensors import field, file_beside, read_header, read_values
from dsrl_async.policies.policy import Policy
from dsrl_async.policies.protocol import PolicySpec
from dsrl_async.untrusted import in_one_line, read_object, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STATE, ACTION, ENVIRONMENT_STATE = "observation.state", "action", "observation.environment_state"
STATISTICS = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "IDENTITY": ()}
EPSILON = 1e-8
"""LeRobot adds it to a standard deviation, and divides by it where a range is 0."""
NORMALISERS = {"policy_preprocessor": "normalizer_processor", "policy_postprocessor": "unnormalizer_processor"}
WITHOUT_EFFECT = ("rename_observations_processor", "to_batch_processor", "device_processor")
"""Steps of processors that change no number; a `rename_map` must be empty."""


class Scaling(NamedTuple):
    """(x - origin) * scale + offset; float32 of a shape that goes with x."""

    origin: NDArray[np.float32]
    scale: NDArray[np.float32]
    offset: NDArray[np.float32]


class DdimStep(NamedTuple):
    """The coefficients of a step from time t to the one before."""

    time: int
    signal: float
    """Square root of the share of the signal at t."""
    noise: float
    """Square root of the rest."""
    signal_before: float
    noise_before: float


class DiffusionPolicy(Policy):
    """A directory with LeRobot's `config.json` (`"type": "diffusion"`), `model.safetensors` and processors.

    Args:
        checkpoint: the directory.
        num_inference_steps: DDIM's steps from noise to actions; None means what config.json says.
    """

    def __init__(self, checkpoint: Path | None, num_inference_steps: int | None = None) -> None:
        super().__init__(checkpoint)
        if checkpoint is None:
            raise ValueError("policy.checkpoint: null has no diffusion policy; give its directory")
        path = checkpoint / CONFIG
        self.config = config = make_config(read_object(path), path)
        steps = num_inference_steps or config.num_inference_steps or config.num_train_timesteps
        if not isinstance(steps, int) or not 1 <= steps <= config.num_train_timesteps:
            raise ValueError(
                f"policy.options: num_inference_steps is {shown(steps)}, it must be from 1 to "
                f"{config.num_train_timesteps}, with how many steps the policy was trained"
            )
        self.ddim_steps = ddim_steps(config, steps)
        cameras = list(config.image_features)
        check_order(cameras, path)
        size = config.image_features[cameras[0]].shape[1]
        state, action = config.robot_state_feature.shape[0], config.action_feature.shape[0]
        self.spec = PolicySpec(len(cameras), size, state, action, config.horizon, action)
        self.row_bytes = 4 * len(cameras) * (3 + 6 * 64 // 4) * size**2 + (1 << 20)
        modes = {kind: mode.value for kind, mode in config.normalization_mapping.items()}
        before = read_statistics(checkpoint, "policy_preprocessor", path)
        after = read_statistics(checkpoint, "policy_postprocessor", path)
        pixels = [scaling(before, name, modes.get("VISUAL", "IDENTITY"), 3, path) for name in cameras]
        self.pixels = Scaling(*(np.stack(part)[:, :, None, None] for part in zip(*pixels, strict=True)))
        """For pixels in [0, 1]: [cameras, 3, 1, 1]."""
        self.states = scaling(before, STATE, modes.get("STATE", "IDENTITY"), state, path)
        self.actions = inverse(before if ACTION not in after else after, modes.get("ACTION", "IDENTITY"), action, path)
        if config.noise_scheduler_type != "DDIM":
            self.warnings = [
                f"{path}: noise_scheduler_type is {config.noise_scheduler_type}, whose steps add noise of their own; "
                f"the policy is sampled with DDIM in {steps} steps, so that the first noise decides"
            ]
        self._check_weights(checkpoint / WEIGHTS)

    def files(self) -> Sequence[Path]:
        assert self.checkpoint is not None
        return sorted(
            [self.checkpoint / CONFIG, self.checkpoint / WEIGHTS, *self.checkpoint.glob("policy_p*processor*")]
        )

    def _check_weights(self, path: Path) -> None:
        """Raises ValueError unless the file has the tensors of the network."""
        import torch

        with torch.device("meta"):
            wanted = {name: list(tensor.shape) for name, tensor in self._network().state_dict().items()}
        found = {name: list(tensor.shape) for name, tensor in read_header(path).items()}
        for name in sorted(wanted.keys() | found.keys()):
            if name not in found or name not in wanted:
                raise ValueError(f"{path} {'lacks' if name in wanted else 'has'} the tensor {shown(name)}, {_NOT}")
            if wanted[name] != found[name]:
                raise ValueError(f"{path}: {name} is {found[name]}, by config.json it is {wanted[name]}")

    def _network(self) -> Any:
        """The network, with the names that LeRobot's `DiffusionPolicy` gives it in a checkpoint."""
        from lerobot.policies.diffusion.modeling_diffusion import DiffusionModel
        from torch import nn

        network = DiffusionModel(self.config)
        return nn.ModuleDict({"diffusion": network})

    def load(self, device: torch.device, prompts: Sequence[str]) -> None:
        import torch
        from safetensors.torch import load_file

        assert self.checkpoint is not None
        module = self._network()
        module.load_state_dict(load_file(self.checkpoint / WEIGHTS))
        self.network = module["diffusion"].eval().requires_grad_(False).to(device)
        self.times = torch.tensor([[step.time] for step in self.ddim_steps], device=device)
        self.tensors = {
            name: [torch.from_numpy(part).to(device) for part in getattr(self, name)]
            for name in ("pixels", "states", "actions")
        }

    def encode(self, images: Tensor, state: Tensor, prompts: Tensor) -> Tensor:
        """What the U-Net is conditioned on, float32 [B, width]."""
        pictures = scaled(images.permute(0, 1, 4, 2, 3).float() / 255, *self.tensors["pixels"])
        batch = {"observation.images": pictures[:, None], STATE: scaled(state, *self.tensors["states"])[:, None]}
        encoded: Tensor = self.network._prepare_global_conditioning(batch)
        return encoded

    def denoise(self, encoded: Tensor, noise: Tensor) -> Tensor:
        config, x = self.config, noise
        for step, time in zip(self.ddim_steps, self.times, strict=True):
            predicted = self.network.unet(x, time.expand(len(x)), global_cond=encoded)
            if config.prediction_type == "epsilon":
                clean, direction = (x - step.noise * predicted) / step.signal, predicted
            else:
                clean, direction = predicted, (x - step.signal * predicted) / step.noise
            if config.clip_sample:
                clean = clean.clamp(-config.clip_sample_range, config.clip_sample_range)
            x = step.signal_before * clean + step.noise_before * direction
        return scaled(x, *self.tensors["actions"])


_NOT = "which the network that config.json describes does otherwise; LeRobot 0.4 and later write such checkpoints"


def make_config(content: Mapping[str, Any], path: Path) -> Any:
    """LeRobot's `DiffusionConfig`. Raises ValueError, naming the file or what to install."""
    try:
        from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
        from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    except ImportError as error:
        raise ValueError(
            f"policy.checkpoint: {path} is of LeRobot's diffusion policy, and LeRobot cannot be imported "
            f"({in_one_line(error)}); docs/your_policy.md says what to install"
        ) from error
    known = {field.name for field in dataclasses.fields(DiffusionConfig)}
    if unknown := sorted(content.keys() - known - {"type"}):
        raise ValueError(f"{path} has the key {shown(unknown[0])}, which the installed LeRobot does not know")
    settings = {name: value for name, value in content.items() if name != "type"}
    try:
        for name in ("input_features", "output_features"):
            features = settings.get(name) or {}
            settings[name] = {
                key: PolicyFeature(FeatureType(item["type"]), tuple(item["shape"])) for key, item in features.items()
            }
        if modes := settings.get("normalization_mapping"):
            settings["normalization_mapping"] = {key: NormalizationMode(mode) for key, mode in modes.items()}
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        settings |= {"device": "cpu", "compile_model": False, "pretrained_backbone_weights": None}
        config = DiffusionConfig(**settings)
        config.validate_features()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: {in_one_line(error)}") from error
    if config.n_obs_steps != 1:
        raise ValueError(
            f"{path}: n_obs_steps is {shown(config.n_obs_steps)}, supported is 1: a decision is one observation"
        )
    if ENVIRONMENT_STATE in config.input_features:
        raise ValueError(f"{path}: input_features has {ENVIRONMENT_STATE}, which no environment here shows")
    for name, feature in (("image", config.image_features), (STATE, config.robot_state_feature)):
        if not feature:
            raise ValueError(f"{path}: input_features has no {name}, supported are policies of images and state")
    shapes = {feature.shape for feature in config.image_features.values()}
    if any(len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2] for shape in shapes):
        raise ValueError(f"{path}: an image's shape is {min(shapes)}, supported are squares, [3, size, size]")
    if config.action_feature is None:
        raise ValueError(f"{path}: output_features has no {ACTION}")
    return config


def ddim_steps(config: Any, steps: int) -> list[DdimStep]:
    """The steps of LeRobot's DDIM scheduler."""
    from lerobot.policies.diffusion.modeling_diffusion import _make_noise_scheduler

    scheduler = _make_noise_scheduler(
        "DDIM",
        **{
            name: getattr(config, name)
            for name in (
                *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "clip_sample"),
                *("clip_sample_range", "prediction_type"),
            )
        },
    )
    scheduler.set_timesteps(steps)
    shares = scheduler.alphas_cumprod.double().tolist()
    found = []
    for time in scheduler.timesteps.tolist():
        before = time - config.num_train_timesteps // steps
        share, share_before = shares[time], shares[before] if before >= 0 else float(scheduler.final_alpha_cumprod)
        roots = (math.sqrt(part) for part in (share, 1 - share, share_before, 1 - share_before))
        found.append(DdimStep(time, *roots))
    return found


def read_statistics(directory: Path, processor: str, config: Path) -> dict[str, dict[str, list[float]]]:
    """Feature -> statistic -> its numbers, of the step of a processor that normalises.

    Raises ValueError, naming the file, if there is none, or a step that changes numbers in another way.
    """
    path = directory / f"{processor}.json"
    if not path.is_file():
        raise ValueError(f"{config.parent} has no {path.name}, which LeRobot writes beside {config.name}: copy it, too")
    normaliser, stats = None, None
    for step in field(read_object(path), "steps", list, path):
        name = step.get("registry_name") if isinstance(step, dict) else None
        if name == NORMALISERS[processor]:
            normaliser = step
        elif name not in WITHOUT_EFFECT or field(step, "config", dict, path).get("rename_map"):
            raise ValueError(f"{path} has the step {shown(name or step)}, which is not supported")
    if normaliser is not None and (name := field(normaliser, "state_file", str, path)):
        stats = read_header(file_beside(path, name))
    if stats is None:
        raise ValueError(f"{path} names no statistics in a step {NORMALISERS[processor]}")
    found: dict[str, dict[str, list[float]]] = {}
    for name, tensor in stats.items():
        feature, _, statistic = name.rpartition(".")
        if statistic in ("mean", "std", "min", "max"):
            found.setdefault(feature, {})[statistic] = read_values(tensor)
    return found


def _two(
    stats: Mapping[str, Mapping[str, list[float]]], name: str, mode: str, width: int, path: Path
) -> list[NDArray[np.float64]]:
    if mode not in STATISTICS:
        raise ValueError(f"{path}: normalization_mapping has {mode} for {name}, supported are {', '.join(STATISTICS)}")
    values = []
    for statistic in STATISTICS[mode]:
        found = np.array(stats.get(name, {}).get(statistic, ()), np.float64).ravel()
        if found.shape != (width,) or not np.isfinite(found).all():
            raise ValueError(f"{path.parent}: the processors have no {statistic} of {name} with {width} finite numbers")
        values.append(found)
    return values


def scaled(x: Tensor, origin: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """See `Scaling`."""
    return (x - origin) * scale + offset


def scaling(stats: Mapping[str, Mapping[str, list[float]]], name: str, mode: str, width: int, path: Path) -> Scaling:
    """What normalises a feature, each [width]. Raises ValueError, naming the file, for what is missing."""
    values = _two(stats, name, mode, width, path)
    none, one = np.zeros(width), np.ones(width)
    if mode == "IDENTITY":
        return _float32(none, one, none)
    if mode == "MEAN_STD":
        return _float32(values[0], 1 / (values[1] + EPSILON), none)
    return _float32(values[0], 2 / _range(*values), -one)


def inverse(stats: Mapping[str, Mapping[str, list[float]]], mode: str, width: int, path: Path) -> Scaling:
    """What makes the robot's actions of normalised ones, each [width]."""
    values = _two(stats, ACTION, mode, width, path)
    none, one = np.zeros(width), np.ones(width)
    if mode == "IDENTITY":
        return _float32(none, one, none)
    if mode == "MEAN_STD":
        return _float32(none, values[1], values[0])
    return _float32(-one, _range(*values) / 2, values[0])


def _range(low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(high == low, EPSILON, high - low)


def _float32(*parts: NDArray[np.float64]) -> Scaling:
    return Scaling(*(part.astype(np.float32) for part in parts))
