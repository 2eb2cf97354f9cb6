"""A network's tensors as RLinf names and lays them out, made with PyTorch from those under openpi's names.

Written from RLinf's network and its converters (`rlinf/utils/ckpt_convertor/openpi` at a3816b5), and not from
`dsrl_async.pi0.rlinf`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
EXPERTS = ("paligemma_with_expert.paligemma.model.language_model.", "paligemma_with_expert.gemma_expert.model.")
NORMS = {"input_layernorm": "pre_attention_norms", "post_attention_layernorm": "pre_ffw_norms"}
NOT_KEPT = "paligemma_with_expert.gemma_expert.lm_head.weight"
"""The one tensor of openpi's that RLinf's network does not have."""


def to_rlinf(openpi: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Takes openpi's tensors, all of them, and returns RLinf's. Raises KeyError for a name that it does not know."""
    left = dict(openpi)
    left.pop(NOT_KEPT)
    made: dict[str, Tensor] = {
        "img.pos_embedding": left.pop(VISION + "embeddings.position_embedding.weight").unsqueeze(0),
        "llm.embedder.embedding.weight": left.pop("paligemma_with_expert.paligemma.lm_head.weight"),
    }
    for kind in ("weight", "bias"):
        made[f"img.stem.{kind}"] = left.pop(f"{VISION}embeddings.patch_embedding.{kind}")
        made[f"img.encoder.norm.{kind}"] = left.pop(f"{VISION}post_layernorm.{kind}")
        made[f"img.head.{kind}"] = left.pop(
            f"paligemma_with_expert.paligemma.model.multi_modal_projector.linear.{kind}"
        )
    for i in layers(openpi, VISION + "encoder."):
        old, new = f"{VISION}encoder.layers.{i}.", f"img.encoder.layers.{i}."
        for kind in ("weight", "bias"):
            made[f"{new}norm1.{kind}"] = left.pop(f"{old}layer_norm1.{kind}")
            made[f"{new}norm2.{kind}"] = left.pop(f"{old}layer_norm2.{kind}")
            three = [left.pop(f"{old}self_attn.{name}_proj.{kind}") for name in ("q", "k", "v")]
            made[f"{new}attn.in_proj_{kind}"] = torch.cat(three)  # torch.nn.MultiheadAttention's own name
            made[f"{new}attn.out_proj.{kind}"] = left.pop(f"{old}self_attn.out_proj.{kind}")
            for name in ("fc1", "fc2"):
                made[f"{new}mlp.{name}.{kind}"] = left.pop(f"{old}mlp.{name}.{kind}")
    for number, root in enumerate(EXPERTS):
        for i in layers(openpi, root):
            old, new = f"{root}layers.{i}.", f"llm.layers.{i}."
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                made[f"{new}attn.{name}.{number}.weight"] = left.pop(f"{old}self_attn.{name}.weight")
            gate, up = (left.pop(f"{old}mlp.{name}_proj.weight").T for name in ("gate", "up"))
            made[f"{new}mlps.{number}.w_gating"] = torch.stack([gate, up])
            made[f"{new}mlps.{number}.w_linear"] = left.pop(f"{old}mlp.down_proj.weight").T
        pattern = re.compile(re.escape(root) + r"(?:layers\.(\d+)\.(\w+)|norm)\.(weight|dense\.(?:weight|bias))")
        for name in list(left):
            if (found := pattern.fullmatch(name)) is not None:
                layer, norm, kind = found.groups()
                where = "llm.final_norms" if layer is None else f"llm.layers.{layer}.{NORMS[norm]}"
                kind = "scale" if kind == "weight" else kind.replace("dense", "ada_modulation")
                made[f"{where}.{number}.{kind}"] = left.pop(name)
    for name in list(left):
        if name.startswith(("action_", "time_mlp_", "state_proj")):
            made[name] = left.pop(name)
    if left:
        raise KeyError(f"RLinf has no place for {sorted(left)}")
    return {name: tensor.contiguous() for name, tensor in made.items()}


def layers(tensors: Mapping[str, Tensor], root: str) -> list[int]:
    found = {re.match(re.escape(root) + r"layers\.(\d+)\.", name) for name in tensors}
    return sorted({int(match[1]) for match in found if match is not None})
