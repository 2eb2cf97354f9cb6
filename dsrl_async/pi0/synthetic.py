"""Writes a random policy checkpoint, as openpi, RLinf, LeRobot or this project would, for tests and trials.

    python -m dsrl_async.pi0.synthetic /tmp/pi0 --layout openpi
    python -m dsrl_async.pi0.synthetic /tmp/two --layout lerobot --pi05 --sizes '{"depth": 2}'
    python -m dsrl_async.pi0.synthetic /tmp/small --small --sizes '{"cameras": 1, "robot_state_dim": 4}'

Weights are bfloat16, depend only on the seed and openpi's name of the tensor, and are scaled so that activations stay
finite. They are written as they are drawn, which takes little memory. The toy tokenizer treats characters as words.
"""

from __future__ import annotations

import argparse
import json
import math
import string
import typing
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from dsrl_async.pi0.config import CONFIG, NORM_STATS, TOKENIZER, WEIGHTS, Pi0Config
from dsrl_async.pi0.files import LIBERO_ASSET, NormStats, save_norm_stats
from dsrl_async.pi0.names import EMBEDDING, TIED_EMBEDDING, Part
from dsrl_async.pi0.tensors import LEROBOT_PREFIX, model_tensors, unused_tensors

Layout = Literal["openpi", "rlinf", "lerobot", "dsrl_async"]
SMALL = {
    **{"image_size": 64, "patch_size": 16, "vision_width": 32, "vision_depth": 1, "vision_heads": 2, "vision_mlp": 32},
    **{"vlm_width": 32, "vlm_mlp": 32, "expert_width": 32, "expert_mlp": 32, "depth": 1, "heads": 2, "head_dim": 16},
    **{"vocab_size": 128, "max_token_len": 48, "action_horizon": 10, "delta_action_dims": 0},
}
"""Sizes of a policy that takes hardly any time, and as many language slots as its tokenizer needs for most prompts."""
RLINF_PARTS = [
    Part("actor_state_encoder.encoder.0.weight", (64, 8)),
    Part("critic_image_encoder.convs.0.weight", (32, 3, 3, 3)),
    Part("dsrl_action_noise_net.mean_layer.bias", (32,)),
    Part("q_head.q_heads.9.net.0.weight", (128, 160)),
]
"""A few of the tensors that RLinf's DSRL stores along with the policy."""
SHARDS = 3
CHUNK = 1 << 22


def pi0_config(pi05: bool, **sizes: Any) -> Pi0Config:
    """The config that loading a checkpoint of LIBERO's Pi0 or Pi0.5 infers. `sizes` are fields of `Pi0Config`."""
    if pi05:
        defaults: dict[str, Any] = {"max_token_len": 200, "action_horizon": 10}
        return Pi0Config(pi05=True, normalisation="quantile", **{**defaults, **sizes})
    return Pi0Config(**{"delta_action_dims": 6, **sizes})


def random_bfloat16(part: Part, seed: int) -> Iterator[NDArray[np.uint16]]:
    """A tensor's elements, in pieces, as the upper halves of float32."""
    mean, spread = moments(part)
    generator = np.random.default_rng([seed, zlib.crc32(part.name.encode())])
    for start in range(0, math.prod(part.shape), CHUNK):
        values = generator.standard_normal(min(CHUNK, math.prod(part.shape) - start), dtype=np.float32)
        values = values * np.float32(spread) + np.float32(mean)
        yield ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def moments(part: Part) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's elements."""
    if "layer_norm" in part.name or "post_layernorm." in part.name:  # SigLIP's; Gemma's add the 1 themselves
        return (1.0, 0.05) if part.name.endswith("weight") else (0.0, 0.05)
    if len(part.shape) == 1 or "position_embedding" in part.name:
        return 0.0, 0.02
    if ".dense." in part.name:  # adaptive norms: scales, shifts and gates, all around their neutral values
        return 0.0, 0.1 * part.shape[1] ** -0.5
    return 0.0, math.prod(part.shape[1:]) ** -0.5


