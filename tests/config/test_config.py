"""Configuration: layers, types, and one clear sentence for everything that is wrong."""

from __future__ import annotations

import inspect
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gpus import found_gpus
from support.paths import CONFIGS, SCRIPTS

from dsrl_async.config.command_line import load_config
from dsrl_async.config.load import get_key, leaf_fields, to_yaml, validate
from dsrl_async.config.settings import Config, ConfigError, EnvConfig
from dsrl_async.envs import EnvironmentSpec, environment_record, gymnasium_adapter, libero_files, options
from dsrl_async.pi0.config import EMBEDDED_POLICY, Pi0Config
from dsrl_async.pi0.files import maker_of, read_content
from dsrl_async.run import checkpoints, preflight

needs_libero = pytest.mark.skipif(find_spec("libero") is None, reason="pip install -e '.[libero]'")


def test_a_warm_up_that_is_not_given_fills_a_batch() -> None:
    assert validate({"sac": {"batch_size": 256}}).replay.warmup_decisions == 256
    assert validate({"sac": {"batch_size": 16}}).replay.warmup_decisions == 128
    with pytest.raises(ConfigError, match=r"replay\.warmup_decisions must be at least sac\.batch_size"):
        validate({"sac": {"batch_size": 256}, "replay": {"warmup_decisions": 128}})


def test_defaults_are_the_tabletop_file_and_it_names_every_key() -> None:
    path = CONFIGS / "tabletop.yaml"
    assert load_config(["--config", str(path)]) == Config()
    written = yaml.safe_load(path.read_text())
    for key, _ in leaf_fields():
        node = written
        for name in key.split("."):
            assert name in node, f"{key} is missing in {path.name}"
            node = node[name]


def test_libero_file_has_the_values_of_the_guide() -> None:
    config = load_config(["--config", str(CONFIGS / "libero_spatial_pi0.yaml")])
    sac = config.sac
    assert (config.actors, config.env.max_episode_steps, config.env.use_step_penalty) == (16, 240, True)
    assert (sac.gamma, sac.tau, sac.train_actor_steps, sac.critic_lr) == (0.999, 0.005, 10, 3e-4)
    assert (sac.actor_lr, sac.alpha_lr) == (1e-4, 3e-4)  # the guide's `optim.lr` stands under `entropy_tuning`
    assert (sac.init, sac.critic_in_actor_loss, sac.augmentation) == ("rlinf", "after", "none")
    assert (sac.alpha_type, sac.initial_alpha, sac.target_entropy) == ("softplus", 1.0, -16)
    assert (sac.noise_dim, sac.num_q_heads, sac.image_latent_dim, sac.state_latent_dim) == (32, 10, 64, 64)
    assert sac.hidden_dims == [128, 128, 128]
    decisions = 16 * 240 // config.env.chunk
    assert config.replay_ratio * decisions == pytest.approx(200, rel=0.01)


