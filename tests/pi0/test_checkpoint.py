"""The checkpoint layouts of openpi, RLinf and LeRobot, written by python -m dsrl_async.pi0.synthetic."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import call
from support.paths import SCRIPTS
from support.pi0_models import import_tensors, norm_stats
from support.pi0_reference import Reference
from tokenizers import Tokenizer, models

from dsrl_async.config.load import validate
from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.envs import environment_spec
from dsrl_async.pi0 import Pi0Config, load_model, load_policy, sample_actions
from dsrl_async.pi0 import synthetic as writer
from dsrl_async.pi0.files import find_policy
from dsrl_async.pi0.model import Pi0
from dsrl_async.pi0.policy import Pi0Batch
from dsrl_async.pi0.tensors import EMBEDDING, TIED_EMBEDDING, find_tensors, parameter_count
from dsrl_async.policies.pi0 import pi0_record
from dsrl_async.run.inference.policies import load_policies
from dsrl_async.run.inference.server import InferenceServer
from dsrl_async.run.inference.steering import SteeredPolicy
from dsrl_async.run.preflight import CheckedRun, check_run
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters, NoiseMode

LAYOUTS: tuple[writer.Layout, ...] = ("openpi", "rlinf", "lerobot")
SIZES: dict[str, Any] = {
    **{"image_size": 64, "patch_size": 16, "vision_depth": 1, "vision_mlp": 24, "vlm_width": 40, "vlm_mlp": 48},
    **{"expert_width": 32, "expert_mlp": 56, "depth": 2, "vocab_size": 120},
}
"""The published head geometry, without which nothing can be detected, and else little; fits the tabletop scene."""


IMPOSSIBLE_STATISTICS: list[tuple[str, object, str]] = [
    ("std", [1.0] * 7 + [-1e-6], r"state\.std is negative in dimension 7$"),
    *(
        (name, value, rf"state\.{name} must be a list of finite numbers")
        for name, value in (
            ("mean", [1e39] * 8),
            ("mean", [10**400] * 8),
            ("std", [1e300] * 8),
            ("std", ["1.0"] * 8),
            ("std", [True] * 8),
            ("std", [None] * 8),
            ("std", [[1.0] * 8]),
            ("std", {"0": 1.0}),
            ("mean", [float("nan")] * 8),
            ("mean", [float("-inf")] * 8),
        )
    ),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for pi05 in (False, True):
        for layout in LAYOUTS:
            writer.write_checkpoint(directory / kind(pi05) / layout, writer.pi0_config(pi05, **SIZES), layout)
    return directory


def kind(pi05: bool) -> str:
    return "pi05" if pi05 else "pi0"


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(layout: str, pi05: bool = False) -> Path:
        return Path(shutil.copytree(written / kind(pi05) / layout, tmp_path / layout))

    return make


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """openpi's file as PyTorch sees it, in float32."""
    return {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}


@pytest.mark.parametrize("pi05", [False, True])
def test_layouts_hold_the_same_network(written: Path, pi05: bool) -> None:
    policies = {layout: load_policy(written / kind(pi05) / layout) for layout in LAYOUTS}
    expected = writer.pi0_config(pi05, **SIZES)
    assert policies["openpi"].config == policies["rlinf"].config == expected
    assert policies["lerobot"].config == dataclasses.replace(
        expected, normalisation_epsilon="lerobot", delta_action_dims=0, time_grid="exact", state_in_prompt=pi05
    )
    states = {layout: policy.model.state_dict() for layout, policy in policies.items()}
    for name, tensor in states["openpi"].items():
        assert torch.equal(tensor, states["rlinf"][name]), name
        assert torch.equal(tensor, states["lerobot"][name]), name
    for policy in policies.values():
        assert policy.normaliser.action_scale.tolist() == pytest.approx(
            policies["openpi"].normaliser.action_scale.tolist(), abs=2e-6
        )


