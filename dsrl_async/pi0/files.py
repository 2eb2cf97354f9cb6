"""What a policy checkpoint's directory holds: sizes, tensors, norm stats, tokenizer. This needs no torch.

openpi, RLinf, LeRobot and this project each have a layout. `find_policy` tells them apart and checks everything, so
that a run is refused before anything starts. `checkpoint.load_policy` then reads the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsrl_async.pi0 import lerobot
from dsrl_async.pi0.config import CONFIG, NORM_STATS, Pi0Config
from dsrl_async.pi0.foreign import up_to_three_down
from dsrl_async.pi0.names import StoredTensor
from dsrl_async.pi0.tensors import (
    check_tensors,
    find_tensors,
    infer_config,
)
from dsrl_async.pi0.tokenizer import check_vocabulary, find_tokenizer, load_tokenizer
from dsrl_async.untrusted import read_object, shown

STATISTICS = {"z_score": ("mean", "std"), "quantile": ("q01", "q99")}
LIBERO_ASSET = "physical-intelligence/libero"
"""openpi's asset id. Norm stats are in assets/<asset id> (openpi) or <asset id> (RLinf)."""
FLOAT32_MAX = float(np.finfo(np.float32).max)
OPENPI_EPSILON, LEROBOT_EPSILON = 1e-6, 1e-8
OPENPI_CONFIG: lerobot.Fates = {
    **dict.fromkeys(("action_dim", "action_horizon", "max_token_len", "pi05", "discrete_state_input")),
    **dict.fromkeys(("precision", "dtype", "pytorch_compile_mode")),
    "pcd": (False,),  # RLinf's: a point cloud among the inputs
    "paligemma_variant": ("gemma_2b", "gemma_300m"),
    "action_expert_variant": ("gemma_300m", "gemma_2b"),
}
"""What becomes of the keys of openpi's `config.json`."""

NormStats = dict[str, dict[str, list[float]]]
"""{"state": {"mean": [...], "std": [...], "q01": [...], "q99": [...]}, "actions": {...}}"""


class PolicyFiles(NamedTuple):
    """A checkpoint that is complete and consistent."""

    directory: Path
    maker: str
    """Whose layout it has: `dsrl_async`, `LeRobot` or `openpi or RLinf`."""
    config: Pi0Config
    tensors: dict[str, StoredTensor]
    norm_stats: NormStats
    norm_stats_source: Path | str
    tokenizer: Any
    """An object of the tokenizers or the sentencepiece library."""


class Scaling(NamedTuple):
    """(x - offset) / scale normalises the state, x * scale + offset un-normalises actions; all float64 [width]."""

    state_offset: NDArray[np.float64]
    state_scale: NDArray[np.float64]
    action_offset: NDArray[np.float64]
    action_scale: NDArray[np.float64]


def find_policy(
    directory: Path,
    tokenizer: str | None = None,
    norm_stats: str | None = None,
    action_horizon: int | None = None,
    delta_action_dims: int | None = None,
    content: Mapping[str, Any] | None = None,
) -> PolicyFiles:
    """Reads a checkpoint except its weights. The arguments override what is found (`policy.*`); `content` is that of
    its `config.json`, if it has been read.

    Raises ValueError naming the file, and the tensor if one is wrong; the message begins with the setting if an
    argument is to blame.
    """
    if directory.is_file():
        raise ValueError(f"{directory} is a file, give the directory that it is in")
    content = read_content(directory) if content is None else content
    if "type" in content:
        lerobot.check_type(content, directory / CONFIG)
    tensors = find_tensors(directory)
    config = make_config(content, directory, tensors)
    given: dict[str, Any] = {"action_horizon": action_horizon, "delta_action_dims": delta_action_dims}
    for name, value in given.items():
        if value is not None:
            with _blaming(f"policy.{name}"):
                config = dataclasses.replace(config, **{name: value})
    check_tensors(config, tensors, directory)
    with _blaming("policy.norm_stats" if norm_stats else None):
        stats, source = read_norm_stats(directory, config, maker_of(content), Path(norm_stats) if norm_stats else None)
        scaling(config, stats, source)
    with _blaming("policy.tokenizer" if tokenizer else None):
        file = find_tokenizer(directory, Path(tokenizer) if tokenizer else None)
        loaded = load_tokenizer(file)
        check_vocabulary(loaded, config, file)
    return PolicyFiles(directory, maker_of(content), config, tensors, stats, source, loaded)