def test_aloha_file_has_the_values_of_the_authors_code() -> None:
    config = load_config(["--config", str(CONFIGS / "aloha_sim_pi0.yaml")])
    sac, env = config.sac, config.env
    assert (env.chunk, env.max_episode_steps, env.use_step_penalty, config.replay_ratio) == (50, 400, True, 20)
    assert (sac.state_dim, sac.action_magnitude, sac.gamma, sac.discount_per, sac.batch_size) == (
        *(14, 2.0, 0.999),
        *("env_step", 256),
    )
    assert (sac.actor_lr, sac.critic_lr, sac.alpha_lr, sac.tau) == (1e-4, 3e-4, 3e-4, 0.005)
    # Their target of 0 is the entropy of the noise after it is scaled by 2, in 32 dimensions.
    assert sac.target_entropy == pytest.approx(0 - 32 * math.log(sac.action_magnitude), abs=0.01)
    assert (config.replay.warmup_decisions, config.replay.capacity) == (1000, 3_000_000 // 20)
    bound = inspect.signature(gymnasium_adapter.make_environment).bind(**env.options).arguments
    assert bound["state"] == "agent_pos"
    for transform in ("state_transform", "action_transform"):
        assert options.function(transform, bound[transform])(np.zeros(14)).shape == (14,)


def test_rlinfs_recipe_plays_one_initial_state_and_is_that_of_the_suite_otherwise() -> None:
    one, suite = (
        load_config(["--config", str(CONFIGS / f"libero_spatial_pi0{name}.yaml")]).model_dump()
        for name in ("", "_suite")
    )
    assert (one["env"].pop("task_ids"), one["env"].pop("init_states")) == ([0], [0])
    assert (suite["env"].pop("task_ids"), suite["env"].pop("init_states")) == (None, None)
    assert one == suite


def test_what_to_do_about_sizes_that_differ_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = replace(environment_record(EnvConfig().model_dump()), name="mine", own_settings=frozenset({"options"}))
    monkeypatch.setattr(preflight.policy, "environment_record", lambda env: record)
    config = Config.model_validate({"policy": {"checkpoint": str(tmp_path)}})
    spec = EnvironmentSpec(cameras=2, image_size=96, state_dim=14, action_dim=7, prompts=("go",))
    with pytest.raises(ConfigError, match=r"that of the environment mine is 96; make it 224 if env\.options can$"):
        preflight.check_fit(config, Pi0Config(), spec)
    widths = r"the robot state of .* is 8, that of the environment mine is 14"
    spec = spec._replace(image_size=224)
    with pytest.raises(ConfigError, match=widths + r"; its files do not say it, .* docs/adapters\.md has a config"):
        preflight.check_fit(config, Pi0Config(), spec)
    Pi0Config().save(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=widths + "$"):
        preflight.check_fit(config, Pi0Config(), spec)


@needs_libero
def test_small_libero_file_fits_the_policy_that_comes_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    config = load_config(["--config", "configs/libero_spatial_small.yaml"])
    run = preflight.check_run(config)
    assert run.policy.spec.image_size == run.spec.image_size == 96
    assert run.spec.prompts == ("pick up the black bowl from table center and place it on the plate",)


@needs_libero
@pytest.mark.parametrize("suite", ["libero_spatial", "libero_spatial_swap"])
def test_small_suite_file_trains_all_tasks_also_of_a_variation(monkeypatch: pytest.MonkeyPatch, suite: str) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    if suite not in libero_files.suites():
        pytest.skip(f"this distribution of LIBERO has no {suite}")
    run = preflight.check_run(load_config(["--config", "libero_spatial_small_suite", "--env.name", suite]))
    assert len(run.spec.prompts) == 10
    assert run.environment.episode_steps == 220
    assert run.config.evaluation.lanes == 1
    assert run.config.sac.instruction_dim == 10


@needs_libero
def test_initial_states_that_are_not_there_are_refused_before_anything_is_started() -> None:
    env = {"name": "libero_spatial", "task_ids": [2], "init_states": [49]}
    preflight.check_environment(validate({"env": env}))
    with pytest.raises(ConfigError, match=r"^env\.init_states: task 2 has initial states 0 to 49, not 50$"):
        preflight.check_environment(validate({"env": {**env, "init_states": [0, 50]}}))


@needs_libero
@pytest.mark.parametrize(("name", "tasks"), [("libero_spatial_pi0", 1), ("libero_spatial_pi0_suite", 10)])
def test_libero_file_fits_a_policy_of_openpi(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, tasks: int
) -> None:
    """As far as that can be said without its weights: of openpi's sizes, trained on LIBERO's own pictures."""
    monkeypatch.chdir(tmp_path)
    config = load_config(["--config", str(CONFIGS / f"{name}.yaml")])
    spec = preflight.check_environment(config)
    assert len(spec.prompts) == tasks
    preflight.check_fit(config, Pi0Config(), spec)
    preflight.check_render_quality(config, "openpi or RLinf")
    with pytest.raises(ConfigError, match=r"^policy\.checkpoint: .*checkpoints/pi0_libero_spatial"):
        preflight.check_run(config)


def test_command_line_overrides_file_overrides_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("actors: 3\nseed: 5\nsac:\n  gamma: 0.9\n  tau: 0.5\n")
    arguments = ["--config", str(path), "--sac.gamma", "0.8", "--actors=4", "--serial", "--replay-ratio", "2"]
    config = load_config(arguments)
    assert (config.actors, config.seed, config.sac.gamma, config.sac.tau) == (4, 5, 0.8, 0.5)
    assert config.serial
    assert config.replay_ratio == 2.0
    assert config.sac.num_q_heads == Config().sac.num_q_heads


@pytest.mark.parametrize(
    ("option", "advice"),
    [
        ("--envs-per-actor", "leave it out"),
        ("--envs_per_actor", "leave it out"),
        ("--learner-device", "learner.device"),
    ],
)
def test_a_deleted_option_is_refused_by_name(option: str, advice: str) -> None:
    for arguments in ([option, "2"], [f"{option}=2"]):
        with pytest.raises(ConfigError, match=f"^{option} is no longer an option: .*{advice}$"):
            load_config(arguments)


def test_a_deleted_key_is_refused_in_a_file_and_ignored_in_an_old_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("envs_per_actor: 2\nactors: 3\n")
    with pytest.raises(ConfigError, match=r"^envs_per_actor is no longer a setting: .*leave it out$"):
        load_config(["--config", str(tmp_path / "config.yaml")])
    assert load_config(["--resume", str(tmp_path)]).actors == 3


def test_an_option_that_was_never_a_key_is_an_unknown_key_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("learner_device: cpu\n")
    with pytest.raises(ConfigError, match=r"^unknown key 'learner_device'.*'learner.device'"):
        load_config(["--config", str(tmp_path / "config.yaml")])


def test_every_key_can_be_given_on_the_command_line() -> None:
    for key, _ in leaf_fields():
        value = get_key(Config(), key)
        text = "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
        if key == "resume":
            continue
        assert load_config([f"--{key.replace('_', '-')}={text}"]) == Config()
        assert load_config([f"--{key}={text}"]) == Config()


def test_off_is_a_word_in_a_file_as_on_the_command_line(tmp_path: Path) -> None:
    """YAML 1.1 takes it for false."""
    path = tmp_path / "off.yaml"
    path.write_text("log: {console: off}\nlearner: {graphs: off}\nprofile: yes\nthrottle_actors: false\n")
    config = load_config(["--config", str(path)])
    assert (config.log.console, config.learner.graphs) == ("off", "off")
    assert (config.profile, config.throttle_actors) == (True, False)


def test_text_stays_text() -> None:
    assert load_config(["--run-dir", "2026"]).run_dir == "2026"
    assert load_config(["--max-minutes", "null"]).max_minutes is None
    assert load_config(["--sac.actor-lr", "1e-4"]).sac.actor_lr == 1e-4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sac.gama", "0.9"], "--sac.gama"),
        (["--actors", "many"], "actors"),
        (["--actors", "0"], "actors"),
        (["--actors", "2.5"], "actors"),
        (["--sac.gamma", "1.5"], "sac.gamma"),
        (["--sac.gamma", "nan"], "sac.gamma"),
        (["--replay-ratio", "inf"], "replay_ratio"),
        (["--serial", "--device", "cuda"], "serial"),
        (["--sac.conv-kernels", "[3, 3]"], "same length"),
        (["--sac.conv-kernels", "[99]"], "no pixels"),
        (["--sac.hidden-dims", "[128"], "hidden_dims"),
        (["--inference.buckets", "[4, 2]"], "buckets"),
        (["--env.task-ids", "[]"], "task_ids must name at least one"),
        (["--env.init-states", "[3, 1, 3]"], "none twice"),
        (["--replay.capacity", "100"], "replay.capacity"),
        (["--replay.warmup-decisions", "5"], "batch"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--resume", "nowhere"], "nowhere"),
        (["--resume", "a", "--config", "b"], "--config"),
        (["--resume", "a", "--run-dir", "b"], "--run-dir"),
        (["--sac.actor-betas", "[1.5, 2]"], "actor_betas"),
        (["--seed", str(2**64)], "seed"),
        (["surprise"], "surprise"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--sac.gama=0.9", r"unrecognized arguments: --sac\.gama=0\.9; did you mean '--sac\.gamma'"),
        ("--actorz", "unrecognized arguments: --actorz; did you mean '--actors'"),
        ("--zzzzzzzz", "unrecognized arguments: --zzzzzzzz; --help-all lists all options"),
        ("stray", "unrecognized arguments: stray$"),
    ],
)
def test_unknown_option_suggests_the_nearest(argument: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config([argument])


def test_resume_of_what_is_not_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--resume .*: not a run directory, since it has no config\.yaml"):
        load_config(["--resume", str(tmp_path)])


def test_unknown_key_in_a_file_suggests_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("sac:\n  gama: 0.9\n")
    with pytest.raises(ConfigError, match=r"unknown key 'sac\.gama'; did you mean 'sac\.gamma'"):
        load_config(["--config", str(path)])
    for text in (b"[1, 2]", b"a: [", b"sac: 3", b"\xff\xfe\x00"):
        path.write_bytes(text)
        with pytest.raises(ConfigError) as caught:
            load_config(["--config", str(path)])
        assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(
    gamma=st.floats(0.01, 1.0),
    dims=st.lists(st.integers(1, 512), min_size=1, max_size=4),
    actors=st.integers(1, 64),
    run_dir=st.none() | st.text("abc/-_.", min_size=1),
)
def test_saved_configuration_reads_back(gamma: float, dims: list[int], actors: int, run_dir: str | None) -> None:
    config = validate({"actors": actors, "run_dir": run_dir, "sac": {"gamma": gamma, "hidden_dims": dims}})
    assert validate(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"env": {"name": "libero_spatial"}},
            "LIBERO is not installed|--policy.checkpoint DIR, or --config libero_spatial_small$",
        ),
        ({"env": {"name": "libero_goal", "image_size": 64}}, r"LIBERO is not installed|--policy.checkpoint DIR$"),
        ({"policy": {"checkpoint": "nowhere"}}, "no directory or safetensors file .*nowhere"),
        ({"env": {"chunk": 11}}, "env.chunk"),
        ({"sac": {"noise_dim": 16}}, "sac.noise_dim"),
        ({"sac": {"noise_layout": "knots", "noise_knots": 11}}, "sac.noise_knots: 11 is more than the policy's 10 "),
        ({"sac": {"state_dim": 9}}, "sac.state_dim"),
        ({"sac": {"cameras": [1, 2]}}, "sac.cameras: tabletop has no camera 2; choose from 0, 1"),
    ],
)
def test_policy_and_environment_must_fit(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        preflight.check_run(validate(settings))


def test_the_base_policys_noise_is_for_those_who_can_learn_from_it() -> None:
    base = {"warmup": "base"}
    for layout in ("repeat", "knots"):
        with pytest.raises(ConfigError, match=f"^replay.warmup: base is noise that no vector of .* {layout} describes"):
            validate({"replay": base, "sac": {"noise_layout": layout}})
        validate({"replay": base, "sac": {"noise_layout": layout, "algorithm": "na"}})
    for layout in ("per_slot", "shift"):
        assert validate({"replay": base, "sac": {"noise_layout": layout}}).warmup == "base"
    assert (validate({}).warmup, validate({"sac": {"algorithm": "na"}}).warmup) == ("actor", "base")


@pytest.mark.parametrize("schedule", ["constant", "step", "linear"])
def test_rates_fall_from_the_beginning_to_the_end_of_a_schedule(schedule: str) -> None:
    of_schedule = {"lr_schedule": schedule, "lr_decay_begin": 10, "lr_decay_end": 20}
    sac = validate({"sac": {**of_schedule, "final_target_entropy": -21.0}}).sac
    expected = {"constant": [1, 1, 1, 1, 1], "step": [1, 0.2, 0.2, 0.2, 0.2], "linear": [1, 1, 0.6, 0.2, 0.2]}
    assert [sac.lr_fraction(updates) for updates in (9, 10, 15, 20, 10**9)] == pytest.approx(expected[schedule])
    entropies = {"constant": [-16] * 5, "step": [-16, -21, -21, -21, -21], "linear": [-16, -16, -18.5, -21, -21]}
    assert [sac.target_entropy_after(updates) for updates in (9, 10, 15, 20, 10**9)] == entropies[schedule]
    stays = validate({"sac": of_schedule}).sac
    assert [stays.target_entropy_after(updates) for updates in (9, 15, 20)] == [-16] * 3
    with pytest.raises(ConfigError, match="lr_decay_begin must be below lr_decay_end with lr_schedule linear"):
        validate({"sac": {"lr_schedule": "linear", "lr_decay_begin": 20, "lr_decay_end": 20}})


def test_an_entropy_to_end_with_needs_a_schedule() -> None:
    with pytest.raises(ConfigError, match=r"^sac.final_target_entropy: it has no effect with sac.lr_schedule constant"):
        preflight.check_run(validate({"sac": {"final_target_entropy": -20}}))
    preflight.check_run(validate({"sac": {"final_target_entropy": -20, "lr_schedule": "step"}}))


@pytest.mark.parametrize("name", ["model.safetensors", "norm_stats.json", "tokenizer.json", "config.json"])
def test_damaged_policy_is_said_before_anything_is_started(tmp_path: Path, name: str) -> None:
    shutil.copytree(EMBEDDED_POLICY, tmp_path / "policy")
    path = tmp_path / "policy" / name
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=name) as caught:
        preflight.check_run(validate({"policy": {"checkpoint": str(tmp_path / "policy")}}))
    assert "\n" not in str(caught.value)