@pytest.mark.parametrize("pi05", [False, True])
def test_a_loaded_network_samples_what_the_naive_reference_does(written: Path, pi05: bool) -> None:
    directory = written / kind(pi05) / "openpi"
    model = load_model(directory)
    config = model.config
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 2, 3, 64, 64, generator=generator) * 2 - 1
    tokens = torch.randint(0, config.vocab_size, (2, config.max_token_len), generator=generator)
    mask = torch.arange(config.max_token_len) < torch.tensor([[5], [9]])
    state = torch.randn(2, 32, generator=generator)
    noise = torch.randn(2, config.action_horizon, 32, generator=generator)
    actions = sample_actions(model, images, tokens, mask, state, noise, denoise_steps=4)
    expected = Reference(config, stored(directory)).sample(images, tokens, mask, state, noise, 4)
    assert expected.abs().max() > 1
    assert (actions - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("pi05", [False, True])
def test_bfloat16_is_read_as_if_it_had_been_cast(written: Path, pi05: bool) -> None:
    directory = written / kind(pi05) / "openpi"
    model = load_model(directory, dtype=torch.bfloat16)
    cast = Pi0(model.config).set_dtype(torch.bfloat16)
    import_tensors(cast, stored(directory))
    for (name, parameter), expected in zip(model.named_parameters(), cast.parameters(), strict=True):
        assert parameter.dtype == expected.dtype, name
        assert torch.equal(parameter, expected), name
        assert not parameter.requires_grad
    for (name, buffer), right in zip(model.named_buffers(), cast.buffers(), strict=True):
        assert torch.equal(buffer, right), name


def test_tensors_are_read_in_pieces(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_model(written / "pi0" / "openpi").state_dict()
    monkeypatch.setattr("dsrl_async.pi0.checkpoint.STAGING_BYTES", 1000)
    pieces = load_model(written / "pi0" / "openpi").state_dict()
    assert all(torch.equal(tensor, pieces[name]) for name, tensor in whole.items())


def test_old_lerobot_files(copy: Callable[..., Path]) -> None:
    """The time MLP without `action_`, the embedding under its other name, no prefix."""
    directory = copy("openpi")
    expected = load_model(directory).state_dict()
    tensors = load_file(directory / "model.safetensors")
    tensors[TIED_EMBEDDING] = tensors.pop(EMBEDDING)
    tensors = {name.replace("action_time_mlp_", "time_mlp_"): tensor for name, tensor in tensors.items()}
    assert "time_mlp_in.weight" in tensors
    save_file(tensors, directory / "model.safetensors")
    loaded = load_model(directory / "model.safetensors")
    assert not loaded.config.pi05
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_sizes_that_are_not_published_need_a_config(tmp_path: Path) -> None:
    config = Pi0Config(**SIZES, vision_width=48, vision_heads=4, heads=4, kv_heads=2, head_dim=12)
    writer.write_checkpoint(tmp_path, config, "openpi")
    with pytest.raises(ValueError, match="do not tell how many attention heads"):
        load_model(tmp_path)
    model = load_model(tmp_path / "model.safetensors", config)
    assert model.config == config
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(config)
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor .*k_proj.weight' has shape \[24, "):
        load_model(tmp_path, dataclasses.replace(config, kv_heads=1))


def test_weights_depend_on_seed_and_name_alone(tmp_path: Path) -> None:
    config = writer.pi0_config(False, **SIZES)
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        writer.write_checkpoint(tmp_path / name, config, "openpi", seed)
    one, again, two = (tmp_path / name / "model.safetensors" for name in ("one", "again", "two"))
    assert one.read_bytes() == again.read_bytes() != two.read_bytes()


def test_settings_override_what_the_checkpoint_says(written: Path, tmp_path: Path) -> None:
    directory = written / "pi0" / "openpi"
    settings = {"checkpoint": str(directory), "action_horizon": 12, "delta_action_dims": 0}
    policy = check_run(validate({"policy": settings})).policy.spec
    assert isinstance(policy, Pi0Config)
    assert (policy.action_horizon, policy.delta_action_dims) == (12, 0)
    stats = json.loads(next(directory.rglob("norm_stats.json")).read_text())
    stats["norm_stats"]["state"]["mean"] = [5.0] * 8
    (tmp_path / "norm_stats.json").write_text(json.dumps(stats))
    for given in (tmp_path, tmp_path / "norm_stats.json"):
        loaded = load_policy(directory, norm_stats=str(given), tokenizer=str(directory / "tokenizer.json"))
        assert loaded.normaliser.state_offset.tolist() == [5.0] * 8
    with pytest.raises(ValueError, match=r"^policy\.norm_stats: there is no file .*nothing"):
        check_run(validate({"policy": {**settings, "norm_stats": str(tmp_path / "nothing")}}))
    with pytest.raises(ValueError, match=r"^policy\.tokenizer: .* has no tokenizer"):
        check_run(validate({"policy": {**settings, "tokenizer": str(tmp_path)}}))


def large_tokenizer(directory: Path) -> str:
    words = {word: index for index, word in enumerate(["<bos>", *map(str, range(200))])}
    Tokenizer(models.WordLevel(words, unk_token="0")).save(str(directory / "tokenizer.json"))
    return str(directory / "tokenizer.json")


def broken(name: str, content: str) -> Callable[[Path], str]:
    def write(directory: Path) -> str:
        (directory / name).write_text(content)
        return str(directory / name)

    return write


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        (
            "delta_action_dims",
            lambda d: 9,
            "delta_action_dims is 9, the robot's state has 8 dimensions and its action 7$",
        ),
        ("norm_stats", lambda d: str(d / "nothing"), r"there is no file .*nothing$"),
        ("norm_stats", broken("stats.json", "{"), r"\S*stats\.json is not JSON"),
        (
            "norm_stats",
            broken("stats.json", '{"norm_stats": {"state": {}, "actions": {}}}'),
            r"\S*stats\.json: state lacks",
        ),
        ("tokenizer", lambda d: str(d / "nothing"), r"there is no file or directory \S*nothing$"),
        ("tokenizer", broken("t.json", "{}"), r"\S*t\.json is not a tokenizer\.json"),
        ("tokenizer", large_tokenizer, r"\S*tokenizer\.json has 201 tokens, the policy embeds 120"),
        ("checkpoint", lambda d: str(d / "model.safetensors"), r"\S*model\.safetensors is a file, give the directory"),
    ],
)
def test_the_setting_that_is_wrong_is_named(
    copy: Callable[..., Path], tmp_path: Path, setting: str, value: Callable[[Path], object], message: str
) -> None:
    directory = tmp_path / "given"
    directory.mkdir()
    checkpoint = copy("openpi")
    given = value(checkpoint if setting == "checkpoint" else directory)
    with pytest.raises(ConfigError, match=rf"^policy\.{setting}: {message}"):
        check_run(validate({"policy": {"checkpoint": str(checkpoint), setting: given}}))


