"""Sizes and conventions of a Pi0 policy: one frozen dataclass, stored as `config.json` beside the weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsrl_async.untrusted import shown

WEIGHTS, CONFIG, NORM_STATS, TOKENIZER = "model.safetensors", "config.json", "norm_stats.json", "tokenizer.json"
"""The files of a policy checkpoint."""
TRAINING = "training.json"
"""An optional file of a checkpoint of this project: what it was trained on, such as {"render_quality": "fast"}."""
EMBEDDED_POLICY = Path(__file__).resolve().parent.parent / "assets" / "tabletop_pi0"
"""The checkpoint that comes with the package."""
COMMON_NAMES = {
    *("pi05", "cameras", "image_size", "patch_size", "depth", "heads", "kv_heads", "head_dim", "vocab_size"),
    *("max_token_len", "action_dim", "action_horizon"),
}
"""Fields of `Pi0Config` that another project's `config.json` may have too, so they do not identify one of ours."""


LARGEST_SIZE = 1_000_000
LARGEST = {"depth": 1000, "vision_depth": 1000, "cameras": 100, "max_token_len": 100_000, "action_horizon": 100_000}
"""Upper limits of sizes, beyond which a file is wrong: what is larger would take hours and all memory to refuse."""


@dataclass(frozen=True)
class Pi0Config:
    """Sizes and variants of a Pi0 policy. The defaults are those of openpi's pi0 for LIBERO.

    Raises ValueError when a size is not plausible, or sizes contradict each other.
    """

    pi05: bool = False
    """Whether this is pi0.5: time enters through adaptive RMSNorm in the expert, and there is no state token."""
    cameras: int = 2
    """Number of cameras. A camera that openpi masks out is not part of the sequence."""
    image_size: int = 224
    patch_size: int = 14
    vision_width: int = 1152
    vision_depth: int = 27
    vision_heads: int = 16
    vision_mlp: int = 4304
    vlm_width: int = 2048
    vlm_mlp: int = 16384
    expert_width: int = 1024
    expert_mlp: int = 4096
    depth: int = 18
    """Number of layers of both the VLM and the expert: expert layer i reads the keys and values of VLM layer i."""
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256
    vocab_size: int = 257152
    max_token_len: int = 48
    """Number of language slots."""
    action_dim: int = 32
    """Width of the state token's input, of the noise and of the model's actions."""
    action_horizon: int = 50
    """Number of action slots of a sampled chunk."""
    robot_state_dim: int = 8
    """Width of the robot's state before it is padded to `action_dim`."""
    robot_action_dim: int = 7
    """Width of the robot's action, which comes first in `action_dim`."""
    normalisation: Literal["z_score", "quantile"] = "z_score"
    """How states and actions are scaled (openpi: z-score for pi0, quantiles for pi0.5)."""
    normalisation_epsilon: Literal["openpi", "lerobot"] = "openpi"
    """What keeps a spread from being zero. openpi adds 1e-6 everywhere; LeRobot adds 1e-8 to the state's standard
    deviation, and elsewhere divides by 1e-8 instead of zero."""
    state_in_prompt: bool = False
    """Whether the prompt contains the normalised state (openpi's `discrete_state_input`; always in LeRobot's pi0.5)."""
    delta_action_dims: int = 0
    """Number of leading dimensions of the raw state that are added to the action (openpi's `extra_delta_transform`)."""
    vision_float32: bool = False
    """Whether the vision tower stays in float32 when the rest is in bfloat16, as in LeRobot; openpi casts it too."""
    time_grid: Literal["accumulated", "exact"] = "accumulated"
    """How denoising times are computed: summed up in float32 as in openpi, or as 1 - k/n as in LeRobot."""

    def __post_init__(self) -> None:
        hints = _types()
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), hints[field.name]
            if kind is bool:
                valid, wanted = isinstance(value, bool), "true or false"
            elif kind is int:
                low, most = 0 if field.name == "delta_action_dims" else 1, LARGEST.get(field.name, LARGEST_SIZE)
                valid = isinstance(value, int) and not isinstance(value, bool) and low <= value <= most
                wanted = f"an int from {low} to {most}"
            else:
                valid = value in typing.get_args(kind)
                wanted = " or ".join(map(repr, typing.get_args(kind)))
            if not valid:
                raise ValueError(f"policy config: {field.name} is {shown(value)}, it must be {wanted}")
        if self.image_size % self.patch_size:
            raise ValueError("policy config: image_size must be a multiple of patch_size")
        if self.vision_width % self.vision_heads:
            raise ValueError("policy config: vision_width must be a multiple of vision_heads")
        if self.heads % self.kv_heads or self.head_dim % 2 or self.expert_width % 2:
            raise ValueError(
                "policy config: heads must be a multiple of kv_heads, head_dim and expert_width must be even"
            )
        if max(self.robot_state_dim, self.robot_action_dim) > self.action_dim:
            raise ValueError("policy config: robot_state_dim and robot_action_dim must not exceed action_dim")
        if self.delta_action_dims > min(self.robot_state_dim, self.robot_action_dim):
            raise ValueError(
                f"policy config: delta_action_dims is {self.delta_action_dims}, the robot's state has "
                f"{self.robot_state_dim} dimensions and its action {self.robot_action_dim}"
            )

    @property
    def image_tokens(self) -> int:
        """Number of tokens per camera."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def prefix_length(self) -> int:
        """Number of tokens of all cameras and language slots together."""
        return self.cameras * self.image_tokens + self.max_token_len

    @property
    def state_tokens(self) -> int:
        return 0 if self.pi05 else 1

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def wrote(cls, content: Mapping[str, Any]) -> bool:
        """Whether a JSON object is meant to be a `Pi0Config`."""
        return bool(content.keys() & {field.name for field in dataclasses.fields(cls)} - COMMON_NAMES)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], path: Path) -> Pi0Config:
        """Makes a config from the contents of its file, which has all sizes; missing conventions have their defaults.

        Raises ValueError naming the file when it is not valid.
        """
        unknown = sorted(content.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{path} has unknown fields: {', '.join(map(shown, unknown[:3]))}")
        sizes = [name for name, kind in _types().items() if kind is int]
        if missing := [name for name in ("pi05", *sizes) if name not in content]:
            raise ValueError(f"{path} lacks the fields {', '.join(missing)}")
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


@functools.cache
def _types() -> dict[str, Any]:
    return typing.get_type_hints(Pi0Config)


def tabletop_config(pi05: bool = False, state_in_prompt: bool = False) -> Pi0Config:
    """The embedded policy: a miniature Pi0 (about 0.7 M parameters) for the tabletop scene.

    With `pi05` a Pi0.5 with openpi's scaling by quantiles, which reads the state in the prompt or not at all.
    """
    config = Pi0Config(
        image_size=64,
        patch_size=16,
        vision_width=96,
        vision_depth=2,
        vision_heads=4,
        vision_mlp=192,
        vlm_width=96,
        vlm_mlp=256,
        expert_width=64,
        expert_mlp=192,
        depth=3,
        heads=4,
        head_dim=32,
        vocab_size=48,
        max_token_len=12,
        action_horizon=10,
    )
    if pi05:
        config = dataclasses.replace(config, pi05=True, normalisation="quantile")
    if state_in_prompt:  # eight numbers and the words around them, and a token for each of the 257 numbers
        config = dataclasses.replace(config, state_in_prompt=True, max_token_len=24, vocab_size=320)
    return config


def libero_small_config() -> Pi0Config:
    """A Pi0 for LIBERO that CPU cores can train (about 1 M parameters)."""
    return Pi0Config(
        image_size=96,
        patch_size=16,
        vision_width=128,
        vision_depth=2,
        vision_heads=4,
        vision_mlp=256,
        vlm_width=128,
        vlm_mlp=256,
        expert_width=96,
        expert_mlp=288,
        depth=3,
        heads=4,
        head_dim=32,
        vocab_size=96,
        max_token_len=24,
        action_horizon=10,
    )
