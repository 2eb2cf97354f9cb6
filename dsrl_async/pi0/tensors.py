"""The tensors of a policy: openpi's names and shapes, and where a checkpoint's files hold them.

This needs no torch: the same code finds a damaged checkpoint before a run starts, in a process without torch, and tells
the loader (`checkpoint.py`) what to read. It reads only the safetensors headers of the files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from dsrl_async.pi0 import foreign, rlinf
from dsrl_async.pi0.config import WEIGHTS, Pi0Config
from dsrl_async.pi0.names import (
    EMBEDDING,
    EXPERT,
    PROJECTOR,
    ROOT,
    TIED_EMBEDDING,
    VISION,
    VLM,
    Part,
    StoredTensor,
)
from dsrl_async.untrusted import (
    HEAD_BYTES,
    MEGABYTE,
    check_head,
    in_one_line,
    open_regular,
    parse_json,
    read_object,
    shown,
)

LEROBOT_PREFIX = "model."
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DDP, torch.compile, FSDP and activation checkpointing put between the parts of a name."""
FOREIGN = {
    "lora_": "is a LoRA adapter: merge it into the weights (PEFT's merge_and_unload) and save these",
    "normalize_inputs.": "is of LeRobot's Pi0 before its version 0.4, another network with its statistics inside: "
    "train it again, or convert openpi's checkpoint, with LeRobot 0.4 or later",
    ROOT + "paligemma.vision_tower.": "is named as transformers before 4.52 named it: save it again with a later one",
    ROOT + "paligemma.language_model.": "is named as transformers before 4.52 named it: save it again with a later one",
    "PaliGemma/": "is of openpi's JAX network: convert it as docs/pi0.md says",
}
"""Parts of names that say what a file of other tensors is, and what to do with it."""
RLINF_PREFIXES = (
    *("dsrl_action_noise_net.", "q_head.", "value_head.", "noise_head.", "rlt_module."),
    *("actor_image_encoder.", "actor_state_encoder.", "critic_image_encoder.", "critic_state_encoder."),
)
"""Modules that RLinf's reinforcement learning adds to openpi's policy and stores with it."""
LARGEST_HEADER = 8 * MEGABYTE
"""Of a safetensors file. openpi's 777 tensors take 0.1 MB."""
ELEMENT_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Bytes of the stored element types that can be loaded."""

VISION_WIDTH, VISION_HEADS = 1152, 16
HEADS, KV_HEADS, HEAD_DIM = 8, 1, 256
"""Numbers of heads, which shapes do not tell: those of SigLIP So400m, and of gemma_2b and gemma_300m."""

T = TypeVar("T")
JSON_TYPES: dict[type, str] = {dict: "a JSON object", list: "a list", str: "text"}


def model_tensors(config: Pi0Config) -> dict[str, list[Part]]:
    """Every parameter of `model.Pi0` by name, with the openpi tensors that make up its rows, in order."""
    table: dict[str, list[Part]] = {}

    def linear(parameter: str, name: str, rows: int, columns: int, bias: bool = True) -> None:
        table[parameter + ".weight"] = [Part(name + ".weight", (rows, columns))]
        if bias:
            table[parameter + ".bias"] = [Part(name + ".bias", (rows,))]

    def layer_norm(parameter: str, name: str, width: int) -> None:
        for kind in ("weight", "bias"):
            table[f"{parameter}.{kind}"] = [Part(f"{name}.{kind}", (width,))]

    def gemma_norm(parameter: str, name: str, width: int, adaptive: bool) -> None:
        if adaptive:
            linear(parameter + ".dense", name + ".dense", 3 * width, width)
        else:
            table[parameter + ".weight"] = [Part(name + ".weight", (width,))]

    def gemma(stack: str, root: str, width: int, mlp: int, adaptive: bool, last_keys_only: bool) -> None:
        for i in range(config.depth):
            parameter, name = f"{stack}.layers.{i}.", f"{root}layers.{i}."
            keys_only = last_keys_only and i == config.depth - 1
            gemma_norm(parameter + "attention_norm", name + "input_layernorm", width, adaptive)
            key_rows = config.kv_heads * config.head_dim
            rows = {"k": key_rows, "v": key_rows}
            if not keys_only:
                rows = {"q": config.heads * config.head_dim, **rows}
            table[parameter + "qkv.weight"] = [
                Part(f"{name}self_attn.{part}_proj.weight", (count, width)) for part, count in rows.items()
            ]
            if keys_only:
                continue
            linear(parameter + "out", name + "self_attn.o_proj", width, config.heads * config.head_dim, bias=False)
            gemma_norm(parameter + "mlp_norm", name + "post_attention_layernorm", width, adaptive)
            table[parameter + "gate_up.weight"] = [
                Part(f"{name}mlp.{part}_proj.weight", (mlp, width)) for part in ("gate", "up")
            ]
            linear(parameter + "down", name + "mlp.down_proj", width, mlp, bias=False)

    width, patch = config.vision_width, config.patch_size
    table["vision.patch.weight"] = [Part(VISION + "embeddings.patch_embedding.weight", (width, 3, patch, patch))]
    table["vision.patch.bias"] = [Part(VISION + "embeddings.patch_embedding.bias", (width,))]
    table["vision.position"] = [Part(VISION + "embeddings.position_embedding.weight", (config.image_tokens, width))]
    for i in range(config.vision_depth):
        parameter, name = f"vision.layers.{i}.", f"{VISION}encoder.layers.{i}."
        layer_norm(parameter + "attention_norm", name + "layer_norm1", width)
        for kind, shape in (("weight", (width, width)), ("bias", (width,))):
            table[f"{parameter}qkv.{kind}"] = [Part(f"{name}self_attn.{part}_proj.{kind}", shape) for part in "qkv"]
        linear(parameter + "out", name + "self_attn.out_proj", width, width)
        layer_norm(parameter + "mlp_norm", name + "layer_norm2", width)
        linear(parameter + "fc1", name + "mlp.fc1", config.vision_mlp, width)
        linear(parameter + "fc2", name + "mlp.fc2", width, config.vision_mlp)
    layer_norm("vision.norm", VISION + "post_layernorm", width)
    linear("vision.projector", PROJECTOR, config.vlm_width, width)
    table["embedding.weight"] = [Part(EMBEDDING, (config.vocab_size, config.vlm_width))]
    gemma("vlm", VLM, config.vlm_width, config.vlm_mlp, adaptive=False, last_keys_only=True)
    gemma("expert", EXPERT, config.expert_width, config.expert_mlp, config.pi05, last_keys_only=False)
    width = config.expert_width
    gemma_norm("expert_norm", EXPERT + "norm", width, config.pi05)
    linear("action_in", "action_in_proj", width, config.action_dim)
    linear("action_out", "action_out_proj", config.action_dim, width)
    time = "time_mlp_" if config.pi05 else "action_time_mlp_"
    linear("time_in", time + "in", width, width if config.pi05 else 2 * width)
    linear("time_out", time + "out", width, width)
    if not config.pi05:
        linear("state_in", "state_proj", width, config.action_dim)
    return table


def unused_tensors(config: Pi0Config) -> list[Part]:
    """The tensors that openpi stores and action sampling never reads.

    They are the expert's language-model head, the language model's final norm, and its last layer except keys and
    values. (The language model's own head is the embedding table.)
    """
    width, rows = config.vlm_width, config.heads * config.head_dim
    last = f"{VLM}layers.{config.depth - 1}."
    return [
        Part(last + "self_attn.q_proj.weight", (rows, width)),
        Part(last + "self_attn.o_proj.weight", (width, rows)),
        Part(last + "post_attention_layernorm.weight", (width,)),
        Part(last + "mlp.gate_proj.weight", (config.vlm_mlp, width)),
        Part(last + "mlp.up_proj.weight", (config.vlm_mlp, width)),
        Part(last + "mlp.down_proj.weight", (width, config.vlm_mlp)),
        Part(VLM + "norm.weight", (width,)),
        Part(ROOT + "gemma_expert.lm_head.weight", (config.vocab_size, config.expert_width)),
    ]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file.

    Raises ValueError, naming the file, when it is not one or does not have the length that its header says.
    """
    with open_regular(path) as file:
        check_head(file.read(HEAD_BYTES), path)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if length > min(os.fstat(file.fileno()).st_size, LARGEST_HEADER):
            raise ValueError(f"{path} is not a valid safetensors file: its header is said to have {length} bytes")
        header = file.read(length)
    try:
        with safe_open(path, "numpy"):  # checks header and length; maps the file but touches no tensor
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a valid safetensors file or is cut short, copy it again: {in_one_line(error)}"
        ) from None
    entries = parse_json(header, f"the header of {path}")
    entries.pop("__metadata__", None)
    start = 8 + length
    return {
        name: StoredTensor(
            path,
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            start + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in entries.items()
    }


def read_values(tensor: StoredTensor) -> Any:
    """A small stored tensor as nested lists of floats.

    Raises ValueError naming the file when it is not small, or not of a type of `ELEMENT_BYTES`.
    """
    where = f"{tensor.file}: tensor {shown(tensor.name)}"
    if tensor.dtype not in ELEMENT_BYTES:
        raise ValueError(f"{where} holds {tensor.dtype}, not one of {', '.join(ELEMENT_BYTES)}")
    if tensor.bytes > MEGABYTE:
        raise ValueError(f"{where} has {tensor.bytes} bytes, which is too much for a statistic")
    with open_regular(tensor.file) as file:
        file.seek(tensor.offset)
        content = file.read(tensor.bytes)
    if tensor.dtype == "BF16":  # the upper halves of float32
        values = (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(content, f"<f{ELEMENT_BYTES[tensor.dtype]}")
    with np.errstate(invalid="ignore"):  # NaN, of which the caller has to think
        return values.astype(np.float64).reshape(tensor.shape).tolist()


def find_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, or of those that hold a directory's weights, under openpi's names.

    What wraps a network, LeRobot's prefix and its old names of pi0's time MLP, and RLinf's own names (see `rlinf`) are
    translated, RLinf's additions are left out, and the embedding table is found under either name. Raises ValueError
    when there are no tensors, files are missing or damaged, a tensor exists twice, or the names are those of something
    else than a Pi0.
    """
    found: dict[str, StoredTensor] = {}
    for file in [path] if path.is_file() else weight_files(path):
        for name, tensor in read_header(file).items():
            name = ".".join(part for part in name.split(".") if part not in WRAPPERS).removeprefix(LEROBOT_PREFIX)
            if name in found:
                raise ValueError(
                    f"tensor {shown(name)} is both in {found[name].file} and in {file}: "
                    "keep the files of one checkpoint only"
                )
            found[name] = tensor
    found = _translate_names(found, path)
    found = {name: tensor for name, tensor in found.items() if not name.startswith(RLINF_PREFIXES)}
    if not is_pi05(found):
        for name in [name for name in found if name.startswith("time_mlp_") and f"action_{name}" not in found]:
            found[f"action_{name}"] = found.pop(name)
    if TIED_EMBEDDING in found:
        first = found.get(EMBEDDING, found[TIED_EMBEDDING])
        second = found[EMBEDDING] = found.pop(TIED_EMBEDDING)
        if first.shape != second.shape:
            raise ValueError(
                f"{second.file}: tensor '{second.name}' has shape {list(second.shape)}, '{first.name}', which is the "
                f"same table, has {list(first.shape)}"
            )
    return found


def _translate_names(names: Mapping[str, StoredTensor], source: Path) -> dict[str, StoredTensor]:
    """The tensors under openpi's names; raises ValueError, saying what the file is, when they are not of a Pi0."""
    for name, tensor in names.items():
        for part, what in FOREIGN.items():
            if part in name:
                raise ValueError(f"{tensor.file}: the tensor {shown(name)} {what}")
    if not names:
        raise ValueError(f"{source} has no tensors")
    names = rlinf.translate(names)
    if not any(name.startswith(ROOT) for name in names):
        name = next((name for name in names if ROOT in name), min(names))
        before, found, _ = name.partition(ROOT)
        mend = f"remove the {shown(before)} in front of the names" if found else foreign.what_network(source)
        raise ValueError(f"{names[name].file} has the tensor {shown(name)}, and none that begins with {ROOT}: {mend}")
    return names


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold a checkpoint's weights.

    They are model.safetensors, which openpi and LeRobot read, or those that an index names, or all but LeRobot's
    processors, as RLinf reads them. What else lies there, such as copies, is not read.
    """
    if not directory.is_dir():
        raise ValueError(f"there is no directory or safetensors file {directory}")
    try:
        names = sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except OSError as error:
        raise ValueError(f"{directory} cannot be read: {error.strerror}") from error
    foreign.check_directory(directory, names)
    if WEIGHTS in names:
        return [directory / WEIGHTS]
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    if len(indices) > 1:
        raise ValueError(f"{directory} has two indices of weights, {indices[0]} and {indices[1]}: keep one")
    if indices:
        return _indexed_files(directory / indices[0])
    processors = ("policy_preprocessor", "policy_postprocessor")
    files = [directory / name for name in names if name.endswith(".safetensors") and not name.startswith(processors)]
    if files:
        return files
    raise ValueError(foreign.without_weights(directory, names))


def _indexed_files(index: Path) -> list[Path]:
    """The files in an index's directory that it names."""
    names = sorted(set(map(str, field(read_object(index), "weight_map", dict, index).values())))
    if not names:
        raise ValueError(f"{index} names no files")
    return [file_beside(index, name) for name in names]


def file_beside(source: Path, name: str) -> Path:
    """The safetensors file that a file of the same directory names.

    Raises ValueError, naming `source`, when it is missing, or the name leads out of the directory or is none.
    """
    if name != os.path.basename(name) or not name.isprintable() or not name.endswith(".safetensors") or len(name) > 200:
        raise ValueError(f"{source} must name safetensors files beside it, not {shown(name)}")
    if not os.path.lexists(source.parent / name):
        raise ValueError(f"{source} names the file {name}, which is missing: copy the checkpoint again")
    return source.parent / name


def field(content: Mapping[str, Any], key: str, kind: type[T], path: Path) -> T:
    """An entry of a JSON object, empty if missing or null. Raises ValueError naming the file if it has another type."""
    value = content.get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise ValueError(f"{path}: {key} is {shown(value)}, it must be {JSON_TYPES[kind]}")
    return value


def is_pi05(tensors: Mapping[str, object]) -> bool:
    """Whether the expert's norms are adaptive. (In old LeRobot files pi0 has `time_mlp_in` too.)"""
    return any(name.startswith(EXPERT) and ".dense." in name for name in tensors)


def infer_config(tensors: Mapping[str, StoredTensor], source: Path) -> Pi0Config:
    """Infers a config from the shapes, the published head geometry and openpi's conventions for LIBERO.

    LIBERO has two cameras, an 8-dimensional state and 7-dimensional actions. pi0 has z-scores, 48 language slots and
    50 action slots, and adds the first six state dimensions to the actions. pi0.5 has quantiles, 200 language slots and
    10 action slots, and adds nothing.

    Raises ValueError, naming `source`, when a tensor is missing, or when the widths are not the published ones, so that
    the number of heads is unknown.
    """

    def size(name: str, axis: int) -> int:
        if name not in tensors:
            raise ValueError(f"{source} lacks the tensor '{name}'")
        shape = tensors[name].shape
        if axis >= len(shape):
            raise ValueError(f"{source}: tensor '{name}' has shape {list(shape)}, with too few axes")
        return shape[axis]

    def layers(prefix: str) -> int:
        indices = {name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)}
        return max((int(index) + 1 for index in indices if index.isdigit()), default=0)

    vision_width, patch = (size(VISION + "embeddings.patch_embedding.weight", axis) for axis in (0, 3))
    image_tokens = size(VISION + "embeddings.position_embedding.weight", 0)
    key_rows = size(EXPERT + "layers.0.self_attn.k_proj.weight", 0)
    if vision_width != VISION_WIDTH or key_rows != KV_HEADS * HEAD_DIM:
        raise ValueError(
            f"{source}: shapes do not tell how many attention heads there are, and a vision width of {vision_width} "
            f"with {key_rows} key rows is not a published size; load it from Python with an explicit Pi0Config"
        )
    pi05 = is_pi05(tensors)
    try:
        return Pi0Config(
            pi05=pi05,
            image_size=math.isqrt(image_tokens) * patch,
            patch_size=patch,
            vision_width=vision_width,
            vision_depth=layers(VISION + "encoder.layers."),
            vision_heads=VISION_HEADS,
            vision_mlp=size(VISION + "encoder.layers.0.mlp.fc1.weight", 0),
            vlm_width=size(EMBEDDING, 1),
            vlm_mlp=size(VLM + "layers.0.mlp.gate_proj.weight", 0),
            expert_width=size("action_in_proj.weight", 0),
            expert_mlp=size(EXPERT + "layers.0.mlp.gate_proj.weight", 0),
            depth=layers(EXPERT + "layers."),
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            vocab_size=size(EMBEDDING, 0),
            max_token_len=200 if pi05 else 48,
            action_dim=size("action_in_proj.weight", 1),
            action_horizon=10 if pi05 else 50,
            normalisation="quantile" if pi05 else "z_score",
            delta_action_dims=0 if pi05 else 6,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def check_tensors(config: Pi0Config, tensors: Mapping[str, StoredTensor], source: Path) -> None:
    """Compares the tensors of a checkpoint, under openpi's names, with those that the config asks for.

    Raises ValueError naming the tensor, and its file or `source`, when one is missing, unknown, of another shape or not
    of a floating-point type.
    """
    files = {tensor.file for tensor in tensors.values()}

    def called(name: str) -> str:
        stored = tensors[name].name
        return f"'{name}'" if stored.endswith(name) else f"'{name}' (in {shown(stored)})"

    expected = {part.name: part.shape for parts in model_tensors(config).values() for part in parts}
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"{files.pop() if len(files) == 1 else source} lacks the tensor '{name}'")
        if tensors[name].shape != shape:
            raise ValueError(
                f"{tensors[name].file}: tensor {called(name)} has shape {list(tensors[name].shape)}, "
                f"the config expects {list(shape)}"
            )
    known = {part.name for part in unused_tensors(config)}
    if unexpected := sorted(tensors.keys() - expected.keys() - known):
        others = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise ValueError(f"{tensors[unexpected[0]].file} has an unexpected tensor {shown(unexpected[0])}{others}")
    for name, tensor in tensors.items():
        if tensor.dtype not in ELEMENT_BYTES:
            raise ValueError(
                f"{tensor.file}: tensor '{name}' holds {tensor.dtype}, not one of {', '.join(ELEMENT_BYTES)}"
            )


def parameter_count(config: Pi0Config) -> int:
    """Number of parameters of a loaded policy."""
    return sum(math.prod(part.shape) for parts in model_tensors(config).values() for part in parts)