@pytest.mark.parametrize("layout", ["openpi", "rlinf"])
@pytest.mark.parametrize("content", [{}, {"architectures": ["PI0Pytorch"], "model_type": "pi0", "vocab_size": 7}])
def test_what_others_write_about_a_model_is_left_alone(copy: Callable[..., Path], layout: str, content: dict) -> None:
    directory = copy(layout)
    (directory / "config.json").write_text(json.dumps(content))
    policy = check_run(validate({"policy": {"checkpoint": str(directory)}})).policy.spec
    assert policy == writer.pi0_config(False, **SIZES)


@pytest.mark.parametrize(("name", "value", "message"), IMPOSSIBLE_STATISTICS)
def test_statistics_that_cannot_be_are_refused(
    written: Path, tmp_path: Path, name: str, value: object, message: str
) -> None:
    content = {"norm_stats": norm_stats()}
    content["norm_stats"]["state"][name] = value  # type: ignore[assignment]  # on purpose
    path = tmp_path / "stats.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"stats\.json: {message}"):
        find_policy(written / "pi0" / "openpi", norm_stats=str(path))


@pytest.mark.parametrize("value", [10**9, 10**300, -1, 2.0, True, None, [2], 0, "3"])
def test_sizes_that_cannot_be_are_refused_at_once(value: object) -> None:
    content = dataclasses.asdict(writer.pi0_config(False, **SIZES))
    for name in (name for name, value in content.items() if type(value) is int):
        if (name, value) != ("delta_action_dims", 0):
            with pytest.raises(ValueError, match=rf"x/config\.json: .*{name} is .*, it must be an int from "):
                Pi0Config.from_json({**content, name: value}, Path("x/config.json"))


