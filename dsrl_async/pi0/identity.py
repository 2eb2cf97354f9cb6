"""What tells one policy from another: a few hashes of what its actions depend on. This needs no torch.

It says whether a run goes on with the policy that it learned to steer, wherever the files lie and however they are cut
into shards. It protects from mistakes, not from an attacker, who can change a number that no sample sees.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from dsrl_async.pi0.files import STATISTICS, PolicyFiles
from dsrl_async.pi0.names import StoredTensor
from dsrl_async.pi0.tensors import model_tensors
from dsrl_async.pi0.tokenizer import STATE_BINS, make_encoder, prompt_ids

SAMPLES, SAMPLE_BYTES = 4, 4096
"""How many stretches of a tensor are read, and how long each is; smaller tensors are read whole."""


def identity(files: PolicyFiles, prompts: Sequence[str]) -> dict[str, Any]:
    """The policy's identity for a run with these prompts, ready for JSON.

    - `weights`: name, element type, shape and sampled bytes of every tensor that the model uses;
    - `norm_stats`: the statistics that its normalisation uses, of the robot's dimensions;
    - `tokenizer`: the token ids of the prompts, and for a policy that is told the state in words of all its numbers;
    - `config`: sizes and conventions, by name.

    Raises:
        OSError: a file cannot be read any more.
    """
    config = files.config
    used = {part.name for parts in model_tensors(config).values() for part in parts}
    widths = {"state": config.robot_state_dim, "actions": config.robot_action_dim}
    statistics = [
        np.asarray(files.norm_stats[key][statistic], np.float64)[:width].tolist()
        for key, width in widths.items()
        for statistic in STATISTICS[config.normalisation]
    ]
    encoder = make_encoder(files.tokenizer)
    tokens = [prompt_ids(encoder, prompt) for prompt in prompts]
    if config.state_in_prompt:
        tokens.append(encoder.encode(" ".join(map(str, range(-1, STATE_BINS)))))
    return {
        "weights": _hash_weights({name: tensor for name, tensor in files.tensors.items() if name in used}),
        "norm_stats": _hash(json.dumps(statistics).encode()),
        "tokenizer": _hash(json.dumps(tokens).encode()),
        "config": dataclasses.asdict(config),
    }


def _hash_weights(tensors: Mapping[str, StoredTensor]) -> str:
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        opened: dict[Any, BinaryIO] = {}
        for name, tensor in sorted(tensors.items()):
            if tensor.file not in opened:
                opened[tensor.file] = stack.enter_context(tensor.file.open("rb", buffering=0))
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
            for start, length in _samples(tensor.bytes):
                opened[tensor.file].seek(tensor.offset + start)
                digest.update(opened[tensor.file].read(length))
    return digest.hexdigest()


def _samples(size: int) -> Iterable[tuple[int, int]]:
    """First byte and length of the stretches to read of a tensor of `size` bytes, evenly spaced, with both ends."""
    if size <= SAMPLES * SAMPLE_BYTES:
        return [(0, size)]
    return [(number * (size - SAMPLE_BYTES) // (SAMPLES - 1), SAMPLE_BYTES) for number in range(SAMPLES)]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    """What two identities differ in, in words; a part that one of them does not have is not compared.

    Those of policies of other types have the `type`, which a Pi0's has not.
    """
    if (kind := before.get("type", "pi0")) != now.get("type", "pi0"):
        yield f"policy.type ({json.dumps(kind)} then, {json.dumps(now.get('type', 'pi0'))} now)"
        return
    for part, words in (("weights", "weights"), ("norm_stats", "norm stats"), ("tokenizer", "tokenizer")):
        if part in before and part in now and before[part] != now[part]:
            yield f"{words} (sha256 {str(before[part])[:12]} then, {now[part][:12]} now)"
    config, mine = before.get("config", {}), now["config"]
    for name in sorted(config.keys() & mine.keys()):
        if config[name] != mine[name]:
            yield f"{name} ({json.dumps(config[name])} then, {json.dumps(mine[name])} now)"
