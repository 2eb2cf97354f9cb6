"""What a directory or a network is when it is no Pi0, and what to give instead. This needs no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from dsrl_async.pi0.config import CONFIG, WEIGHTS
from dsrl_async.untrusted import read_object, shown

ADAPTER = "adapter_"
"""How the names of PEFT's files begin."""
PICKLES = ("pt", "pth", "bin", "ckpt", "pkl")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "paligemma_tokenizer.model")
TRANSFORMERS = {
    "paligemma": "PaliGemma, which a Pi0 is trained from: give a Pi0",
    "siglip": "SigLIP, a part of a Pi0: give a Pi0",
    "siglip_vision_model": "SigLIP, a part of a Pi0: give a Pi0",
    "gemma": "Gemma, a part of a Pi0: give a Pi0",
    "openvla": "OpenVLA, which says its actions in tokens: it has no noise to choose",
}
"""`model_type` in transformers' config.json -> what that network is."""


def check_directory(directory: Path, names: Sequence[str]) -> None:
    """Raises ValueError, saying what it is, for a directory that cannot be a Pi0's whatever weights lie in it.

    `names` are those of its files and directories that are not hidden.
    """
    if adapters := [name for name in names if name.startswith(ADAPTER)]:
        raise ValueError(
            f"{directory / adapters[0]} is of a LoRA adapter: merge it into the weights (PEFT's merge_and_unload) and "
            "save these in a directory of their own"
        )
    if {"state.json", "agent.safetensors"} <= set(names):
        raise ValueError(
            f"policy checkpoint {directory} is a checkpoint of a run of this project, which holds an agent and no "
            f"policy: {_HOW_TO_USE_A_RUN}"
        )
    if "config.yaml" in names and {"checkpoints", "made_with.json", "summary.json"} & set(names):
        raise ValueError(
            f"policy checkpoint {directory} is the directory of a run of this project, which steers a policy and holds "
            f"none: {_HOW_TO_USE_A_RUN}"
        )


_HOW_TO_USE_A_RUN = (
    "it is for launch --resume and evaluate --checkpoint; the policy that it steers stands in the run's config.yaml"
)


def without_weights(directory: Path, names: Sequence[str]) -> str:
    """A sentence about a directory that has no weights; `names` as in `check_directory`."""
    here = f"policy checkpoint {directory}"
    if not names:
        return f"{here} is empty: copy or download the checkpoint again"
    if (directory / "params").is_dir() or {"_METADATA", "manifest.ocdbt"} & set(names):
        return (
            f"{here} is a JAX checkpoint: convert it with openpi's "
            "examples/convert_jax_model_to_pytorch.py, as docs/pi0.md says"
        )
    if (directory / "meta" / "info.json").is_file():
        return f"{here} is a data set of LeRobot, and no policy: give a policy that was trained on it"
    if nested := up_to_three_down(directory, WEIGHTS):
        last = next((path for path in nested if "last" in path.parts), nested[-1])
        return f"{here} has no model.safetensors: give the directory {last.parent}, which has one"
    for kind in PICKLES:
        if pickles := up_to_three_down(directory, f"*.{kind}"):
            return (
                f"{here} has no model.safetensors, only {pickles[0].relative_to(directory)}, "
                "and pickled weights are never loaded: convert them to safetensors, as docs/pi0.md says"
            )
    if nested := up_to_three_down(directory, "_METADATA"):
        place = nested[-1].parent
        place = place.parent if place.name == "params" else place
        return f"{here} holds JAX checkpoints, such as {place}: convert one, as docs/pi0.md says"
    if any(name in names for name in TOKENIZERS) and CONFIG not in names:
        return f"{here} has a tokenizer and no weights: it is for policy.tokenizer"
    return f"{here} has no model.safetensors (nor other safetensors files), but {_listed(names)}"


def _listed(names: Sequence[str]) -> str:
    words = ", ".join(shown(name) for name in names[:3])
    return words if len(names) <= 3 else f"{words} and {len(names) - 3} more"


def what_network(source: Path) -> str:
    """What the tensors of a file or a directory are of, as far as the config.json beside them tells."""
    path = (source if source.is_dir() else source.parent) / CONFIG
    with contextlib.suppress(ValueError):
        if os.path.lexists(path):
            content = read_object(path)
            kind, classes = content.get("model_type"), content.get("architectures")
            if isinstance(kind, str):
                return f"{path} says that it is {TRANSFORMERS.get(kind, f'of transformers, of type {shown(kind)}')}"
            if isinstance(classes, list) and classes:
                return f"{path} says that it is of the class {shown(classes[0])}"
    return "it is not of a Pi0"


def up_to_three_down(directory: Path, pattern: str) -> list[Path]:
    """Files of a directory, and of its directories three levels down, by their names."""
    return [path for depth in range(4) for path in sorted(directory.glob("*/" * depth + pattern))]
