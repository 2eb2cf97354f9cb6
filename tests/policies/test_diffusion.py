"""LeRobot's diffusion policy beside LeRobot itself. It is no dependency: docs/your_policy.md says how to install it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot")

from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy as LeRobots
from lerobot.policies.diffusion.processor_diffusion import make_diffusion_pre_post_processors

from dsrl_async.config.load import validate
from dsrl_async.config.settings import ConfigError
from dsrl_async.policies.buffers import BufferedPolicy
from dsrl_async.policies.diffusion import DiffusionPolicy
from dsrl_async.policies.find import policy_record
from dsrl_async.run import preflight

CAMERAS = ("observation.images.scene", "observation.images.wrist")
CPU = torch.device("cpu")


def write(directory: Path, modes: str = "MIN_MAX", **settings: Any) -> tuple[LeRobots, Any, Any]:
    """Write a checkpoint with random weights, as LeRobot does; returns LeRobot's policy and its processors."""
    torch.manual_seed(0)
    mode = NormalizationMode(modes)
    config = DiffusionConfig(
        input_features={
            **{name: PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for name in CAMERAS},
            "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        normalization_mapping={"VISUAL": NormalizationMode.MEAN_STD, "STATE": mode, "ACTION": mode},
        **{
            **{"n_obs_steps": 1, "horizon": 8, "n_action_steps": 8, "down_dims": (16, 32), "n_groups": 4},
            **{"diffusion_step_embed_dim": 16, "spatial_softmax_num_keypoints": 4, "noise_scheduler_type": "DDIM"},
            **{"num_inference_steps": 5, "device": "cpu", "drop_n_last_frames": 0, "push_to_hub": False},
        }
        | settings,
    )
    policy = LeRobots(config).eval()
    policy.save_pretrained(directory)
    rng = np.random.default_rng(0)
    stats: dict[str, dict[str, Any]] = {
        name: {"mean": rng.random((3, 1, 1)), "std": 0.1 + rng.random((3, 1, 1))} for name in CAMERAS
    }
    for name, width in (("observation.state", 8), ("action", 7)):
        low = rng.normal(size=width)
        stats[name] = {"min": low, "max": low + 1 + rng.random(width), "mean": low, "std": 0.1 + rng.random(width)}
        stats[name]["max"][0] = stats[name]["min"][0]  # a dimension that never moves
    for of_feature in stats.values():
        of_feature |= {name: torch.tensor(value, dtype=torch.float32) for name, value in of_feature.items()}
    processors = make_diffusion_pre_post_processors(config, dataset_stats=stats)
    for processor in processors:
        processor.save_pretrained(directory)
    return policy, *processors


@pytest.mark.parametrize(
    ("settings", "modes"),
    [
        ({}, "MIN_MAX"),
        ({}, "MEAN_STD"),
        ({"prediction_type": "sample"}, "MIN_MAX"),
        ({"clip_sample": False, "num_inference_steps": 7, "crop_shape": (56, 56)}, "MIN_MAX"),
        ({"use_separate_rgb_encoder_per_camera": True, "resize_shape": (48, 48)}, "MIN_MAX"),
    ],
)
@torch.no_grad()
def test_actions_are_lerobots_own(tmp_path: Path, settings: dict[str, Any], modes: str) -> None:
    theirs, before, after = write(tmp_path, modes, **settings)
    rng = np.random.default_rng(1)
    images = torch.from_numpy(rng.integers(0, 256, (3, 2, 64, 64, 3), np.uint8))
    state = torch.from_numpy(rng.normal(size=(3, 8)).astype(np.float32))
    noise = torch.from_numpy(rng.normal(size=(3, 8, 7)).astype(np.float32))
    state[:, 0] = before.steps[-1]._tensor_stats["observation.state"]["min"][0]
    observation = {name: images[:, index].permute(0, 3, 1, 2) / 255 for index, name in enumerate(CAMERAS)}
    batch = dict(before({**observation, "observation.state": state}))
    batch["observation.images"] = torch.stack([batch[name] for name in CAMERAS], dim=1)[:, None]
    batch["observation.state"] = batch["observation.state"][:, None]
    expected = after(theirs.diffusion.generate_actions(batch, noise=noise))

    ours = BufferedPolicy("diffusion", DiffusionPolicy(tmp_path), CPU, ["go"]).batch(3, 0)
    ours.images.copy_(images)
    ours.state.copy_(state)
    ours.noise.copy_(noise)
    ours.encode()
    ours.denoise()
    torch.testing.assert_close(ours.actions, expected, rtol=1e-4, atol=1e-4)
    assert ours.frozen.capturable  # nothing waits for the device


def test_it_is_found_by_what_the_checkpoint_says(tmp_path: Path) -> None:
    write(tmp_path)
    record = preflight.check_run(validate({"policy": {"checkpoint": str(tmp_path)}})).policy
    assert (record.type, record.maker) == ("dsrl_async.policies.diffusion:DiffusionPolicy", "LeRobot")
    assert (record.spec.action_horizon, record.spec.action_dim) == (8, 7)
    assert record.own_settings == {"options"}


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit(n_obs_steps=2), "n_obs_steps is 2, supported is 1"),
        (edit(strange_key=1), "has the key 'strange_key', which the installed LeRobot does not know"),
        (edit(horizon=6), "horizon should be an integer multiple"),
        (edit(down_dims=[16, 64]), r"model.safetensors: diffusion\..* is \[.*\], by config.json it is"),
        (edit(vision_backbone="resnet34"), "model.safetensors lacks the tensor"),
        (lambda place: (place / "policy_preprocessor.json").unlink(), "has no policy_preprocessor.json"),
    ],
)
def test_what_is_missing_or_not_supported_is_said(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        policy_record(validate({"policy": {"checkpoint": str(tmp_path)}}).policy)


def test_ddpm_is_sampled_with_ddim_and_that_is_said(tmp_path: Path) -> None:
    write(tmp_path, noise_scheduler_type="DDPM", num_inference_steps=None)
    settings = {"checkpoint": str(tmp_path), "options": {"num_inference_steps": 10}}
    (warning,) = policy_record(validate({"policy": settings}).policy).warnings
    assert "noise_scheduler_type is DDPM" in warning
    assert "sampled with DDIM in 10 steps" in warning
    with pytest.raises(ConfigError, match=r"policy\.options: num_inference_steps is 101, it must be from 1 to 100"):
        preflight.check_checkpoint(validate({"policy": {**settings, "options": {"num_inference_steps": 101}}}))
