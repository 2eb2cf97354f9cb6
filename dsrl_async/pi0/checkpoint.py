"""Policy checkpoints: a directory with weights under openpi's tensor names, config, norm stats, tokenizer.

`model.safetensors` holds the tensors that the policy uses, at any size. Tensors that openpi stores but
action sampling never reads (language-model heads, the language model's final norm, the last VLM layer
beyond its keys and values) are ignored when loading and not written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsrl_async.pi0.config import CONFIG, EMBEDDED_POLICY, NORM_STATS, TOKENIZER, WEIGHTS, Pi0Config
from dsrl_async.pi0.model import GemmaLayer, GemmaNorm, Pi0, VisionLayer
from dsrl_async.pi0.processing import (
    Normaliser,
    NormStats,
    PromptTokenizer,
    load_norm_stats,
    save_norm_stats,
)
from dsrl_async.pi0.sampler import Sampler

_ROOT = "paligemma_with_expert."
_VISION = _ROOT + "paligemma.model.vision_tower.vision_model."
_PROJECTOR = _ROOT + "paligemma.model.multi_modal_projector.linear."
_VLM = _ROOT + "paligemma.model.language_model."
_EXPERT = _ROOT + "gemma_expert.model."
_EMBEDDING = (_ROOT + "paligemma.lm_head.weight", _VLM + "embed_tokens.weight")
"""The tied embedding table is stored under either name (openpi writes the first)."""


@dataclass
class LoadedPolicy:
    """A policy ready to sample."""

    config: Pi0Config
    model: Pi0
    normaliser: Normaliser
    tokenizer: PromptTokenizer

    def sampler(self, batch_size: int, denoise_steps: int = 10) -> Sampler:
        return Sampler(self.model, self.normaliser, batch_size, denoise_steps)


def _affine(module: nn.Module, name: str) -> Iterator[tuple[Tensor, list[str], list[int]]]:
    for kind, parameter in module.named_parameters(recurse=False):
        yield parameter, [f"{name}{kind}"], [parameter.shape[0]]


def _norm(norm: GemmaNorm, name: str) -> Iterator[tuple[Tensor, list[str], list[int]]]:
    yield from _affine(norm.dense, name + "dense.") if norm.adaptive else _affine(norm, name)


def _gemma(layer: GemmaLayer, name: str) -> Iterator[tuple[Tensor, list[str], list[int]]]:
    attention, dim = name + "self_attn.", layer.head_dim
    yield from _norm(layer.attention_norm, name + "input_layernorm.")
    parts = [("k", layer.kv_heads * dim), ("v", layer.kv_heads * dim)]
    if hasattr(layer, "out"):
        parts.insert(0, ("q", layer.heads * dim))
    names = [f"{attention}{part}_proj.weight" for part, _ in parts]
    yield layer.qkv.weight, names, [rows for _, rows in parts]
    if hasattr(layer, "out"):
        yield from _affine(layer.out, attention + "o_proj.")
        yield from _norm(layer.mlp_norm, name + "post_attention_layernorm.")
        names = [f"{name}mlp.{part}_proj.weight" for part in ("gate", "up")]
        yield layer.gate_up.weight, names, [layer.gate_up.out_features // 2] * 2
        yield from _affine(layer.down, name + "mlp.down_proj.")


def _layout(model: Pi0) -> Iterator[tuple[Tensor, list[str], list[int]]]:
    """Every parameter, the openpi tensors it consists of, and how many of its rows each one has."""
    vision = model.vision
    yield from _affine(vision.patch, _VISION + "embeddings.patch_embedding.")
    yield vision.position, [_VISION + "embeddings.position_embedding.weight"], [vision.position.shape[0]]
    for index, block in enumerate(vision.layers):
        assert isinstance(block, VisionLayer)
        name = f"{_VISION}encoder.layers.{index}."
        yield from _affine(block.attention_norm, name + "layer_norm1.")
        for parameter, kind in ((block.qkv.weight, "weight"), (block.qkv.bias, "bias")):
            names = [f"{name}self_attn.{part}_proj.{kind}" for part in "qkv"]
            yield parameter, names, [block.out.out_features] * 3
        yield from _affine(block.out, name + "self_attn.out_proj.")
        yield from _affine(block.mlp_norm, name + "layer_norm2.")
        yield from _affine(block.fc1, name + "mlp.fc1.")
        yield from _affine(block.fc2, name + "mlp.fc2.")
    yield from _affine(vision.norm, _VISION + "post_layernorm.")
    yield from _affine(vision.projector, _PROJECTOR)
    yield model.embedding.weight, [_EMBEDDING[0]], [model.embedding.num_embeddings]
    for stack, root in ((model.vlm, _VLM), (model.expert, _EXPERT)):
        for index, layer in enumerate(stack.blocks):
            yield from _gemma(layer, f"{root}layers.{index}.")
    yield from _norm(model.expert_norm, _EXPERT + "norm.")
    yield from _affine(model.action_in, "action_in_proj.")
    yield from _affine(model.action_out, "action_out_proj.")
    time = "time_mlp_" if model.config.pi05 else "action_time_mlp_"
    yield from _affine(model.time_in, time + "in.")
    yield from _affine(model.time_out, time + "out.")
    if not model.config.pi05:
        yield from _affine(model.state_in, "state_proj.")


def _unused(config: Pi0Config) -> set[str]:
    """openpi tensors that action sampling never reads."""
    last = f"{_VLM}layers.{config.depth - 1}."
    names = ["self_attn.q_proj", "self_attn.o_proj", "post_attention_layernorm"]
    names += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    unused = {f"{last}{name}.weight" for name in names}
    return unused | {_VLM + "norm.weight", _ROOT + "gemma_expert.lm_head.weight", *_EMBEDDING}


def export_tensors(model: Pi0) -> dict[str, Tensor]:
    """The model's weights under openpi's names."""
    return {
        name: part.detach().contiguous()
        for parameter, names, rows in _layout(model)
        for name, part in zip(names, parameter.split(rows), strict=True)
    }


@torch.no_grad()
def import_tensors(model: Pi0, tensors: dict[str, Tensor], source: str = "checkpoint") -> None:
    """Fills the model from tensors under openpi's names, cast to the model's dtypes.

    Raises ValueError naming `source` and the tensor when one is missing, unexpected or of another shape.
    """
    tensors = dict(tensors)
    first, second = _EMBEDDING
    if first not in tensors and second in tensors:
        tensors[first] = tensors[second]
    known = _unused(model.config)
    for parameter, names, rows in _layout(model):
        known.update(names)
        for name, part in zip(names, parameter.split(rows), strict=True):
            if name not in tensors:
                raise ValueError(f"{source} lacks the tensor '{name}'")
            if tensors[name].shape != part.shape:
                found, expected = list(tensors[name].shape), list(part.shape)
                raise ValueError(f"{source}: tensor '{name}' has shape {found}, the config expects {expected}")
            part.copy_(tensors[name])
    unexpected = sorted(tensors.keys() - known)
    if unexpected:
        others = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise ValueError(f"{source} has an unexpected tensor '{unexpected[0]}'{others}")


def save_policy(directory: Path | str, model: Pi0, stats: NormStats, tokenizer: PromptTokenizer) -> None:
    """Writes a checkpoint that `load_policy` reads; the directory is made if need be."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(export_tensors(model), directory / WEIGHTS)
    model.config.save(directory / CONFIG)
    save_norm_stats(stats, directory / NORM_STATS)
    tokenizer.tokenizer.save(str(directory / TOKENIZER))


def load_policy(
    directory: Path | str = EMBEDDED_POLICY,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LoadedPolicy:
    """Reads a checkpoint directory; without arguments, the embedded tabletop policy.

    `dtype` is that of the transformer stacks (bfloat16 follows openpi's mixed precision). Raises
    ValueError, naming the file, when something is missing or does not fit.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"policy checkpoint {directory} is not a directory")
    for name in (WEIGHTS, CONFIG, NORM_STATS, TOKENIZER):
        if not (directory / name).is_file():
            raise ValueError(f"policy checkpoint {directory} has no {name}")
    config = Pi0Config.load(directory / CONFIG)
    stats_file = directory / NORM_STATS
    normaliser = Normaliser(config, load_norm_stats(stats_file), str(stats_file)).to(device)
    tokenizer = PromptTokenizer.load(directory / TOKENIZER, config.max_token_len)
    weights = directory / WEIGHTS
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a valid safetensors file: {error}") from None
    model = Pi0(config).set_dtype(dtype)
    import_tensors(model, tensors, str(weights))
    model.to(device).eval().requires_grad_(False)
    return LoadedPolicy(config, model, normaliser, tokenizer)
