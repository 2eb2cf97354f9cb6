"""Weights: from the checkpoints of openpi, RLinf, LeRobot and this project into the model, and back to disk.

The model is made without memory. Every parameter then gets its memory once, in its final dtype and on its final device,
and the files are read into it piece by piece. Nothing is mapped and nothing is held twice, so loading needs memory for
the weights and one staging buffer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dsrl_async.pi0.config import CONFIG, EMBEDDED_POLICY, NORM_STATS, TOKENIZER, WEIGHTS, Pi0Config
from dsrl_async.pi0.files import NormStats, PolicyFiles, find_policy, make_config, read_content, save_norm_stats
from dsrl_async.pi0.fp8 import rows_to_fill, use_fp8
from dsrl_async.pi0.memory import fp8_weights
from dsrl_async.pi0.model import Pi0, rope_frequency, time_frequency
from dsrl_async.pi0.names import Part, StoredTensor
from dsrl_async.pi0.processing import Normaliser, PromptTokenizer
from dsrl_async.pi0.tensors import check_tensors, find_tensors, model_tensors

STAGING_BYTES = 32 << 20
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass
class LoadedPolicy:
    """A policy that is ready to sample."""

    config: Pi0Config
    model: Pi0
    normaliser: Normaliser
    tokenizer: PromptTokenizer


def do_nothing() -> None:
    """Nobody wants to know of progress."""


def parts_of(model: Pi0) -> Iterator[tuple[Part, Tensor]]:
    """Every openpi tensor of the model, with a view of the rows of a parameter that hold it."""
    for parameter, parts in model_tensors(model.config).items():
        rows = model.get_parameter(parameter).split([part.shape[0] for part in parts])
        yield from zip(parts, rows, strict=True)


def export_tensors(model: Pi0) -> dict[str, Tensor]:
    """The model's weights under openpi's names."""
    return {part.name: rows.detach().contiguous() for part, rows in parts_of(model)}


def load_model(
    path: Path | str,
    config: Pi0Config | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Pi0:
    """Reads only the network, from a safetensors file or from a directory of them in any of the layouts.

    Without a `config`, one is made from the tensors (and the directory's config.json), which requires the published
    head geometry (`tensors.infer_config`). `dtype` is that of the transformer stacks; bfloat16 leaves in float32 what
    openpi leaves. Raises ValueError, naming file and tensor, when something does not fit.
    """
    path = Path(path)
    tensors = find_tensors(path)
    if config is None:
        config = make_config({} if path.is_file() else read_content(path), path, tensors)
    check_tensors(config, tensors, path)
    return _read_model(config, tensors, device, dtype)


class WithoutCompiler(TorchFunctionMode):
    """Keeps torch from importing its compiler for a model on the meta device, which takes a second and 100 MB.

    It would for random numbers and ranges: weights are left as they are there, and ranges are made on the CPU.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is nn.init.normal_:
            return kwargs["tensor"]
        if function in (torch.arange, torch.linspace):
            kwargs = {**kwargs, "device": "cpu"}
        return function(*args, **kwargs)


@torch.no_grad()
def empty_model(config: Pi0Config, device: torch.device | str, dtype: torch.dtype, fp8: bool = False) -> Pi0:
    """A frozen model whose parameters have memory but no values yet; `fp8` as in `read_policy`."""
    with torch.device("meta"), WithoutCompiler():
        model = Pi0(config).set_dtype(dtype)
        if fp8:
            use_fp8(model, fp8_weights(config))
    model.to_empty(device=device).eval().requires_grad_(False)
    model.inverse_frequency.copy_(rope_frequency(config.head_dim))
    model.time_frequency.copy_(time_frequency(config.expert_width))
    return model


@torch.no_grad()
def _read_model(
    config: Pi0Config,
    tensors: Mapping[str, StoredTensor],
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Callable[[], None] = do_nothing,
    fp8: bool = False,
) -> Pi0:
    """The model with the weights of a checkpoint that has passed `check_tensors`."""
    model = empty_model(config, device, dtype, fp8)
    staging = torch.empty(STAGING_BYTES, dtype=torch.uint8)
    for parameter, parts in model_tensors(config).items():
        start = 0
        for part in parts:
            with rows_to_fill(model, parameter, slice(start, start := start + part.shape[0])) as target:
                _read_tensor(tensors[part.name], target, staging)
            progress()
    return model


def _read_tensor(stored: StoredTensor, target: Tensor, staging: Tensor) -> None:
    """Copies a stored tensor through `staging` uint8 [bytes] into contiguous `target`, converting dtype and device.

    The file is read and not mapped, which keeps its pages out of this process. One that is stored transposed is turned
    piece by piece.
    """
    dtype = DTYPES[stored.dtype]
    most = len(staging) // dtype.itemsize
    with stored.file.open("rb", buffering=0) as file:

        def read(start: int, count: int) -> Tensor:
            size = count * dtype.itemsize
            _read_bytes(file.fileno(), staging[:size], stored.offset + start * dtype.itemsize, stored)
            return staging[:size].view(dtype)

        if not stored.transposed:
            flat = target.view(-1)
            for start in range(0, len(flat), most):
                piece = flat[start : start + most]
                piece.copy_(read(start, len(piece)))
            return
        rows, columns = target.shape  # the file holds one column after the other
        together = max(1, most // rows)
        for column in range(0, columns, together):
            for row in range(0, rows, most):  # more than once only if a column is larger than the staging buffer
                part = target[row : row + most, column : column + together]
                part.copy_(read(column * rows + row, part.numel()).view(part.shape[::-1]).T)


def _read_bytes(descriptor: int, target: Tensor, offset: int, stored: StoredTensor) -> None:
    buffer, done = target.numpy().data, 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise ValueError(f"{stored.file} ended inside the tensor '{stored.name}'; copy it again")
        done += count


def save_policy(directory: Path | str, model: Pi0, stats: NormStats, tokenizer: PromptTokenizer) -> None:
    """Writes a checkpoint that `load_policy` reads, and makes the directory if necessary."""
    assert isinstance(tokenizer.tokenizer, Tokenizer), "only tokenizers of the tokenizers library can be written"
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
    **overrides: Any,
) -> LoadedPolicy:
    """Reads a checkpoint directory in any of the layouts, by default the embedded tabletop policy.

    `dtype` is that of the transformer stacks (bfloat16 follows openpi's mixed precision); `overrides` go to
    `files.find_policy`. Raises ValueError, naming file and tensor, when something is missing or does not fit.
    """
    return read_policy(find_policy(Path(directory), **overrides), device, dtype)


def read_policy(
    files: PolicyFiles,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Callable[[], None] = do_nothing,
    fp8: bool = False,
) -> LoadedPolicy:
    """Reads the weights of a checkpoint whose other files have been read; see `load_policy`.

    `progress` is called after each tensor. With `fp8` the observation's pass is computed as `fp8` says; such a model
    can only sample.
    """
    normaliser = Normaliser(files.config, files.norm_stats, files.norm_stats_source).to(device)
    tokenizer = PromptTokenizer(files.tokenizer, files.config.max_token_len)
    model = _read_model(files.config, files.tensors, device, dtype, progress, fp8)
    return LoadedPolicy(files.config, model, normaliser, tokenizer)


def resolve_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The element type that `policy.dtype` means on a device. `auto` is bfloat16 on a GPU and float32 on the CPU."""
    if setting == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[setting]
