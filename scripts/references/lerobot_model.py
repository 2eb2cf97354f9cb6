"""LeRobot's Pi0 and Pi0.5 at any size, with weights from a seed. Runs in .reference/lerobot.

The two network modules run on Python 3.11, but LeRobot's packages import much that does not, and that sampling does not
use. So the packages are entered without running their `__init__`, and stand-ins replace base classes and
configurations, of which the networks read only a few fields.
"""

from __future__ import annotations

import importlib
import importlib.util
import types
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from common import CAMERAS, fill, gemma_sizes, resized, stand_in
from torch import Tensor

from dsrl_async.bench import synthetic

specification = importlib.util.find_spec("lerobot")
assert specification is not None
assert specification.submodule_search_locations
PACKAGE = Path(specification.submodule_search_locations[0])
for package in ("", "policies", "policies.pi0", "policies.pi05", "policies.rtc", "utils"):
    stand_in(f"lerobot.{package}".rstrip("."), __path__=[str(PACKAGE / package.replace(".", "/"))])
stand_in("lerobot.configs", PreTrainedConfig=object)
stand_in("lerobot.policies.pretrained", PreTrainedPolicy=object, T=TypeVar("T"))
stand_in("lerobot.policies.rtc.modeling_rtc", RTCProcessor=object)
stand_in("lerobot.utils.import_utils", _transformers_available=True, require_package=lambda *names, **options: None)
for variant in ("pi0", "pi05"):
    contents: dict[str, Any] = {f"{variant.upper()}Config": object, "DEFAULT_IMAGE_SIZE": 224}
    stand_in(f"lerobot.policies.{variant}.configuration_{variant}", **contents)


def build(config: synthetic.Sizes, dtype: str, seed: int) -> torch.nn.Module:
    """LeRobot's network. Its "bfloat16" keeps the vision tower in float32."""
    variant = "pi05" if config["pi05"] else "pi0"
    module = importlib.import_module(f"lerobot.policies.{variant}.modeling_{variant}")
    module.get_gemma_config = lambda sizes: sizes
    paligemma, expert = gemma_sizes(config)
    settings = types.SimpleNamespace(
        paligemma_variant=paligemma,
        action_expert_variant=expert,
        dtype=dtype,
        image_resolution=(config["image_size"], config["image_size"]),
        freeze_vision_encoder=False,
        train_expert_only=False,
        max_action_dim=config["action_dim"],
        max_state_dim=config["action_dim"],
        chunk_size=config["action_horizon"],
        min_period=4e-3,
        max_period=4.0,
        compile_model=False,
        rtc_config=None,
    )
    constructors = "PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM"
    with resized(module, *constructors, config), torch.device("meta"):
        model = (module.PI05Pytorch if config["pi05"] else module.PI0Pytorch)(settings)
    fill(model, seed)
    return model


def sample(model: torch.nn.Module, inputs: dict[str, np.ndarray], denoise_steps: int) -> Tensor:
    """Normalised actions [B, H, action_dim]. The third camera is black and masked."""
    images = [torch.from_numpy(inputs["images"][:, camera]) for camera in range(inputs["images"].shape[1])]
    present = [True] * len(images) + [False] * (len(CAMERAS) - len(images))
    images += [torch.full_like(images[0], -1.0)] * (len(CAMERAS) - len(images))
    masks = [torch.full((len(inputs["state"]),), there) for there in present]
    prompt = torch.from_numpy(inputs["tokens"]), torch.from_numpy(inputs["token_mask"])
    state = () if type(model).__name__ == "PI05Pytorch" else (torch.from_numpy(inputs["state"]),)
    noise = torch.from_numpy(inputs["noise"])
    return model.sample_actions(images, masks, *prompt, *state, noise=noise, num_steps=denoise_steps)
