"""What openpi's model and LeRobot's copy of it share: how to import, resize and fill them."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dsrl_async.bench import synthetic

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
TIED_EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


def stand_in(name: str, **attributes: Any) -> None:
    """Makes `import name` return a module with only these attributes."""
    module = types.ModuleType(name)
    for key, value in attributes.items():
        setattr(module, key, value)
    sys.modules[name] = module
    package, _, child = name.rpartition(".")
    if package:
        setattr(importlib.import_module(package), child, module)


def gemma_sizes(config: synthetic.Sizes) -> tuple[types.SimpleNamespace, types.SimpleNamespace]:
    """The return values of `get_config` in openpi's gemma.py for the language model and the expert."""
    shared = {
        "depth": config["depth"],
        "num_heads": config["heads"],
        "num_kv_heads": config["kv_heads"],
        "head_dim": config["head_dim"],
    }
    return (
        types.SimpleNamespace(width=config["vlm_width"], mlp_dim=config["vlm_mlp"], **shared),
        types.SimpleNamespace(width=config["expert_width"], mlp_dim=config["expert_mlp"], **shared),
    )


@contextmanager
def resized(module: types.ModuleType, paligemma: str, expert: str, config: synthetic.Sizes) -> Iterator[None]:
    """Gives `config`'s sizes to the two transformers constructors that `module` calls with hard-coded ones."""

    def of_paligemma(hf: Any) -> None:
        hf.vision_config.hidden_size = config["vision_width"]
        hf.vision_config.num_hidden_layers = config["vision_depth"]
        hf.vision_config.num_attention_heads = config["vision_heads"]
        hf.vision_config.intermediate_size = config["vision_mlp"]
        hf.vision_config.projection_dim = config["vlm_width"]
        hf.text_config.vocab_size = config["vocab_size"]

    def of_expert(hf: Any) -> None:
        hf.vocab_size = 1  # only its language-model head has this size, which actions do not use

    def adjusted(constructor: Callable[..., Any], adjust: Callable[[Any], None]) -> Callable[..., Any]:
        def construct(config: Any) -> Any:
            adjust(config)
            return constructor(config=config)

        return construct

    originals = getattr(module, paligemma), getattr(module, expert)
    setattr(module, paligemma, adjusted(originals[0], of_paligemma))
    setattr(module, expert, adjusted(originals[1], of_expert))
    try:
        yield
    finally:
        setattr(module, paligemma, originals[0])
        setattr(module, expert, originals[1])


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int) -> None:
    """Fills a model made on the meta device with weights from a seed and recomputes transformers' buffers.

    It does so tensor by tensor, so that a full-size model takes no more memory than its weights.
    """
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        stored = synthetic.EMBEDDING if name == TIED_EMBEDDING else name
        parameter.copy_(torch.from_numpy(synthetic.weight(stored, parameter.shape, seed)))
    for name, buffer in model.named_buffers():
        module = model.get_submodule(name.rpartition(".")[0])
        match name.rpartition(".")[2]:
            case "position_ids":
                buffer.copy_(torch.arange(buffer.shape[-1]))
            case "inv_freq" | "original_inv_freq":
                exponent = torch.arange(0, module.config.head_dim, 2, dtype=torch.int64).float()
                buffer.copy_(1.0 / 10_000.0 ** (exponent / module.config.head_dim))
            case "embed_scale":
                buffer.fill_(module.embedding_dim**0.5)
            case _:
                raise RuntimeError(f"the buffer {name}, which the meta device left empty, is unknown")
    model.eval().requires_grad_(False)
