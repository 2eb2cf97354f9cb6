"""What may change when a run is resumed: each setting has a fate, and what is fixed is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field
from pydantic.fields import FieldInfo

from dsrl_async.config.load import get_key, leaf_fields, on_resume, set_key, validate
from dsrl_async.config.settings import Config, ConfigError, OnResume, Section
from dsrl_async.run import checkpoints
from dsrl_async.run.preflight.resume import changes, check_resume
from dsrl_async.shm.counters import HISTORY_POINTS

OTHER: dict[str, Any] = {
    "run_dir": "elsewhere",
    "log.loggers": [],
    "log.project": "another",
    "resume": "elsewhere",
    "serial": True,
    "ray": "auto",
    "group.address": "10.0.0.1",
    "group.ports": [7001, 7002],
    "max_minutes": 3.0,
    "max_decisions": 7,
    "stop_at_success": 0.5,
    "device": "cpu",
    "env.name": "my_env:make",
    "env.options": {"size": 3},
    "env.task_ids": [1],
    "env.init_states": [2],
    "env.max_episode_steps": 51,
    "policy.action_horizon": 9,
    "policy.delta_action_dims": 3,
    "sac.cameras": [1],
    "sac.image_pool": 4,
    "sac.gamma": 0.9,
    "sac.batch_size": 64,
    "sac.conv_channels": [16],
    "sac.conv_kernels": [3],
    "sac.conv_strides": [3],
    "sac.hidden_dims": [64, 64],
    "sac.actor_betas": (0.5, 0.999),
    "sac.log_std_min": -5.0,
    "sac.log_std_max": 1.0,
    "replay.demonstrations": ["/elsewhere.hdf5"],
    "replay.demonstration_cameras": ["wrist"],
    "inference.buckets": [1, 2],
    "inference.batch_wait_ms": 3.0,
    "inference.threads": 3,
    "learner.device": "cpu",
    "learner.threads": 3,
    "seed": 5,
    "policy.type": "my_policy:MyPolicy",
    "policy.options": {"size": 3},
    "policy.checkpoint": "elsewhere",
    "policy.tokenizer": "elsewhere",
    "policy.norm_stats": "elsewhere",
}


def other_value(key: str, field: FieldInfo) -> Any:
    """A value of a setting that is valid and not its default."""
    default = get_key(Config(), key)
    if key in OTHER:
        return OTHER[key]
    if isinstance(default, bool):
        return not default
    choices = [value for value in getattr(field.annotation, "__args__", ()) if value not in (default, type(None))]
    if choices and isinstance(choices[0], str):
        return choices[0]
    nested = [value for choice in choices for value in getattr(choice, "__args__", ())]
    if nested:
        return nested[0]
    if default is None:
        return True if bool in choices else 300
    return default * 1.5 if isinstance(default, float) and default < 1 else default + 1


def changed(key: str, value: Any) -> Config:
    settings: dict[str, Any] = {}
    set_key(settings, key, value)
    return validate(settings)


def test_every_setting_is_declared_with_what_becomes_of_it_on_resume() -> None:
    for key, field in leaf_fields():
        fates = [mark for mark in field.metadata if isinstance(mark, OnResume)]
        assert len(fates) == 1, f"{key} must be declared Fixed[...], Announced[...] or Free[...]"


def test_a_setting_without_a_fate_is_found() -> None:
    class Forgotten(Section):
        speed: float = Field(1.0, gt=0)

    ((_, field),) = leaf_fields(Forgotten)
    with pytest.raises(ValueError, match="unpack"):
        on_resume(field)


@pytest.mark.parametrize(("key", "field"), list(leaf_fields()), ids=[key for key, _ in leaf_fields()])
def test_another_value_meets_the_fate_that_the_setting_was_declared_with(key: str, field: FieldInfo) -> None:
    before, now = Config(), changed(key, other_value(key, field))
    assert get_key(before, key) != get_key(now, key)
    fate = on_resume(field)
    if fate is OnResume.FIXED:
        with pytest.raises(ConfigError) as caught:
            changes(before, now)
        assert str(caught.value).startswith(f"{key}: the resumed run was made with ")
        assert str(caught.value).count("\n") == 0
    elif fate is OnResume.ANNOUNCED:
        (line,) = changes(before, now)
        assert line.startswith(f"{key} ")
        assert " -> " in line
    else:
        assert changes(before, now) == []


@pytest.mark.parametrize(
    "key",
    [
        *("sac.image_range", "sac.action_magnitude", "sac.gamma", "sac.discount_per", "sac.noise_layout"),
        *("env.chunk", "env.reward", "env.use_step_penalty", "env.reward_rule"),
        *("env.name", "env.layout", "env.task_ids"),
        *("env.image_size", "env.render_size", "env.rotate_images", "env.max_episode_steps", "policy.denoise_steps"),
    ],
)
def test_what_gives_rows_and_networks_their_meaning_is_fixed(key: str) -> None:
    assert on_resume(dict(leaf_fields())[key]) is OnResume.FIXED


def test_the_sentences_show_values_as_a_file_has_them() -> None:
    before = validate({"sac": {"actor_lr": 3e-4}, "stop_at_success": 0.5})
    now = validate({"sac": {"actor_lr": 1e-4}, "throttle_actors": False})
    assert changes(before, now) == [
        "stop_at_success 0.5 -> null",
        "throttle_actors true -> false",
        "sac.actor_lr 0.0003 -> 0.0001",
    ]
    with pytest.raises(ConfigError, match=r"^sac\.image_range: .* made with zero_one, not minus_one_one; leave it so"):
        changes(Config(), changed("sac.image_range", "minus_one_one"))


def test_a_null_written_out_is_the_same_and_a_preset_is_not() -> None:
    assert changes(Config(), changed("env.max_episode_steps", 50)) == ["env.max_episode_steps null -> 50"]
    libero = {"name": "libero_spatial", "preset": "rlinf"}
    written = validate({"env": libero | {"max_episode_steps": 240}})
    assert changes(validate({"env": libero}), written) == ["env.max_episode_steps null -> 240"]
    with pytest.raises(ConfigError, match=r"^env\.preset: "):
        changes(validate({"env": libero}), validate({"env": {**libero, "preset": "openpi"}}))


def test_the_other_render_quality_is_announced_where_it_is_forced() -> None:
    settings = {"env": {"render_quality": "fast"}}
    with pytest.raises(ConfigError, match=r"or set policy\.ignore_render_quality$"):
        changes(Config(), validate(settings))
    forced = validate({**settings, "policy": {"ignore_render_quality": True}})
    assert changes(Config(), forced) == [
        "env.render_quality exact -> fast",
        "policy.ignore_render_quality false -> true",
    ]


def saved_run(run_dir: Path, successes: list[int], unseen: list[int]) -> None:
    """A run directory with one checkpoint, and what it keeps of the episodes."""
    checkpoint = run_dir / "checkpoints" / "00000007-00000007"
    checkpoint.mkdir(parents=True)
    episodes = {
        "successes": successes,
        "history": [0.0] * HISTORY_POINTS,
        "history_length": 0,
        "unseen": [[0.0, 5.0, float(success)] for success in unseen],
    }
    counters = {key: [7] for key in (*checkpoints.SUMMED, *checkpoints.KEPT)}
    state = {"format": checkpoints.FORMAT, "lanes": 1, "counters": counters, "episodes": episodes}
    (checkpoint / "state.json").write_text(json.dumps(state))
    (run_dir / "config.yaml").write_text("seed: 3\n")


def test_a_goal_that_was_reached_before_is_said(tmp_path: Path) -> None:
    def resumed(run_dir: Path, goal: float | None) -> Config:
        return validate({"seed": 3, "resume": str(run_dir), "run_dir": str(run_dir), "stop_at_success": goal})

    reached, short, failing = tmp_path / "reached", tmp_path / "short", tmp_path / "failing"
    saved_run(reached, [0] * 12 + [1] * 88, [1, 1])
    saved_run(short, [1] * 97, [1, 1])
    saved_run(failing, [1] * 95, [0] * 15)
    message = r"^stop_at_success: the last 100 episodes reach 0\.9 already, 0\.85 is asked for; give a larger"
    with pytest.raises(ConfigError, match=message):
        check_resume(resumed(reached, 0.85), reached)
    assert check_resume(resumed(reached, 0.95), reached) == ["stop_at_success null -> 0.95"]
    assert check_resume(resumed(reached, None), reached) == []
    assert check_resume(resumed(short, 0.5), short) == ["stop_at_success null -> 0.5"]
    assert check_resume(resumed(failing, 0.9), failing) == ["stop_at_success null -> 0.9"]
