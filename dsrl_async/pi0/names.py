"""Names of openpi's tensors, and where a file holds one. This needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = "paligemma_with_expert."
VISION = ROOT + "paligemma.model.vision_tower.vision_model."
PROJECTOR = ROOT + "paligemma.model.multi_modal_projector.linear"
VLM = ROOT + "paligemma.model.language_model."
EXPERT = ROOT + "gemma_expert.model."
EMBEDDING, TIED_EMBEDDING = ROOT + "paligemma.lm_head.weight", VLM + "embed_tokens.weight"
"""Two names of one table. openpi stores only the first. If both are stored, the second is read: it is the one that
openpi and LeRobot embed prompts with, so that the network that was saved computed with it, whatever the first holds."""


class Part(NamedTuple):
    """Name and shape of an openpi tensor."""

    name: str
    shape: tuple[int, ...]


class StoredTensor(NamedTuple):
    """Where a file holds a tensor: its name there, element type as safetensors spells it, first byte and length."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int
    transposed: bool = False
    """Whether the file holds the transpose of what `shape` says: a matrix column by column."""
