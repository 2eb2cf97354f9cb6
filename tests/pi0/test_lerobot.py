"""LeRobot's config.json and processors, as its version 0.6 writes them, and what somebody may have changed in them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsrl_async.pi0 import synthetic
from dsrl_async.pi0.files import find_policy

SIZES: dict[str, Any] = {
    **{"image_size": 64, "patch_size": 16, "vision_depth": 1, "vision_mlp": 24, "vlm_width": 16, "vlm_mlp": 16},
    **{"expert_width": 16, "expert_mlp": 16, "depth": 1, "vocab_size": 120},
}
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
STATE_FILE = "policy_preprocessor_step_5_normalizer_processor.safetensors"
STEP = {"normalizer": "normalizer_processor", "tokenizer": "tokenizer_processor", "device": "device_processor"}


def config_json(pi05: bool) -> dict[str, Any]:
    """Every key that LeRobot 0.6's PI0Config or PI05Config has, with the value of a fine-tune for LIBERO."""
    mode = "QUANTILES" if pi05 else "MEAN_STD"
    image = {"type": "VISUAL", "shape": [3, 256, 256]}
    memory = {
        **{"use_visual_memory": False, "use_proprioceptive_memory": False, "memory_frames": 6, "memory_stride": 30},
        **{"memory_temporal_attention_every": 4, "rtc_training_max_delay": 0},
    }
    return {
        "type": "pi05" if pi05 else "pi0",
        "n_obs_steps": 1,
        "input_features": {
            "observation.images.image": image,
            "observation.images.image2": image,
            "observation.images.empty_camera_0": image,
            "observation.state": {"type": "STATE", "shape": [8]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [7]}},
        **{"device": "cuda", "use_amp": False, "use_peft": False, "push_to_hub": True, "repo_id": "a/b"},
        **{"private": None, "tags": None, "license": "apache-2.0", "pretrained_path": "lerobot/pi0_base"},
        **{"pretrained_revision": None, "paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"},
        **{"dtype": "bfloat16", "chunk_size": 50, "n_action_steps": 10, "max_state_dim": 32, "max_action_dim": 32},
        **{"num_inference_steps": 10, "time_sampling_beta_alpha": 1.5, "time_sampling_beta_beta": 1.0},
        **{"time_sampling_scale": 0.999, "time_sampling_offset": 0.001, "min_period": 0.004, "max_period": 4.0},
        **{"use_relative_actions": False, "relative_exclude_joints": ["gripper"], "action_feature_names": None},
        **{"rtc_config": None, "image_resolution": [64, 64], "empty_cameras": 1},
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
        **{"gradient_checkpointing": True, "compile_model": True, "compile_mode": "max-autotune"},
        **{"freeze_vision_encoder": False, "train_expert_only": False, "optimizer_lr": 2.5e-05},
        **{"optimizer_betas": [0.9, 0.95], "optimizer_eps": 1e-08, "optimizer_weight_decay": 0.01},
        **{"optimizer_grad_clip_norm": 1.0, "scheduler_warmup_steps": 1000, "scheduler_decay_steps": 30000},
        **{"scheduler_decay_lr": 2.5e-06, "tokenizer_max_length": 200 if pi05 else 48},
        **(memory if pi05 else {}),
    }