def test_too_little_memory_is_said_before_anything_is_started() -> None:
    config = validate({"replay": {"capacity": 10**9}})
    run = preflight.check_run(config)
    with pytest.raises(ConfigError, match=r"needs about .* GiB .* lower replay.capacity or actors"):
        preflight.check_memory(run)
    for name in ("tabletop", "libero_spatial"):  # a worker of LIBERO needs more than a gigabyte
        config = validate({"actors": 2000, "env": {"name": name}})
        with pytest.raises(ConfigError) as caught:
            preflight.check_memory(replace(run, config=config, environment=environment_record(config.env.model_dump())))
        assert (float(str(caught.value).split()[4]) > 2000) == (name != "tabletop")


def test_run_directory_is_refused_when_used_or_unwritable(tmp_path: Path) -> None:
    config = validate({"run_dir": str(tmp_path / "run")})
    run_dir, lock = preflight.open_run_directory(config)
    with lock:
        with pytest.raises(ConfigError, match="not empty"):
            preflight.open_run_directory(config)
        with pytest.raises(ConfigError, match="nothing was saved there"):
            preflight.open_run_directory(validate({"run_dir": str(run_dir), "resume": str(run_dir)}))
    (run_dir / "config.yaml").write_text(to_yaml(config))
    checkpoint = run_dir / "checkpoints" / "00000007-00000007"
    checkpoint.mkdir()
    counters = {key: [7] for key in (*checkpoints.SUMMED, *checkpoints.KEPT)}
    state = {"format": checkpoints.FORMAT, "lanes": 1, "counters": counters}
    (checkpoint / "state.json").write_text(json.dumps(state))
    resumed = {"run_dir": str(run_dir), "resume": str(run_dir)}
    _, lock = preflight.open_run_directory(validate(resumed))
    with lock, pytest.raises(ConfigError, match="in use by another process"):
        preflight.open_run_directory(validate(resumed))
    with pytest.raises(ConfigError, match="7 of 5 are done already"):
        preflight.open_run_directory(validate({**resumed, "max_decisions": 5}))
    other = validate({"run_dir": str(run_dir), "resume": str(run_dir), "sac": {"hidden_dims": [7]}})
    with pytest.raises(ConfigError, match=r"sac\.hidden_dims: .* made with \[128, 128, 128\]"):
        preflight.open_run_directory(other)
    other = validate({"run_dir": str(run_dir), "resume": str(run_dir), "env": {"layout": "fixed"}})
    with pytest.raises(ConfigError, match=r"env\.layout: the resumed run was made with swap2"):
        preflight.open_run_directory(other)
    other = validate({"run_dir": str(run_dir), "resume": str(run_dir), "env": {"render_quality": "fast"}})
    with pytest.raises(ConfigError, match=r"env\.render_quality: .* made with exact, .*ignore_render_quality"):
        preflight.open_run_directory(other)
    forced = {**resumed, "env": {"render_quality": "fast"}, "policy": {"ignore_render_quality": True}}
    preflight.open_run_directory(validate(forced))[1].close()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write to"):
        preflight.open_run_directory(validate({"run_dir": str(tmp_path / "file" / "run")}))


