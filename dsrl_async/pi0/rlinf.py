"""RLinf's own names and layouts of a Pi0's tensors, found in a file under openpi's names. This needs no torch.

RLinf's network (`rlinf/models/embodiment/openpi_rlinf/pi0_model` at a3816b5) fuses a vision layer's queries, keys and
values into one matrix, holds the matrices of Gemma's MLPs transposed, gate and up in one tensor, and numbers the two
experts behind a part's name: 0 is the language model, 1 the action expert. What is stored is the same otherwise:
Gemma's scales, for instance, are without the 1 in both. Nothing is read or copied here: a part of a fused tensor is a
stretch of its bytes, and the loader transposes what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dsrl_async.pi0.names import EMBEDDING, EXPERT, PROJECTOR, ROOT, VISION, VLM, StoredTensor
from dsrl_async.untrusted import shown

PREFIXES = ("img.", "llm.")
"""How names begin that only RLinf uses. Its action and time projections are called as openpi calls them."""
EXPERT_NORM = ".1.scale"
"""How the names of the expert's norms end in a Pi0; in a Pi0.5 they are adaptive and called `ada_modulation`."""


class Entry(NamedTuple):
    """What one of RLinf's tensors holds."""

    parts: tuple[str, ...]
    """openpi's names of the tensors that lie in it one after another."""
    axes: int
    """Number of axes as RLinf stores it."""
    take: Callable[[tuple[int, ...]], tuple[int, ...] | None]
    """Shape as stored -> shape of one of its parts as stored, None if it cannot be."""
    transposed: bool = False


def _same(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def _thirds(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Queries, keys and values, row after row."""
    return (shape[0] // 3, *shape[1:]) if shape[0] % 3 == 0 else None


def _first_of(count: int) -> Callable[[tuple[int, ...]], tuple[int, ...] | None]:
    """One of the entries along a first axis of length `count`."""

    def take(shape: tuple[int, ...]) -> tuple[int, ...] | None:
        return shape[1:] if shape[0] == count else None

    return take


def layout(vision_depth: int, depth: int, adaptive: bool) -> dict[str, Entry]:
    """RLinf's name of every tensor that it names in its own way -> what it holds.

    `adaptive` says whether the expert's norms are: in a Pi0.5.
    """
    table: dict[str, Entry] = {}

    def renamed(name: str, part: str, axes: int) -> None:
        table[name] = Entry((part,), axes, _same)

    def with_bias(name: str, part: str, axes: int = 2) -> None:
        renamed(f"{name}.weight", f"{part}.weight", axes)
        renamed(f"{name}.bias", f"{part}.bias", 1)

    def norm(name: str, part: str, expert: int) -> None:
        if expert == 1 and adaptive:
            with_bias(f"{name}.1.ada_modulation", f"{part}.dense")
        else:
            renamed(f"{name}.{expert}.scale", f"{part}.weight", 1)

    with_bias("img.stem", VISION + "embeddings.patch_embedding", 4)
    table["img.pos_embedding"] = Entry((VISION + "embeddings.position_embedding.weight",), 3, _first_of(1))
    for i in range(vision_depth):
        name, part = f"img.encoder.layers.{i}.", f"{VISION}encoder.layers.{i}."
        for number in (1, 2):
            with_bias(f"{name}norm{number}", f"{part}layer_norm{number}", 1)
            with_bias(f"{name}mlp.fc{number}", f"{part}mlp.fc{number}")
        for kind, axes in (("weight", 2), ("bias", 1)):
            parts = tuple(f"{part}self_attn.{letter}_proj.{kind}" for letter in "qkv")
            table[f"{name}attn.in_proj_{kind}"] = Entry(parts, axes, _thirds)
        with_bias(f"{name}attn.out_proj", f"{part}self_attn.out_proj")
    with_bias("img.encoder.norm", VISION + "post_layernorm", 1)
    with_bias("img.head", PROJECTOR)
    renamed("llm.embedder.embedding.weight", EMBEDDING, 2)
    for expert, root in enumerate((VLM, EXPERT)):
        for i in range(depth):
            name, part = f"llm.layers.{i}.", f"{root}layers.{i}."
            for letter in "qkvo":
                renamed(f"{name}attn.{letter}_proj.{expert}.weight", f"{part}self_attn.{letter}_proj.weight", 2)
            norm(f"{name}pre_attention_norms", part + "input_layernorm", expert)
            norm(f"{name}pre_ffw_norms", part + "post_attention_layernorm", expert)
            gate_and_up = tuple(f"{part}mlp.{word}_proj.weight" for word in ("gate", "up"))
            table[f"{name}mlps.{expert}.w_gating"] = Entry(gate_and_up, 3, _first_of(2), transposed=True)
            table[f"{name}mlps.{expert}.w_linear"] = Entry((f"{part}mlp.down_proj.weight",), 2, _same, transposed=True)
        norm("llm.final_norms", root + "norm", expert)
    return table


def translate(found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint under openpi's names, those that RLinf does not name in its own way as they are.

    Raises ValueError, naming file and tensor, when some have RLinf's names and others openpi's, or when one of RLinf's
    is missing, unknown, or of a shape that it cannot have.
    """
    own = {name: tensor for name, tensor in found.items() if name.startswith(PREFIXES)}
    if not own:
        return dict(found)
    first = next(iter(own))
    if other := next((name for name in found if name.startswith(ROOT)), None):
        raise ValueError(
            f"{own[first].file} has the tensor {shown(first)}, as RLinf names it, and {found[other].file} has "
            f"{shown(other)}, as openpi names it: keep the files of one checkpoint, with names of one kind"
        )
    depths = (_depth(own, "img.encoder.layers."), _depth(own, "llm.layers."))
    table = layout(*depths, adaptive=any(".ada_modulation." in name for name in own))
    if unknown := next((name for name in own if name not in table), None):
        raise ValueError(f"{own[unknown].file} has the tensor {shown(unknown)}, which RLinf's Pi0 has not")
    if missing := next((name for name in table if name not in own), None):
        raise ValueError(f"{own[first].file} lacks the tensor '{missing}'{_why_missing(missing)}")
    translated = {name: tensor for name, tensor in found.items() if name not in own}
    for name, tensor in own.items():
        translated |= _parts(name, tensor, table[name])
    return translated


def _depth(names: Mapping[str, Any], prefix: str) -> int:
    """Number of layers: one more than the largest number behind the prefix, but no more than there are tensors."""
    numbers = {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}
    deepest = max((int(number) + 1 for number in numbers if number.isdecimal() and len(number) < 10), default=0)
    return min(deepest, len(names))


def _why_missing(name: str) -> str:
    if name.endswith(EXPERT_NORM):
        return (
            ": RLinf's openpi_pytorch_to_openpi_rlinf leaves the norms of a Pi0's expert out; "
            "give the checkpoint that it was made from"
        )
    return ""


def _parts(name: str, tensor: StoredTensor, entry: Entry) -> dict[str, StoredTensor]:
    """openpi's tensors in one of RLinf's."""
    shape = entry.take(tensor.shape) if len(tensor.shape) == entry.axes else None
    if shape is None:
        raise ValueError(f"{tensor.file}: tensor {shown(name)} has shape {list(tensor.shape)}, which RLinf's has not")
    size = tensor.bytes // len(entry.parts)
    return {
        part: tensor._replace(
            shape=shape[::-1] if entry.transposed else shape,
            offset=tensor.offset + number * size,
            bytes=size,
            transposed=entry.transposed,
        )
        for number, part in enumerate(entry.parts)
    }