def processors(pi05: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    config = config_json(pi05)
    modes, slots = config["normalization_mapping"], config["tokenizer_max_length"]
    features = {**config["input_features"], **config["output_features"]}

    def step(name: str, **settings: Any) -> dict[str, Any]:
        return {"registry_name": name, "config": settings}

    normalise = step("normalizer_processor", eps=1e-8, features=features, norm_map=modes) | {"state_file": STATE_FILE}
    restore = step("unnormalizer_processor", eps=1e-8, features=config["output_features"], norm_map=modes)
    restore["state_file"] = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    tokenise = step(
        "tokenizer_processor",
        **{"max_length": slots, "task_key": "task", "padding_side": "right", "padding": "max_length"},
        **{"truncation": True, "tokenizer_name": "google/paligemma-3b-pt-224"},
    )
    relative = step("relative_actions_processor", enabled=False, exclude_joints=["gripper"], action_names=None)
    device = step("device_processor", device="cuda", float_dtype=None)
    begin = [step("rename_observations_processor", rename_map={}), step("to_batch_processor")]
    if pi05:
        middle = [relative, normalise, step("pi05_prepare_state_tokenizer_processor_step"), tokenise, device]
    else:
        middle = [step("pi0_new_line_processor"), tokenise, device, relative, normalise]
    absolute, cpu = step("absolute_actions_processor", enabled=False), step("device_processor", device="cpu")
    return (
        {"name": "policy_preprocessor", "steps": [*begin, *middle]},
        {"name": "policy_postprocessor", "steps": [restore, absolute, cpu]},
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lerobot")
    for pi05 in (False, True):
        inner = directory / str(pi05)
        synthetic.write_checkpoint(inner, synthetic.pi0_config(pi05, **SIZES), "lerobot")
        (inner / "config.json").write_text(json.dumps(config_json(pi05)))
        for name, content in zip((PREPROCESSOR, POSTPROCESSOR), processors(pi05), strict=True):
            (inner / name).write_text(json.dumps(content))
        (inner / "train_config.json").write_text("{}")
    return directory


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Callable[[bool], Path]:
    return lambda pi05: Path(shutil.copytree(written / str(pi05), tmp_path / "policy"))


@pytest.mark.parametrize("pi05", [False, True])
def test_what_lerobot_writes_is_read(written: Path, pi05: bool) -> None:
    files = find_policy(written / str(pi05))
    assert files.maker == "LeRobot"
    assert (files.config.cameras, files.config.robot_state_dim, files.config.robot_action_dim) == (2, 8, 7)
    assert files.config.state_in_prompt is pi05
    stored = load_file(written / str(pi05) / STATE_FILE)
    assert files.norm_stats["state"]["std"] == stored["observation.state.std"].tolist()


def test_the_file_that_the_json_names_has_the_statistics(copy: Callable[[bool], Path]) -> None:
    """One is left over from steps that were numbered otherwise."""
    directory = copy(False)
    expected = find_policy(directory).norm_stats
    stale = {name: tensor + 1 for name, tensor in load_file(directory / STATE_FILE).items()}
    other = STATE_FILE.replace("5", "7")
    save_file(stale, directory / other)
    assert find_policy(directory).norm_stats == expected
    change(PREPROCESSOR, lambda c: c["steps"][-1].update(state_file=other))(directory)
    assert find_policy(directory).norm_stats["state"]["mean"] == stale["observation.state.mean"].tolist()
    (directory / PREPROCESSOR).unlink()
    with pytest.raises(
        ValueError, match=rf"has {STATE_FILE} and {other}, and no policy_preprocessor\.json to say which"
    ):
        find_policy(directory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_of_every_type_are_read(copy: Callable[[bool], Path], dtype: torch.dtype) -> None:
    directory = copy(False)
    stats = {name: tensor.to(dtype) for name, tensor in load_file(directory / STATE_FILE).items()}
    save_file(stats, directory / STATE_FILE)
    assert find_policy(directory).norm_stats["state"]["mean"] == stats["observation.state.mean"].double().tolist()


def change(name: str, how: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        how(content)
        (directory / name).write_text(json.dumps(content))

    return apply


def configured(**values: object) -> Callable[[Path], None]:
    return change("config.json", lambda content: content.update(values))


def setting(step: str, name: str = PREPROCESSOR, **values: object) -> Callable[[Path], None]:
    """Changes the settings of a step of a processor."""

    def how(content: dict[str, Any]) -> None:
        next(entry for entry in content["steps"] if entry["registry_name"] == step)["config"].update(values)

    return change(name, how)


def features(name: str, value: object) -> Callable[[Path], None]:
    return change("config.json", lambda c: c["input_features"].update({name: value}))


def stats(how: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / STATE_FILE)
        how(tensors)
        save_file(tensors, directory / STATE_FILE)

    return apply


def pipe(name: str) -> Callable[[Path], None]:
    def put(directory: Path) -> None:
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return put


WRIST_FIRST = {
    name: {"type": "VISUAL", "shape": [3, 64, 64]} for name in ("observation.images.wrist", "observation.images.base")
}
RENAMED = {"observation.images.image": "observation.images.c", "observation.images.image2": "observation.images.a"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *(
            (
                configured(**{key: value}),
                rf"config\.json: {key} is .*supported is ",
            )
            for key, value in {
                "n_obs_steps": 2,
                "min_period": 4e-2,
                "max_period": 40,
                "use_visual_memory": True,
                "use_proprioceptive_memory": True,
                "adapt_to_pi_aloha": True,
                "use_delta_joint_actions_aloha": True,
                "use_peft": True,
                "paligemma_variant": "gemma_2b_lora",
                "action_expert_variant": "gemma_7b",
                "max_state_dim": 14,
                "max_action_dim": 14,
                "image_resolution": [448, 448],
                "resize_imgs_with_padding": [512, 512],
            }.items()
        ),
        (
            configured(rtc_config={"enabled": True}),
            r"config\.json: rtc_config is enabled",
        ),
        (
            configured(state_cond=True),
            r"config\.json has the key 'state_cond', which this",
        ),
        (
            configured(chunk_size=10**9),
            r"config\.json: action_horizon is 1000000000, it",
        ),
        (configured(type="pi0_fast"), r"policy of type 'pi0_fast', only pi0 and pi05"),
        (configured(type=["pi0"]), r"policy of type \['pi0'\], only pi0 and pi05"),
        (
            change("config.json", lambda c: c["normalization_mapping"].update(VISUAL="MEAN_STD")),
            "normalization_mapping has 'MEAN_STD' for VISUAL",
        ),
        (configured(input_features=WRIST_FIRST), "wrist' comes first, this project"),
        (features("observation.state", {"type": "STATE", "shape": [8, 1]}), r"shape of observation\.state is \[8, 1\]"),
        (lambda d: (d / "config.json").unlink(), r"has LeRobot's processors, and not its config\.json: copy that"),
        (
            setting("normalizer_processor", norm_map={"STATE": "QUANTILES"}),
            "norm_map has 'QUANTILES' for STATE, .*MEAN",
        ),
        (setting("normalizer_processor", norm_map={"ACTION": "MEAN_STD"}), "norm_map has 'IDENTITY' for STATE"),
        (
            setting("normalizer_processor", norm_map={"STATE": "MEAN_STD", "VISUAL": "MEAN_STD"}),
            "norm_map has 'MEAN_STD' for VISUAL",
        ),
        (
            setting("unnormalizer_processor", POSTPROCESSOR, norm_map={"ACTION": "MIN_MAX"}),
            r"policy_postprocessor\.json: norm_map has 'MIN_MAX' for ACTION",
        ),
        (setting("normalizer_processor", eps=1e-3), r"normalizer_processor: eps is 0\.001, supported is 1e-08"),
        (
            setting("normalizer_processor", features={"action": {}}),
            r"that are normalised lack observation\.state of type",
        ),
        (setting("normalizer_processor", normalize_observation_keys=["x"]), "normalize_observation_keys is"),
        (setting("tokenizer_processor", max_length=64), "max_length is 64, tokenizer_max_length of config.json is 48"),
        (setting("tokenizer_processor", padding_side="left"), "padding_side is 'left', supported is 'right'"),
        (setting("tokenizer_processor", clean=True), "tokenizer_processor has the key 'clean', which this version"),
        (setting("device_processor", float_dtype="bfloat16"), "float_dtype is 'bfloat16', supported is"),
        (
            setting("relative_actions_processor", enabled=True),
            "relative_actions_processor: enabled is True, supported is",
        ),
        (setting("absolute_actions_processor", POSTPROCESSOR, enabled=True), "enabled is True, supported is False"),
        (setting("rename_observations_processor", rename_map={"observation.s": "observation.state"}), "rename_map is"),
        (setting("rename_observations_processor", rename_map=RENAMED), "image2' comes first"),
        (change(PREPROCESSOR, lambda c: c["steps"].insert(0, {"registry_name": "crop"})), "has the step 'crop', which"),
        (change(PREPROCESSOR, lambda c: c["steps"].insert(0, {"class": "os.system"})), r"has the step 'os\.system'"),
        (change(PREPROCESSOR, lambda c: c["steps"].insert(0, 3)), "has the step 3, which is not supported"),
        (change(PREPROCESSOR, lambda c: c["steps"].pop(2)), "must have the step pi0_new_line_processor and not pi05"),
        (change(PREPROCESSOR, lambda c: c["steps"].append(c["steps"][-1])), "has 2 steps normalizer_processor"),
        (change(PREPROCESSOR, lambda c: c["steps"].pop()), "has 0 steps normalizer_processor, supported is one"),
        (
            change(PREPROCESSOR, lambda c: c["steps"][-1].pop("state_file")),
            "names no state_file: its statistics are missing",
        ),
        (
            change(PREPROCESSOR, lambda c: c["steps"][-1].update(state_file="../a.safetensors")),
            r"not '\.\./a\.safetensors'",
        ),
        (
            change(PREPROCESSOR, lambda c: c["steps"][-1].update(state_file="/a.safetensors")),
            "must name safetensors files beside it, not",
        ),
        (
            change(PREPROCESSOR, lambda c: c["steps"][-1].update(state_file="a.safetensors")),
            r"names the file a\.safetensors, which is missing",
        ),
        (change(PREPROCESSOR, lambda c: c["steps"][-1].update(state_file=3)), "state_file is 3, it must be text"),
        (lambda d: (d / PREPROCESSOR).write_text("["), "policy_preprocessor.json is not JSON"),
        (pipe(PREPROCESSOR), r"policy_preprocessor\.json cannot be read: it is not a regular file"),
        (pipe(STATE_FILE), rf"{STATE_FILE} cannot be read: it is not a regular file"),
        (stats(lambda t: t.clear()), rf"{STATE_FILE} has no statistics of observation\.state; give policy\.norm_stats"),
        (
            stats(lambda t: t["observation.state.std"].neg_()),
            rf"{STATE_FILE} and .*state\.std is negative in dimension 0",
        ),
        (
            stats(lambda t: t.update({"observation.state.mean": torch.ones(2, 8)})),
            r"state\.mean must be a list of finite",
        ),
        (stats(lambda t: t.update({"observation.state.mean": torch.ones(10**6)})), "which is too much for a statistic"),
        (stats(lambda t: t.update({"observation.state.mean": torch.ones(8).long()})), "mean' holds I64, not one of"),
    ],
)
def test_what_would_change_the_actions_is_refused_by_name(
    copy: Callable[[bool], Path], damage: Callable[[Path], object], message: str
) -> None:
    directory = copy(False)
    damage(directory)
    with pytest.raises(ValueError, match=message) as raised:
        find_policy(directory)
    assert "\n" not in str(raised.value)
    assert str(directory) in str(raised.value)


def test_the_state_of_pi05_is_normalised_before_it_is_in_the_prompt(copy: Callable[[bool], Path]) -> None:
    directory = copy(True)
    change(PREPROCESSOR, lambda c: c["steps"].append(c["steps"].pop(3)))(directory)
    with pytest.raises(ValueError, match=r"has pi05_prepare_.* before normalizer_processor, supported is the reverse"):
        find_policy(directory)


def test_given_statistics_take_the_place_of_those_that_are_missing(
    copy: Callable[[bool], Path], tmp_path: Path
) -> None:
    directory = copy(False)
    path = tmp_path / "stats.json"
    path.write_text(json.dumps({"norm_stats": find_policy(directory).norm_stats}))
    change(PREPROCESSOR, lambda c: c["steps"][-1].update(state_file="gone.safetensors"))(directory)
    assert find_policy(directory, norm_stats=str(path)).norm_stats_source == path


def test_cameras_may_have_other_names(copy: Callable[[bool], Path]) -> None:
    directory = copy(False)
    names = {"observation.images.image": "observation.images.a", "observation.images.image2": "observation.images.b"}
    setting("rename_observations_processor", rename_map=names)(directory)
    assert find_policy(directory).config.cameras == 2