@pytest.mark.parametrize("capacity", [10**15, 2 * 10**15, 10**18])
def test_a_size_beyond_64_bits_is_too_much_memory_and_no_overflow(capacity: int) -> None:
    run = preflight.check_run(validate({"replay": {"capacity": capacity}}))
    with pytest.raises(ConfigError, match=r"needs about [0-9.]+ GiB .* lower replay.capacity or actors"):
        preflight.check_memory(run)


ROOMY = {"sac.batch_size": 10**6, "replay.warmup_decisions": 10**6, "replay.capacity": 10**6}


@pytest.mark.parametrize(
    ("lower", "settings"),
    [
        ("sac.num_q_heads", {"sac.num_q_heads": 10**6}),
        ("sac.num_q_heads", {"sac.num_q_heads": 2**63 - 1}),
        ("sac.hidden_dims", {"sac.hidden_dims": [10**5, 10**5]}),
        ("sac.image_latent_dim", {"sac.image_latent_dim": 10**8}),
        ("sac.state_latent_dim", {"sac.state_latent_dim": 10**9}),
        ("sac.conv_channels", {"sac.conv_channels": [10**8]}),
        ("sac.conv_padding", {"sac.conv_padding": 10**5}),
        ("sac.batch_size", ROOMY),
        ("inference.buckets", {"inference.buckets": [1, 10**8]}),
        ("policy.action_horizon", {"policy.action_horizon": 10**5, "sac.noise_layout": "per_slot"}),
        ("replay.capacity or actors", {"replay.capacity": 10**9}),
        ("replay.capacity or actors", {"actors": 4096, "replay.capacity": 65536}),
    ],
)
@pytest.mark.parametrize("serial", [False, True])
def test_what_takes_too_much_memory_is_named(
    lower: str, settings: dict[str, Any], serial: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsrl_async.run.preflight.memory.available_memory", lambda: 64 << 30)
    options = {"actors": 2, "device": "cpu", "serial": serial, **settings}
    run = preflight.check_run(load_config([f"--{key}={value}" for key, value in options.items()]))
    with pytest.raises(ConfigError, match=rf"needs about [0-9.]+ GiB .*; lower {re.escape(lower)}") as caught:
        preflight.check_memory(run)
    assert "\n" not in str(caught.value)


def test_an_evaluation_needs_an_actor_and_no_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsrl_async.run.preflight.memory.available_memory", lambda: 16 << 30)
    run = preflight.check_run(validate({"device": "cpu", "sac": {"num_q_heads": 10**5}}))
    with pytest.raises(ConfigError, match=r"lower sac\.num_q_heads"):
        preflight.check_memory(run)
    preflight.check_memory(run, lower="--processes", learning=False)
    run = preflight.check_run(validate({"device": "cpu", "sac": {"hidden_dims": [10**5] * 2}}))
    with pytest.raises(ConfigError, match=r"lower sac\.hidden_dims"):
        preflight.check_memory(run, lower="--processes", learning=False)


def test_a_default_directory_is_made_by_one_run_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "exists", lambda _: False)  # as all see it before the first has made one
    opened = [preflight.open_run_directory(validate({})) for _ in range(24)]
    assert len({run_dir for run_dir, _ in opened}) == 24
    for _, lock in opened:
        lock.close()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    for unusable in (lambda: Path("runs").symlink_to("nothing"), lambda: Path("runs").touch()):
        unusable()
        with pytest.raises(ConfigError, match="cannot write to runs"):
            preflight.open_run_directory(validate({}))
        Path("runs").unlink()