@contextlib.contextmanager
def _blaming(culprit: Path | str | None) -> Iterator[None]:
    """Puts a setting or a file, if given, in front of the message of any ValueError in the block."""
    try:
        yield
    except ValueError as error:
        if culprit is None:
            raise
        reason = str(error).removeprefix("policy config: ")
        raise ValueError(reason if reason.startswith(str(culprit)) else f"{culprit}: {reason}") from None


def read_content(directory: Path) -> dict[str, Any]:
    """The checkpoint's `config.json`, empty if it has none. Raises ValueError naming the file if it is not valid."""
    path = directory / CONFIG
    return read_object(path) if os.path.lexists(path) else {}


def maker_of(content: Mapping[str, Any]) -> str:
    """Whose layout a checkpoint has, by the content of its `config.json`, see `PolicyFiles`."""
    if "type" in content:
        return "LeRobot"
    return "dsrl_async" if Pi0Config.wrote(content) else "openpi or RLinf"


def make_config(content: Mapping[str, Any], directory: Path, tensors: Mapping[str, StoredTensor]) -> Pi0Config:
    """The config from this project's `config.json`, or from the tensors and openpi's or LeRobot's file.

    A `config.json` of any other project (such as Hugging Face's) is ignored. Raises ValueError naming the file when
    it contradicts the tensors or asks for something unsupported.
    """
    path, maker = directory / CONFIG, maker_of(content)
    if maker == "dsrl_async":
        return Pi0Config.from_json(content, path)
    config = infer_config(tensors, directory)
    with _blaming(path):
        return (lerobot.make_config if maker == "LeRobot" else _openpi_config)(content, config, path)


def _openpi_config(content: Mapping[str, Any], config: Pi0Config, path: Path) -> Pi0Config:
    """Adds the horizon and the prompt's conventions of openpi's own `config.json`, if it is one, to the tensors'."""
    if "paligemma_variant" in content:
        lerobot.check_values(content, OPENPI_CONFIG, path)
    facts = {"action_dim": config.action_dim, "pi05": config.pi05}
    if not config.pi05:
        facts["discrete_state_input"] = False
    for key, fact in facts.items():
        if content.get(key, fact) != fact:
            raise ValueError(f"{path}: {key} is {shown(content[key])}, that of the tensors is {shown(fact)}")
    names = {"action_horizon": "action_horizon", "max_token_len": "max_token_len"}
    if config.pi05:
        names["discrete_state_input"] = "state_in_prompt"
    changes = {name: content[key] for key, name in names.items() if content.get(key) is not None}
    return dataclasses.replace(config, **changes)


def read_norm_stats(
    directory: Path, config: Pi0Config, maker: str, given: Path | None = None
) -> tuple[NormStats, Path | str]:
    """Norm stats and where they are from: `given` (a file, or a directory with one) or what the checkpoint has.

    A checkpoint has LeRobot's processors or a `norm_stats.json` up to three directories down; of several, LIBERO's is
    taken. Raises ValueError when there is none or the choice is ambiguous.
    """
    processors = any(directory.glob("policy_p*processor*")) and maker != "dsrl_async"
    if processors and maker != "LeRobot":
        raise ValueError(f"{directory} has LeRobot's processors, and not its {CONFIG}: copy that, too")
    if processors:
        stats, source = lerobot.read_processors(directory, config, read_statistics=given is None)
    if given is not None:
        path = given / NORM_STATS if given.is_dir() else given
        if not path.exists():
            raise ValueError(f"there is no file {path}")
        return load_norm_stats(path), path
    if processors:
        return stats, source
    found = [
        path
        for path in up_to_three_down(directory, NORM_STATS)
        if not any(part.startswith(".") for part in path.relative_to(directory).parts)
    ]
    libero = [path for path in found if path.parent.as_posix().endswith(LIBERO_ASSET)]
    if len(found) != 1 and len(libero) != 1:
        several = f"several, such as {found[0]} and {found[1]}" if found else "none"
        raise ValueError(
            f"policy checkpoint {directory} should have one {NORM_STATS} (openpi's is in assets/{LIBERO_ASSET}) or "
            f"LeRobot's policy_preprocessor*.safetensors, it has {several}; give policy.norm_stats"
        )
    path = found[0] if len(found) == 1 else libero[0]
    return load_norm_stats(path), path


