"""LeRobot's files beside a policy's weights: config.json, and the processors with their statistics.

Whatever in them changes the actions is computed as they say, or refused by name. This needs no torch.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.tensors import field, file_beside, read_header, read_values
from dsrl_async.untrusted import in_one_line, read_object, shown

TYPES = ("pi0", "pi05")
MODES = {"MEAN_STD": "z_score", "QUANTILES": "quantile"}
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
STATISTICS = ("mean", "std", "q01", "q99")
WRIST = ("wrist", "hand", "gripper", "image2")
"""Parts of names of a camera that moves with the robot. The environment's first one shows the scene."""

Fates = Mapping[str, tuple[Any, ...] | None]
"""Key -> the values that this project computes with, or None if any will do."""

WITHOUT_EFFECT = ("optimizer_", "scheduler_", "time_sampling_", "compile_", "memory_")
"""How keys of config.json begin that concern training and speed, or have no effect without others that are refused."""
CONFIG: Fates = {
    # read by `make_config`
    **dict.fromkeys(("type", "chunk_size", "tokenizer_max_length", "normalization_mapping")),
    **dict.fromkeys(("input_features", "output_features", "max_state_dim", "max_action_dim")),
    **dict.fromkeys(("image_resolution", "resize_imgs_with_padding", "rtc_config")),
    # settings of a run decide: policy.dtype, policy.denoise_steps, env.chunk
    **dict.fromkeys(("dtype", "use_amp", "num_inference_steps", "num_steps", "n_action_steps")),
    # training, bookkeeping, and what the tensors tell
    **dict.fromkeys(("device", "push_to_hub", "repo_id", "private", "tags", "license", "pretrained_path")),
    **dict.fromkeys(("pretrained_revision", "gradient_checkpointing", "freeze_vision_encoder", "train_expert_only")),
    **dict.fromkeys(("train_state_proj", "attention_implementation", "use_cache", "proj_width", "empty_cameras")),
    **dict.fromkeys(("rtc_training_max_delay", "relative_exclude_joints", "action_feature_names")),
    "paligemma_variant": ("gemma_2b", "gemma_300m"),
    "action_expert_variant": ("gemma_300m", "gemma_2b"),
    "n_obs_steps": (1,),
    "min_period": (4e-3,),
    "max_period": (4.0,),
    "use_relative_actions": (False,),
    "use_visual_memory": (False,),
    "use_proprioceptive_memory": (False,),
    "use_peft": (False,),
    "adapt_to_pi_aloha": (False,),
    "use_delta_joint_actions_aloha": (False,),
}
_NORMALISER: Fates = {"eps": (1e-8,), "features": None, "norm_map": None, "normalize_observation_keys": None}
_ANY_STEP: dict[str, Fates] = {
    "device_processor": {"device": None, "float_dtype": ("float32", "float")},
    "to_batch_processor": {},
    "rename_observations_processor": {"rename_map": None},
}
_RELATIVE: Fates = {"enabled": (False,), "exclude_joints": None, "action_names": None}
STEPS: dict[str, dict[str, Fates]] = {
    "policy_preprocessor": {
        **_ANY_STEP,
        "normalizer_processor": _NORMALISER,
        "tokenizer_processor": {
            **dict.fromkeys(("max_length", "tokenizer_name", "padding")),
            **{"task_key": ("task",), "padding_side": ("right",), "truncation": (True,)},
        },
        "relative_actions_processor": _RELATIVE,
        "delta_actions_processor": _RELATIVE,
        "pi0_new_line_processor": {},
        "pi05_prepare_state_tokenizer_processor_step": {
            **{"max_state_dim": None, "task_key": ("task",), "include_state_in_prompt": (True,)},
        },
    },
    "policy_postprocessor": {
        **_ANY_STEP,
        "unnormalizer_processor": _NORMALISER,
        "absolute_actions_processor": _RELATIVE,
    },
}
"""Processor -> step -> its settings. The statistics are those of the step that normalises."""
NORMALISERS = {"policy_preprocessor": "normalizer_processor", "policy_postprocessor": "unnormalizer_processor"}
PROMPT_STEPS = {False: "pi0_new_line_processor", True: "pi05_prepare_state_tokenizer_processor_step"}
"""What makes the prompt in front of the tokenizer, of Pi0 and of Pi0.5."""