def test_a_lock_that_leads_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, victim = tmp_path / "run", tmp_path / "victim"
    monkeypatch.setattr("dsrl_async.run.preflight.run_directory.choose_run_directory", lambda _: run_dir)
    run_dir.mkdir()
    victim.write_text("mine")
    (run_dir / "lock").symlink_to(victim)
    with pytest.raises(ConfigError, match=r"cannot write to .*/run"):
        preflight.open_run_directory(validate({"run_dir": str(run_dir)}))
    assert victim.read_text() == "mine"


def test_the_command_says_it_on_stderr_and_exits_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsrl_async.launch", "--sac.gama", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_configuration_page_is_up_to_date() -> None:
    command = [sys.executable, str(SCRIPTS / "write_configuration_table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("files", "quality", "refused"),
    [
        ({"config.json": '{"vlm_width": 8}', "training.json": '{"render_quality": "fast"}'}, "exact", "fast"),
        ({"config.json": '{"vlm_width": 8}', "training.json": '{"render_quality": "fast"}'}, "fast", None),
        ({"config.json": '{"vlm_width": 8}', "training.json": '{"render_quality": "exact"}'}, "fast", "exact"),
        ({"config.json": '{"vlm_width": 8}'}, "fast", None),  # ours, and nobody says
        ({}, "fast", "exact"),  # openpi
        ({"config.json": '{"paligemma_variant": "gemma_2b"}'}, "fast", "exact"),
        ({"config.json": '{"type": "pi0"}'}, "fast", "exact"),  # LeRobot
        ({"config.json": '{"type": "pi0"}'}, "exact", None),
    ],
)
def test_a_policy_is_not_shown_pictures_of_another_quality(
    tmp_path: Path, files: dict[str, str], quality: str, refused: str | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    maker = maker_of(read_content(tmp_path))
    policy: dict[str, Any] = {"checkpoint": str(tmp_path)}
    settings = {"env": {"name": "libero_spatial", "render_quality": quality}, "policy": policy}
    if refused is None:
        preflight.check_render_quality(validate(settings), maker)
    else:
        with pytest.raises(ConfigError, match=f"trained on {refused} pictures.*policy.ignore_render_quality"):
            preflight.check_render_quality(validate(settings), maker)
    policy["ignore_render_quality"] = True
    preflight.check_render_quality(validate(settings), maker)


@pytest.mark.parametrize(
    ("name", "devices", "words"),
    [
        (None, 0, None),
        ("cpu", 0, None),
        ("cuda", 1, None),
        ("cuda:1", 2, None),
        ("cuda", 0, "no CUDA device"),
        ("cuda:2", 2, "the last .* is cuda:1"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str | None, devices: int, words: str | None
) -> None:
    monkeypatch.setattr("dsrl_async.host.probe.ask", lambda function, time_limit_s: found_gpus(*devices * [1]))
    config = validate({"learner": {"device": name}})
    if words is None:
        preflight.check_devices(config)
    else:
        with pytest.raises(ConfigError, match=rf"^learner\.device: {name} was asked for, but .*{words}"):
            preflight.check_devices(config)


def test_damaged_training_notes_are_named(tmp_path: Path) -> None:
    settings = {"env": {"name": "libero_spatial"}, "policy": {"checkpoint": str(tmp_path)}}
    maker = "dsrl_async"
    for text in ("{", '{"render_quality": "good"}'):
        (tmp_path / "training.json").write_text(text)
        with pytest.raises(ConfigError, match=r"policy\.checkpoint: .*training\.json"):
            preflight.check_render_quality(validate(settings), maker)


def test_the_fit_of_policy_and_environment_includes_the_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    """`check_run` is what launch, evaluation and doctor ask."""
    asked: list[object] = []
    monkeypatch.setattr("dsrl_async.run.preflight.checked_run.check_render_quality", lambda *given: asked.append(given))
    config = validate({})
    preflight.check_run(config)
    assert asked == [(config, "dsrl_async")]