def load_norm_stats(path: Path) -> NormStats:
    """Reads openpi's `norm_stats.json`. Raises ValueError naming the file when it has another form."""
    content = read_object(path).get("norm_stats")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("state", "actions")):
        raise ValueError(f'{path} must hold {{"norm_stats": {{"state": ..., "actions": ...}}}}')
    return {key: dict(content[key]) for key in ("state", "actions")}


def save_norm_stats(stats: NormStats, path: Path) -> None:
    path.write_text(json.dumps({"norm_stats": stats}, indent=2) + "\n")


def scaling(config: Pi0Config, stats: NormStats, source: Path | str) -> Scaling:
    """Offsets and scales of the robot's dimensions.

    openpi uses z-scores (x - mean) / (std + 1e-6) or quantiles (x - q01) / (q99 - q01 + 1e-6) * 2 - 1, and the exact
    inverse. LeRobot adds 1e-8 for the z-score of the state, nothing for that of actions, and for quantiles only where
    q99 equals q01.

    Raises ValueError, naming `source` and the statistic, when one is missing, has the wrong length, holds something
    else than numbers of float32's range, or contradicts itself: a negative `std`, or a `q01` above its `q99`.
    """
    parts: list[NDArray[np.float64]] = []
    for key, width in (("state", config.robot_state_dim), ("actions", config.robot_action_dim)):
        names = STATISTICS[config.normalisation]
        first, second = (_statistic(stats[key], name, key, width, config.action_dim, source) for name in names)
        openpi, z_score = config.normalisation_epsilon == "openpi", config.normalisation == "z_score"
        spread = second if z_score else second - first
        if (spread < 0).any():
            wrong = f"{key}.std is negative" if z_score else f"{key}.q01 is above {key}.q99"
            raise ValueError(f"{source}: {wrong} in dimension {int((spread < 0).argmax())}")
        if spread.max() > FLOAT32_MAX:
            raise ValueError(f"{source}: {key}.q99 is farther from {key}.q01 than float32 can say")
        if openpi:
            spread = spread + OPENPI_EPSILON
        elif not z_score:
            spread = np.where(spread.astype(np.float32) == 0, LEROBOT_EPSILON, spread)
        elif key == "state":
            spread = spread + LEROBOT_EPSILON
        parts += [first, spread] if z_score else [first + spread / 2, spread / 2]
    return Scaling(*parts)


def _statistic(
    stats: Mapping[str, Any], statistic: str, key: str, width: int, most: int, source: Path | str
) -> NDArray[np.float64]:
    values = stats.get(statistic)
    if values is None:
        raise ValueError(f"{source}: {key} lacks '{statistic}'")
    if not isinstance(values, list) or not all(
        type(value) in (int, float) and abs(value) <= FLOAT32_MAX for value in values
    ):
        raise ValueError(f"{source}: {key}.{statistic} must be a list of finite numbers (of float32's range)")
    if not width <= len(values) <= most:
        raise ValueError(f"{source}: {key}.{statistic} has {len(values)} entries, expected {width} to {most}")
    return np.array(values[:width], np.float64)