def write_tensors(
    path: Path,
    parts: list[Part],
    prefix: str,
    seed: int,
    metadata: dict[str, str],
    draw: Callable[[Part, int], Iterator[NDArray[np.uint16]]] = random_bfloat16,
) -> None:
    """Writes a safetensors file of bfloat16 tensors as they are drawn."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for part in parts:
        start, end = end, end + 2 * math.prod(part.shape)
        header[prefix + part.name] = {"dtype": "BF16", "shape": list(part.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            for piece in draw(part, seed):
                file.write(piece.tobytes())


def random_norm_stats(config: Pi0Config, seed: int) -> NormStats:
    generator = np.random.default_rng(seed)

    def of(width: int) -> dict[str, list[float]]:
        mean, std = generator.normal(size=width), generator.uniform(0.5, 1.5, size=width)
        named = {"mean": mean, "std": std, "q01": mean - 2 * std, "q99": mean + 2 * std}
        return {name: values.astype(np.float32).tolist() for name, values in named.items()}

    return {"state": of(config.robot_state_dim), "actions": of(config.robot_action_dim)}


def write_tokenizer(path: Path) -> None:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *string.printable]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(path))


def write_checkpoint(directory: Path, config: Pi0Config, layout: Layout, seed: int = 0) -> None:
    """Writes a directory as openpi's converter, RLinf, LeRobot or `save_policy` would, with the same weights."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = [part for rows in model_tensors(config).values() for part in rows]
    stats = random_norm_stats(config, seed)
    write_tokenizer(directory / TOKENIZER)
    if layout == "dsrl_async":
        write_tensors(directory / WEIGHTS, parts, "", seed, {})
        config.save(directory / CONFIG)
        save_norm_stats(stats, directory / NORM_STATS)
        return
    parts += unused_tensors(config)
    if layout == "openpi":
        write_tensors(directory / WEIGHTS, parts, "", seed, {TIED_EMBEDDING: EMBEDDING})
        variants = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m", "precision": "bfloat16"}
        sizes = {"action_dim": config.action_dim, "action_horizon": config.action_horizon}
        (directory / CONFIG).write_text(json.dumps({**sizes, **variants}, indent=2))
        stats_file = directory / "assets" / LIBERO_ASSET / NORM_STATS
    elif layout == "rlinf":
        parts += RLINF_PARTS
        weight_map = {}
        for index in range(SHARDS):
            name = f"model-{index + 1:05}-of-{SHARDS:05}.safetensors"
            write_tensors(directory / name, parts[index::SHARDS], "", seed, {})
            weight_map.update(dict.fromkeys((part.name for part in parts[index::SHARDS]), name))
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        stats_file = directory / LIBERO_ASSET / NORM_STATS
    else:
        write_tensors(directory / WEIGHTS, parts, LEROBOT_PREFIX, seed, {})
        write_lerobot_files(directory, config, stats)
        return
    stats_file.parent.mkdir(parents=True, exist_ok=True)
    save_norm_stats(stats, stats_file)


def write_lerobot_files(directory: Path, config: Pi0Config, stats: NormStats) -> None:
    """Writes LeRobot's config.json and the statistics of its normaliser and un-normaliser."""
    mode = "QUANTILES" if config.normalisation == "quantile" else "MEAN_STD"
    image = {"type": "VISUAL", "shape": [3, config.image_size, config.image_size]}
    cameras = [f"image{index or ''}" for index in range(config.cameras)] + ["empty_camera_0"]
    content = {
        "type": "pi05" if config.pi05 else "pi0",
        "chunk_size": config.action_horizon,
        "tokenizer_max_length": config.max_token_len,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
        "input_features": {
            **{f"observation.images.{name}": image for name in cameras},
            "observation.state": {"type": "STATE", "shape": [config.robot_state_dim]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [config.robot_action_dim]}},
    }
    (directory / CONFIG).write_text(json.dumps(content, indent=2))
    flat = {
        f"{feature}.{name}": np.array(values, dtype=np.float32)
        for feature, key in (("observation.state", "state"), ("action", "actions"))
        for name, values in stats[key].items()
    }
    for name in ("policy_preprocessor_step_5_normalizer", "policy_postprocessor_step_0_unnormalizer"):
        save_file(flat, directory / f"{name}_processor.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layout", choices=typing.get_args(Layout))
    parser.add_argument("--small", action="store_true", help="a tiny policy; in this project's layout unless told")
    parser.add_argument("--pi05", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", type=json.loads, default={}, help="a JSON object with fields of Pi0Config")
    options = parser.parse_args()
    sizes = {**(SMALL if options.small else {}), **options.sizes}
    layout: Layout = options.layout or ("dsrl_async" if options.small else "openpi")
    write_checkpoint(options.directory, pi0_config(options.pi05, **sizes), layout, options.seed)
