"""openpi's own PyTorch Pi0 and Pi0.5 at any size, with weights from a seed. Runs in .reference/openpi.

openpi fixes some sizes in its code and imports JAX for two helpers that inference does not need. Its files stay as they
are: stand-ins replace the imports, and the configurations are adjusted between openpi's code and the two transformers
constructors that it calls.
"""

from __future__ import annotations

import types

import numpy as np
import torch
import transformers  # noqa: F401  (it looks for pytest, so it comes before the stand-in)
from common import CAMERAS, fill, gemma_sizes, resized, stand_in
from torch import Tensor

from dsrl_async.bench import synthetic

stand_in("pytest", Cache=object)  # the package refers to a type of it by mistake
stand_in("openpi.models.gemma", get_config=lambda variant: variant)
stand_in("openpi.shared.image_tools")  # for resizing, which images of 224 x 224 do not need

from openpi.models_pytorch import gemma_pytorch, pi0_pytorch


def build(config: synthetic.Sizes, dtype: str, seed: int) -> pi0_pytorch.PI0Pytorch:
    """openpi's model. `dtype` is what openpi calls precision: "float32" or "bfloat16" (its mixed precision)."""
    paligemma, expert = gemma_sizes(config)
    settings = types.SimpleNamespace(
        pi05=config["pi05"],
        paligemma_variant=paligemma,
        action_expert_variant=expert,
        action_dim=config["action_dim"],
        action_horizon=config["action_horizon"],
        dtype=dtype,
    )
    constructors = "PaliGemmaForConditionalGeneration", "GemmaForCausalLM"
    with resized(gemma_pytorch, *constructors, config), torch.device("meta"):
        model = pi0_pytorch.PI0Pytorch(settings)
    del model.sample_actions  # the constructor's compiled version, which hides the class's method
    fill(model, seed)
    return model


def observation(inputs: dict[str, np.ndarray]) -> types.SimpleNamespace:
    """openpi's observation from `synthetic.observation`. The third camera is black and masked, as in LIBERO."""
    images = [torch.from_numpy(inputs["images"][:, camera]) for camera in range(inputs["images"].shape[1])]
    present = [True] * len(images) + [False] * (len(CAMERAS) - len(images))
    images += [torch.full_like(images[0], -1.0)] * (len(CAMERAS) - len(images))
    batch = len(inputs["state"])
    return types.SimpleNamespace(
        images=dict(zip(CAMERAS, images, strict=True)),
        image_masks={name: torch.full((batch,), there) for name, there in zip(CAMERAS, present, strict=True)},
        state=torch.from_numpy(inputs["state"]),
        tokenized_prompt=torch.from_numpy(inputs["tokens"]),
        tokenized_prompt_mask=torch.from_numpy(inputs["token_mask"]),
        token_ar_mask=None,
        token_loss_mask=None,
    )


def sample(model: pi0_pytorch.PI0Pytorch, inputs: dict[str, np.ndarray], denoise_steps: int) -> Tensor:
    """Normalised actions [B, H, action_dim]."""
    noise = torch.from_numpy(inputs["noise"])
    return model.sample_actions("cpu", observation(inputs), noise=noise, num_steps=denoise_steps)