def check_type(content: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError when LeRobot's `config.json` is of another policy than Pi0 and Pi0.5."""
    if content["type"] not in TYPES:
        raise ValueError(f"{path} is of a policy of type {shown(content['type'])}, only {' and '.join(TYPES)} are read")


def check_values(content: Mapping[str, Any], fates: Fates, source: Path | str) -> None:
    """Raises ValueError, naming `source` and the key, when there is a key or a value that this project does not know.

    A value of null counts as the default.
    """
    for key, value in content.items():
        if key not in fates:
            raise ValueError(
                f"{source} has the key {shown(key)}, which this version does not know: "
                "remove it there if the actions do not depend on it"
            )
        wanted = fates[key]
        if wanted is not None and value is not None and value not in wanted:
            raise ValueError(f"{source}: {key} is {shown(value)}, supported is {' or '.join(map(shown, wanted))}")


def make_config(content: Mapping[str, Any], config: Pi0Config, path: Path) -> Pi0Config:
    """Adds LeRobot's horizon, widths, cameras, normalisation and conventions to the sizes of the tensors.

    Raises ValueError naming the file where it contradicts the tensors or asks for something unsupported.
    """
    kind = TYPES[config.pi05]
    if content["type"] != kind:
        raise ValueError(f"{path} is of a policy of type {content['type']!r}, the tensors beside it are of {kind!r}")
    known = {key: value for key, value in content.items() if not key.startswith(WITHOUT_EFFECT)}
    square = [config.image_size, config.image_size]
    of_tensors = {
        **dict.fromkeys(("max_state_dim", "max_action_dim"), (config.action_dim,)),
        **dict.fromkeys(("image_resolution", "resize_imgs_with_padding"), (square,)),
    }
    check_values(known, {**CONFIG, **of_tensors}, path)
    if field(content, "rtc_config", dict, path).get("enabled"):
        raise ValueError(f"{path}: rtc_config is enabled, which is not supported")
    inputs, outputs, modes = (
        field(content, key, dict, path) for key in ("input_features", "output_features", "normalization_mapping")
    )
    default = "QUANTILES" if config.pi05 else "MEAN_STD"
    state_mode, action_mode = (field(modes, key, str, path) or default for key in ("STATE", "ACTION"))
    if state_mode != action_mode or state_mode not in MODES:
        raise ValueError(
            f"{path}: normalization_mapping has {in_one_line(state_mode)} for STATE and "
            f"{in_one_line(action_mode)} for ACTION, supported is the same for both, of {' or '.join(MODES)}"
        )
    if (visual := field(modes, "VISUAL", str, path) or "IDENTITY") != "IDENTITY":
        raise ValueError(f"{path}: normalization_mapping has {shown(visual)} for VISUAL, supported is IDENTITY")

    def width(features: Mapping[str, Any], name: str, libero: int) -> Any:
        """The robot's width. A width equal to the model's own is that of the padding and says nothing of the robot."""
        shape = field(field(features, name, dict, path), "shape", list, path)
        if len(shape) > 1:
            raise ValueError(f"{path}: the shape of {name} is {shown(shape)}, it must have one axis")
        return shape[0] if shape and shape[0] != config.action_dim else libero

    cameras = [name for name, feature in inputs.items() if _is_camera(name, feature)]
    check_order(cameras, path)
    changes: dict[str, Any] = {
        "action_horizon": content.get("chunk_size", 50),
        "max_token_len": content.get("tokenizer_max_length", config.max_token_len),
        "cameras": len(cameras) or config.cameras,
        "robot_state_dim": width(inputs, STATE, config.robot_state_dim),
        "robot_action_dim": width(outputs, ACTION, config.robot_action_dim),
        "normalisation": MODES[state_mode],
        "normalisation_epsilon": "lerobot",
        "delta_action_dims": 0,
        "state_in_prompt": config.pi05,
        "time_grid": "exact",
    }
    return dataclasses.replace(config, **changes)


def _is_camera(name: str, feature: Any) -> bool:
    visual = isinstance(feature, dict) and feature.get("type") == "VISUAL"
    return (visual or name.startswith(IMAGES)) and "empty_camera" not in name


def check_order(cameras: list[str], path: Path) -> None:
    """Raises ValueError when a camera at the wrist comes before one of the scene: the environment has the other order.

    `cameras` are the names under which the observation has them.
    """
    moving = [any(part in name.removeprefix(IMAGES) for part in WRIST) for name in cameras]
    if moving != sorted(moving):
        raise ValueError(
            f"{path}: the camera {shown(cameras[0])} comes first, this project's environments have it last"
        )


def read_processors(
    directory: Path, config: Pi0Config, read_statistics: bool
) -> tuple[dict[str, dict[str, list[float]]], str]:
    """The state's statistics of the preprocessor, those of actions of the postprocessor, and where they are from.

    They are in the file that the processor's JSON names; without a JSON there must be one file. Other files of
    processors are left-overs and not read. Raises ValueError, naming the file, when a step is unknown, is set to
    something that is not supported, or contradicts `config`, and when statistics are missing.
    """
    stats: dict[str, dict[str, list[float]]] = {}
    files = []
    for processor, key, feature in (
        ("policy_preprocessor", "state", STATE),
        ("policy_postprocessor", "actions", ACTION),
    ):
        file = _state_file(directory, processor, feature, config, read_statistics)
        if not read_statistics:
            continue
        if file is None:
            raise ValueError(
                f"{directory}: no {processor}*.safetensors has statistics of {feature}; give policy.norm_stats"
            )
        stored = read_header(file)
        names = {name: f"{feature}.{name}" for name in STATISTICS}
        stats[key] = {name: read_values(stored[full]) for name, full in names.items() if full in stored}
        if not stats[key]:
            raise ValueError(f"{file} has no statistics of {feature}; give policy.norm_stats")
        files.append(file)
    return stats, " and ".join(map(str, files))


def _state_file(directory: Path, processor: str, feature: str, config: Pi0Config, read_statistics: bool) -> Path | None:
    """Where a processor's statistics are, None if nowhere or nobody asks."""
    path = directory / f"{processor}.json"
    if not os.path.lexists(path):
        files = sorted(directory.glob(f"{processor}*.safetensors"))
        if len(files) > 1:
            raise ValueError(f"{directory} has {files[0].name} and {files[1].name}, and no {path.name} to say which")
        return files[0] if files else None
    steps = field(read_object(path), "steps", list, path)
    names = [step.get("registry_name", step.get("class")) if isinstance(step, dict) else None for step in steps]
    for name, step in zip(names, steps, strict=True):
        if not isinstance(name, str) or name not in STEPS[processor]:
            raise ValueError(f"{path} has the step {shown(name or step)}, which is not supported")
        settings = field(step, "config", dict, path)
        check_values(settings, STEPS[processor][name], f"{path}: {name}")
        _check_step(name, settings, config, path)
    if "tokenizer_processor" in names:
        wanted, other = PROMPT_STEPS[config.pi05], PROMPT_STEPS[not config.pi05]
        if wanted not in names or other in names:
            raise ValueError(
                f"{path} must have the step {wanted} and not {other} for a policy of type {TYPES[config.pi05]}"
            )
    normaliser = NORMALISERS[processor]
    if names.count(normaliser) != 1:
        raise ValueError(f"{path} has {names.count(normaliser)} steps {normaliser}, supported is one")
    step = steps[names.index(normaliser)]
    prepare = PROMPT_STEPS[True]
    if prepare in names and names.index(prepare) < names.index(normaliser):
        raise ValueError(f"{path} has {prepare} before {normaliser}, supported is the reverse")
    _check_normaliser(field(step, "config", dict, path), feature, config, path)
    name = field(step, "state_file", str, path)
    if read_statistics and not name:
        raise ValueError(
            f"{path}: {normaliser} names no state_file: its statistics are missing; give policy.norm_stats"
        )
    return file_beside(path, name) if read_statistics else None


def _check_step(name: str, settings: Mapping[str, Any], config: Pi0Config, path: Path) -> None:
    if name == "tokenizer_processor" and settings.get("max_length", config.max_token_len) != config.max_token_len:
        raise ValueError(
            f"{path}: max_length is {shown(settings['max_length'])}, tokenizer_max_length of config.json is "
            f"{config.max_token_len}"
        )
    if name == "rename_observations_processor":
        renamed = field(settings, "rename_map", dict, path)
        if any(not before.startswith(IMAGES) for before in renamed):
            raise ValueError(f"{path}: rename_map is {shown(renamed)}, supported are names of cameras")
        check_order(sorted(renamed, key=lambda before: str(renamed[before])), path)


def _check_normaliser(settings: Mapping[str, Any], feature: str, config: Pi0Config, path: Path) -> None:
    """Raises ValueError unless a step normalises its feature as `config` has it, and nothing else that matters."""
    kind = "ACTION" if feature == ACTION else "STATE"
    wanted = {mode: name for name, mode in MODES.items()}[config.normalisation]
    if modes := field(settings, "norm_map", dict, path):
        for key, expected in ((kind, wanted), ("VISUAL", "IDENTITY")):
            if (found := modes.get(key, "IDENTITY")) != expected:
                raise ValueError(
                    f"{path}: norm_map has {shown(found)} for {key}, config.json's normalization_mapping has {expected}"
                )
    features = field(settings, "features", dict, path)
    if features and (not isinstance(features.get(feature), dict) or features[feature].get("type", kind) != kind):
        raise ValueError(f"{path}: the features that are normalised lack {feature} of type {kind}")
    keys = field(settings, "normalize_observation_keys", list, path)
    if keys and feature == STATE and feature not in keys:
        raise ValueError(f"{path}: normalize_observation_keys is {shown(keys)}, without {feature}")