@pytest.mark.parametrize("layout", ["openpi", "lerobot"])
def test_quantiles_that_contradict_each_other_are_refused(
    copy: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    directory = copy(layout, pi05=True)
    stats = json.loads(json.dumps(find_policy(directory).norm_stats))
    stats["state"]["q01"][3] = stats["state"]["q99"][3]
    path = tmp_path / "stats.json"
    path.write_text(json.dumps({"norm_stats": stats}))
    equal = load_policy(directory, norm_stats=str(path)).normaliser.state_scale[3].item()
    assert equal == pytest.approx({"openpi": 0.5e-6, "lerobot": 0.5e-8}[layout], rel=1e-3)
    for low, high, message in ((1.0, 0.5, "q01 is above state.q99 in dimension 3"), (-3e38, 3e38, "is farther from")):
        stats["state"]["q01"][3], stats["state"]["q99"][3] = low, high
        path.write_text(json.dumps({"norm_stats": stats}))
        with pytest.raises(ValueError, match=rf"stats\.json: state\..*{message}"):
            load_policy(directory, norm_stats=str(path))


OPENPI = {"action_dim": 32, "paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}


@pytest.mark.parametrize(
    ("pi05", "content", "expected"),
    [
        (False, {**OPENPI, "action_horizon": 7, "precision": "bfloat16"}, {"action_horizon": 7}),
        (False, {"action_horizon": 7, "architectures": ["PI0Pytorch"]}, {"action_horizon": 7}),
        (True, {**OPENPI, "discrete_state_input": True, "pi05": True}, {"state_in_prompt": True}),
        (True, {**OPENPI, "discrete_state_input": False}, {"state_in_prompt": False}),
        (True, {**OPENPI, "max_token_len": 180, "action_horizon": None}, {"max_token_len": 180}),
        (
            False,
            {**OPENPI, "discrete_state_input": True},
            "discrete_state_input is True, that of the tensors is False$",
        ),
        (False, {**OPENPI, "pi05": True}, "pi05 is True, that of the tensors is False$"),
        (False, {**OPENPI, "paligemma_variant": "gemma_2b_lora"}, "paligemma_variant is 'gemma_2b_lora', supported is"),
        (False, {**OPENPI, "action_expert_variant": "dummy"}, "action_expert_variant is 'dummy', supported is"),
        (False, {**OPENPI, "history": 2}, "has the key 'history', which this version does not know: remove it"),
    ],
)
def test_openpis_configuration_is_followed(
    copy: Callable[..., Path], pi05: bool, content: dict, expected: dict | str
) -> None:
    directory = copy("openpi", pi05)
    (directory / "config.json").write_text(json.dumps(content))
    if isinstance(expected, dict):
        assert find_policy(directory).config == dataclasses.replace(writer.pi0_config(pi05, **SIZES), **expected)
    else:
        with pytest.raises(ValueError, match=rf"config\.json:? {expected}"):
            find_policy(directory)


def test_features_that_are_null_say_nothing(copy: Callable[..., Path]) -> None:
    directory = copy("lerobot")
    expected = load_policy(directory).config
    for change in (
        lambda c: c["output_features"].update(action=None),
        lambda c: c["input_features"]["observation.state"].update(shape=None),
        lambda c: c.update(normalization_mapping=None, output_features=None),
    ):
        rewrite_json("config.json", change)(directory)
        assert load_policy(directory).config == expected


def test_tokens_behind_the_vocabulary_need_no_embedding(copy: Callable[..., Path]) -> None:
    """Hugging Face's PaliGemma tokenizer has `<image>`, one id behind those that openpi's policy embeds."""
    directory = copy("openpi")
    words = ["<bos>", *map(str, range(SIZES["vocab_size"] - 1))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="0"))
    tokenizer.add_special_tokens(["<image>"])
    assert tokenizer.token_to_id("<image>") == SIZES["vocab_size"] == tokenizer.get_vocab_size() - 1
    tokenizer.save(str(directory / "tokenizer.json"))
    assert load_policy(directory).tokenizer.ids("7") == [0, 8, 1]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words[1:])}, unk_token="0"))
    tokenizer.add_special_tokens(["<image>", "<bos>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    with pytest.raises(ValueError, match="has 121 tokens, the policy embeds 120"):  # every prompt has <bos>
        load_policy(directory)


def test_a_run_finds_its_policy_from_everywhere(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = written / "pi0" / "openpi"
    stats = next(directory.rglob("norm_stats.json")).relative_to(written)
    monkeypatch.chdir(written)
    runs: list[Config] = []

    def run(checked: CheckedRun, *_: object) -> dict[str, str]:
        runs.append(checked.config)
        return {"exit_reason": "max_decisions"}

    monkeypatch.setattr("dsrl_async.launch.command.run", run)
    given = {"checkpoint": "pi0/openpi", "tokenizer": "pi0/openpi/tokenizer.json", "norm-stats": str(stats)}
    options = [word for name, path in given.items() for word in (f"--policy.{name}", path)]
    assert call("launch", "--run-dir", str(tmp_path / "run"), *options).code == 0
    monkeypatch.chdir(tmp_path)
    check_run(runs[0])


def stored_twice(second: Callable[[torch.Tensor], torch.Tensor], prefix: str) -> Callable[[Path], None]:
    """The embedding table under both of its names; the second is made from the first."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[prefix + TIED_EMBEDDING] = second(tensors[prefix + EMBEDDING])

    return rewrite_weights("model.safetensors", change)


@pytest.mark.parametrize(("layout", "prefix"), [("openpi", ""), ("lerobot", "model.")])
def test_of_two_embedding_tables_the_one_that_prompts_are_embedded_with_is_read(
    copy: Callable[..., Path], layout: str, prefix: str
) -> None:
    directory = copy(layout)
    stored_twice(lambda table: (table + 1).to(torch.float32), prefix)(directory)
    tensors = load_file(directory / "model.safetensors")
    expected = tensors[prefix + TIED_EMBEDDING]
    assert not torch.equal(tensors[prefix + EMBEDDING].float(), expected)
    assert torch.equal(load_model(directory).embedding.weight, expected)


def renamed(change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    return rewrite_weights("model.safetensors", apply)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"module.model.{name}",
        lambda name: name.replace("paligemma.model.", "paligemma._orig_mod.model."),
        lambda name: name.replace(".self_attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."),
    ],
)
def test_what_wraps_a_network_changes_nothing(copy: Callable[..., Path], change: Callable[[str], str]) -> None:
    directory = copy("openpi")
    expected = load_model(directory).state_dict()
    renamed(change)(directory)
    assert change(EMBEDDING) in load_file(directory / "model.safetensors") or "self_attn" not in EMBEDDING
    loaded = load_model(directory).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize(
    "name", ["._model.safetensors", "model (1).safetensors", ".DS_Store", "model.safetensors.part"]
)
@pytest.mark.parametrize("layout", ["openpi", "rlinf"])
def test_what_lies_beside_the_weights_is_not_read(copy: Callable[..., Path], layout: str, name: str) -> None:
    directory = copy(layout)
    (directory / name).write_bytes(b"\0\5\26\7")
    if layout == "rlinf":
        shutil.copy(directory / SHARD, directory / "copy.safetensors")
    load_policy(directory)


def test_links_into_a_cache_are_followed(copy: Callable[..., Path], tmp_path: Path) -> None:
    """The Hugging Face cache's snapshots hold links to ../../blobs."""
    directory = copy("openpi")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(directory.iterdir()):
        if path.is_file():
            path.rename(blobs / path.name)
            path.symlink_to(Path("..", "blobs", path.name))
    load_policy(directory)
    (blobs / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json cannot be read: No such file"):
        load_policy(directory)


@pytest.mark.parametrize("inner", ["pretrained_model", "checkpoints/last/pretrained_model", "snapshots/0af3"])
def test_the_directory_inside_is_named(written: Path, tmp_path: Path, inner: str) -> None:
    shutil.copytree(written / "pi0" / "lerobot", tmp_path / "run" / inner)
    with pytest.raises(ValueError, match=rf"run has no model\.safetensors: give the directory .*run/{inner}, which"):
        find_policy(tmp_path / "run")


def pipe(name: str) -> Callable[[Path], None]:
    def put(directory: Path) -> None:
        path = next(directory.rglob(name))
        path.unlink()
        os.mkfifo(path)

    return put


def device(name: str) -> Callable[[Path], None]:
    def put(directory: Path) -> None:
        path = next(directory.rglob(name))
        path.unlink()
        path.symlink_to("/dev/zero")

    return put


def set_index(value: str) -> Callable[[Path], None]:
    return rewrite_json(INDEX, lambda c: c["weight_map"].update(surprise=value))


FILES = ("model.safetensors", "config.json", "norm_stats.json", "tokenizer.json")


@pytest.mark.parametrize("put", [pipe, device])
@pytest.mark.parametrize("name", FILES)
def test_only_regular_files_are_read(
    copy: Callable[..., Path], put: Callable[[str], Callable[[Path], None]], name: str
) -> None:
    directory = copy("openpi")
    put(name)(directory)
    with pytest.raises(ValueError, match=rf"{name} cannot be read: it is not a regular file$"):
        find_policy(directory)


def test_of_several_norm_stats_liberos_are_taken(copy: Callable[..., Path]) -> None:
    directory = copy("openpi")
    file = next(directory.rglob("norm_stats.json"))
    other = directory / "assets" / "droid"
    other.mkdir()
    shutil.copy(file, other)
    load_policy(directory)
    file.rename(other.parent / "norm_stats.json")
    with pytest.raises(
        ValueError, match=r"should have one norm_stats\.json .* it has several, such as .*give policy\.norm"
    ):
        load_policy(directory)


def rewrite_weights(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / name)
        change(tensors)
        save_file(tensors, directory / name)

    return apply


def rewrite_json(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = next(directory.rglob(name))
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def write_json(name: str, content: object) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(json.dumps(content))


def truncate(directory: Path, missing: int = 1000) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-missing])


def leave_a_pickle(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model_state_dict").mkdir()
    (directory / "model_state_dict" / "full_weights.pt").write_bytes(b"")


def leave_orbax(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "params").mkdir()


MALFORMED_LEROBOT: list[tuple[Callable[[dict], object], str]] = [
    (lambda c: c.update(input_features=[1]), r"input_features is \[1\], it must be a JSON object$"),
    (lambda c: c.update(output_features="x"), r"output_features is 'x', it must be a JSON object$"),
    (lambda c: c.update(normalization_mapping="x"), r"normalization_mapping is 'x', it must be a JSON object$"),
    (lambda c: c["normalization_mapping"].update(STATE=[]), r"STATE is \[\], it must be text$"),
    (lambda c: c["output_features"].update(action=3), r"action is 3, it must be a JSON object$"),
    (lambda c: c["output_features"]["action"].update(shape=8), r"shape is 8, it must be a list$"),
    (lambda c: c["output_features"]["action"].update(shape=["a"]), r".*robot_action_dim is 'a'"),
    (lambda c: c.update(chunk_size=[]), r".*action_horizon is \[\]"),
]
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
STATE_BIAS = "state_proj.bias"


@pytest.mark.parametrize(
    ("layout", "damage", "message"),
    [
        (
            "openpi",
            rewrite_weights("model.safetensors", lambda t: t.pop(STATE_BIAS)),
            r"model\.safetensors lacks the tensor 'state_proj\.bias'$",
        ),
        (
            "lerobot",
            rewrite_weights("model.safetensors", lambda t: t.pop("model." + STATE_BIAS)),
            r"model\.safetensors lacks the tensor 'state_proj\.bias'$",
        ),
        (
            "openpi",
            rewrite_weights("model.safetensors", lambda t: t.pop("action_in_proj.weight")),
            r"lacks the tensor 'action_in_proj\.weight'$",
        ),
        (
            "openpi",
            rewrite_weights("model.safetensors", lambda t: t.update({STATE_BIAS: torch.zeros(3)})),
            r"model\.safetensors: tensor 'state_proj\.bias' has shape \[3\], the config expects \[32\]$",
        ),
        (
            "openpi",
            rewrite_weights("model.safetensors", lambda t: t.update({STATE_BIAS: torch.zeros(32, dtype=torch.int64)})),
            r"'state_proj\.bias' holds I64, not one of",
        ),
        (
            "rlinf",
            rewrite_weights(SHARD, lambda t: t.update({"surprise": torch.zeros(3)})),
            rf"{SHARD} has an unexpected tensor 'surprise'$",
        ),
        (
            "rlinf",
            rewrite_weights(SHARD, lambda t: t.pop(next(name for name in t if "layers.0." in name))),
            r"rlinf lacks the tensor",
        ),
        ("rlinf", lambda d: (d / SHARD).unlink(), rf"index\.json names the file {SHARD}, which is missing"),
        (
            "rlinf",
            lambda d: (shutil.copy(d / SHARD, d / "copy.safetensors"), (d / INDEX).unlink()),
            rf"is both in .*copy\.safetensors and in .*{SHARD}",
        ),
        ("openpi", truncate, r"model\.safetensors is not a valid safetensors file or is cut short"),
        (
            "openpi",
            leave_a_pickle,
            r"only model_state_dict/full_weights\.pt, and pickled weights are never loaded: .*docs/pi0\.md",
        ),
        ("openpi", leave_orbax, r"JAX checkpoint: convert it with openpi's examples/convert_jax_model_to_pytorch\.py"),
        (
            "openpi",
            rewrite_json("config.json", lambda c: c.update(action_dim=7)),
            r"config\.json: action_dim is 7, that of the tensors is 32",
        ),
        (
            "openpi",
            rewrite_json("config.json", lambda c: c.update(action_horizon="x")),
            r"config\.json: .*action_horizon is 'x'",
        ),
        (
            "lerobot",
            rewrite_json("config.json", lambda c: c.update(type="pi05")),
            r"config\.json is of a policy of type 'pi05', .* of 'pi0'",
        ),
        (
            "lerobot",
            rewrite_json("config.json", lambda c: c.update(use_relative_actions=True)),
            r"config\.json: use_relative_actions is True, supported is False$",
        ),
        (
            "lerobot",
            rewrite_json("config.json", lambda c: c["normalization_mapping"].update(ACTION="MIN_MAX")),
            "MEAN_STD for STATE and MIN_MAX for ACTION",
        ),
        (
            "lerobot",
            rewrite_weights(
                "policy_preprocessor_step_5_normalizer_processor.safetensors",
                lambda t: t.update({"observation.state.mean": torch.zeros(3)}),
            ),
            r"state\.mean has",
        ),
        (
            "openpi",
            rewrite_json("norm_stats.json", lambda c: c["norm_stats"]["actions"]["std"].pop()),
            r"norm_stats\.json: actions\.std has 6 entries, expected 7 to 32",
        ),
        (
            "openpi",
            rewrite_json("norm_stats.json", lambda c: c["norm_stats"]["state"].update(mean=None)),
            r"norm_stats\.json: state lacks 'mean'",
        ),
        (
            "openpi",
            rewrite_json("norm_stats.json", lambda c: c["norm_stats"]["state"]["std"].__setitem__(0, "a")),
            r"state\.std must be a list of finite numbers",
        ),
        ("openpi", lambda d: shutil.rmtree(d / "assets"), r"should have one norm_stats\.json .* it has none"),
        *(
            ("lerobot", rewrite_json("config.json", change), rf"config\.json: {message}")
            for change, message in MALFORMED_LEROBOT
        ),
        (
            "rlinf",
            rewrite_json("model.safetensors.index.json", lambda c: c.update(weight_map=[1])),
            r"index\.json: weight_map is \[1\], it must be a JSON object$",
        ),
        (
            "rlinf",
            rewrite_json("model.safetensors.index.json", lambda c: c["weight_map"].update(surprise=3)),
            r"index\.json must name safetensors files beside it, not '3'$",
        ),
        (
            "openpi",
            write_json("config.json", {"state_in_prompt": True}),
            r"config\.json lacks the fields pi05, cameras, image_size, ",
        ),
        ("openpi", large_tokenizer, r"tokenizer\.json has 201 tokens, the policy embeds 120"),
        ("openpi", stored_twice(lambda _: torch.zeros(3, 3), ""), r"embed_tokens\.weight' has shape \[3, 3\], '.*same"),
        (
            "openpi",
            rewrite_weights("model.safetensors", lambda t: t.update({"module." + STATE_BIAS: t[STATE_BIAS] + 1})),
            r"tensor 'state_proj\.bias' is both in .* and in .*keep",
        ),
        ("openpi", renamed(lambda n: f"ema_model.{n}"), r"remove the 'ema_model\.' in front of the names"),
        ("openpi", renamed(lambda n: f"transformer.h.{len(n)}.{n[-9:]}"), r"it is not of a Pi0"),
        (
            "lerobot",
            renamed(lambda n: n.replace("paligemma.model.vision_tower", "paligemma.vision_tower")),
            r"transformers before 4\.52",
        ),
        (
            "lerobot",
            rewrite_weights(
                "model.safetensors",
                lambda t: t.update({"normalize_inputs.buffer_observation_state.mean": torch.ones(8)}),
            ),
            r"LeRobot's Pi0 before its version 0\.4",
        ),
        (
            "openpi",
            rewrite_weights("model.safetensors", lambda t: t.update({"a.lora_A.weight": torch.ones(8)})),
            r"'a\.lora_A\.weight' is a LoRA adapter: merge it",
        ),
        ("lerobot", write_json("adapter_config.json", {}), r"adapter_config\.json is of a LoRA adapter: merge it"),
        (
            "rlinf",
            set_index("../model.safetensors"),
            r"must name safetensors files beside it, not '\.\./model",
        ),
        ("rlinf", set_index("/etc/passwd.safetensors"), r"not '/etc/passwd\.safetensors'$"),
        ("rlinf", set_index("a\0b.safetensors"), r"which is missing|beside it"),
        ("rlinf", write_json("b.safetensors.index.json", {}), r"has two indices of weights, b\.saf.* keep one$"),
        ("rlinf", write_json(INDEX, {"weight_map": {}}), r"index\.json names no files$"),
    ],
)
def test_damage_is_named_in_one_sentence_before_anything_starts(
    copy: Callable[..., Path], layout: str, damage: Callable[[Path], object], message: str
) -> None:
    directory = copy(layout)
    damage(directory)
    with pytest.raises(ValueError, match=message) as raised:
        check_run(validate({"policy": {"checkpoint": str(directory)}}))
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=message):
        load_policy(directory)


def test_a_file_that_shrinks_while_it_is_read_is_named(
    copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy("openpi")
    tensors = find_tensors(directory)
    truncate(directory, missing=(directory / "model.safetensors").stat().st_size // 2)
    monkeypatch.setattr("dsrl_async.pi0.checkpoint.find_tensors", lambda path: tensors)
    with pytest.raises(ValueError, match=r"model\.safetensors ended inside the tensor"):
        load_model(directory)


def test_prompts_that_hold_the_state_are_written_for_each_observation(
    written: Path, small_config: Config, memory: Arena
) -> None:
    """LeRobot's pi0.5, served in one batch of two different states."""
    directory = written / "pi05" / "lerobot"
    spec = environment_spec(small_config.env.model_dump())
    cpu = torch.device("cpu")
    policies = load_policies(small_config, spec, cpu, pi0_record(find_policy(directory)), Counters(memory))
    server = InferenceServer(small_config, memory, policies, lambda lanes: None, NoiseMode.BASE)
    policy, slots = load_policy(directory), server.slots
    slots.state[:] = np.random.default_rng(0).normal(size=slots.state.shape)
    for lane in (0, 1):
        slots.request(lane, incarnation=1, count=1)
    assert server.serve_ready(slots.ready()) == 2
    length = policies.prompt_lengths.max()
    states = policy.normaliser.state(torch.from_numpy(slots.state))[:, :8]
    tokens, mask = policy.tokenizer([spec.prompts[0]] * 2, states)
    assert mask[:, :length].sum() == mask.sum() > 2 * len(spec.prompts[0])
    steered = policies.steered_batches[2, length]
    assert isinstance(steered, SteeredPolicy)
    batch = steered.policy
    assert isinstance(batch, Pi0Batch)
    assert torch.equal(batch.tokens, tokens[:, :length])
    assert torch.equal(batch.token_mask, mask[:, :length])
    assert not torch.equal(tokens[0], tokens[1])


def test_checks_before_a_run_do_without_torch(written: Path) -> None:
    code = (
        "import sys; from dsrl_async.run.preflight import checked_run; from dsrl_async.config.load import validate; "
        "import dsrl_async.envs.images; "
        f"checked_run.check_run(validate({{'policy': {{'checkpoint': '{written / 'pi0' / 'lerobot'}'}}}})); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_loading_takes_no_second_copy(tmp_path: Path) -> None:
    """400 MB of float32 from 200 MB of bfloat16: the rise of the peak stays below 1.15 of what is kept."""
    config = writer.pi0_config(False, **{**SIZES, "vocab_size": 100_000, "vlm_width": 1024})
    writer.write_checkpoint(tmp_path, config, "openpi")
    command = [sys.executable, str(SCRIPTS / "studies" / "measure_load.py"), str(tmp_path), "--dtype", "float32"]
    line = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    result = json.loads(line)
    assert result["weights_bytes"] == 4 * parameter_count(config) > 400e6
    assert result["peak_rss_bytes"] - result["before_bytes"] <= 1.15 * result["weights_bytes"]
    assert not result["compiler"], "torch's compiler was imported, which takes a second and 100 MB"
