"""Policy checkpoints on disk, normalisation and prompts."""

from __future__ import annotations

import dataclasses
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.pi0_models import make_model, make_sampler, norm_stats, small_config
from tokenizers import Tokenizer, models, pre_tokenizers

from dsrl_async.pi0.checkpoint import EMBEDDED_POLICY, load_policy, save_policy
from dsrl_async.pi0.config import Pi0Config, tabletop_config
from dsrl_async.pi0.processing import Normaliser, PromptTokenizer, scale_images
from dsrl_async.pi0.sampler import sample_actions


def make_tokenizer(length: int = 12) -> PromptTokenizer:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", "put", "the", "block", "on", "red", "plate"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PromptTokenizer(tokenizer, length)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model, _ = make_model(small_config())
    save_policy(tmp_path / "policy", model, norm_stats(), make_tokenizer())
    return tmp_path / "policy"


def test_round_trip_is_exact(tmp_path: Path) -> None:
    for pi05 in (False, True):
        model, _ = make_model(small_config(pi05))
        save_policy(tmp_path, model, norm_stats(), make_tokenizer())
        policy = load_policy(tmp_path)
        assert policy.config == model.config
        loaded = policy.model.state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
        assert not any(parameter.requires_grad for parameter in policy.model.parameters())
        original, again = make_sampler(model, 2), make_sampler(policy.model, 2)
        original.run()
        again.run()
        assert torch.equal(original.actions, again.actions)


def rewrite_json(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        change(content)
        (directory / name).write_text(json.dumps(content))

    return apply


def rewrite_weights(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "model.safetensors").unlink(), r"policy has no model\.safetensors"),
        (
            lambda d: (d / "tokenizer.json").unlink(),
            r"policy has no tokenizer \(tokenizer\.json or .* RLinf/openpi_tokenizer",
        ),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"pickle"),
            "model.safetensors is not a valid safetensors",
        ),
        (lambda d: (d / "tokenizer.json").write_text("{}"), r"tokenizer\.json is not a tokenizer"),
        (lambda d: (d / "norm_stats.json").write_text("{"), r"norm_stats\.json is not JSON"),
        (lambda d: (d / "norm_stats.json").write_text("[]"), r"norm_stats\.json must hold"),
        (
            rewrite_weights(lambda t: t.pop("action_in_proj.bias")),
            r"model\.safetensors lacks the tensor 'action_in_proj\.bias'",
        ),
        (
            rewrite_weights(lambda t: t.update({"surprise": torch.zeros(1)})),
            r"model\.safetensors has an unexpected tensor 'surprise'$",
        ),
        (
            rewrite_weights(lambda t: t.update({"state_proj.bias": torch.zeros(3)})),
            r"tensor 'state_proj\.bias' has shape \[3\], the config expects \[48\]",
        ),
        (
            rewrite_json("norm_stats.json", lambda c: c["norm_stats"]["state"]["mean"].pop()),
            r"norm_stats\.json: state\.mean has 7 entries, expected 8",
        ),
        (
            rewrite_json("norm_stats.json", lambda c: c["norm_stats"]["actions"].pop("std")),
            r"norm_stats\.json: actions lacks 'std'",
        ),
        (
            rewrite_json("config.json", lambda c: c.update(colour=1)),
            r"config\.json has unknown fields: 'colour'",
        ),
        (rewrite_json("config.json", lambda c: c.update(depth=0)), r"config\.json: .*depth is 0"),
        (rewrite_json("config.json", lambda c: c.update(depth="3")), r"config\.json: .*depth is '3'"),
        (
            rewrite_json("config.json", lambda c: c.update(time_grid="fine")),
            r"config\.json: .*time_grid is 'fine'",
        ),
        (
            rewrite_json("config.json", lambda c: c.update(patch_size=15)),
            r"config\.json: .*multiple of patch_size",
        ),
    ],
)
def test_damage_is_named_in_one_sentence(checkpoint: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(checkpoint)
    with pytest.raises(ValueError, match=message) as raised:
        load_policy(checkpoint)
    assert "\n" not in str(raised.value)


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no directory or safetensors file .*nowhere"):
        load_policy(tmp_path / "nowhere")


def test_images_are_scaled_to_minus_one_one() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 1, 16, 16, 3)
    scaled = scale_images(images)
    assert scaled.shape == (1, 1, 3, 16, 16)
    assert scaled.min() == -1
    assert scaled.max() == 1
    assert scaled[0, 0, 1, 2, 3].item() == pytest.approx(images[0, 0, 2, 3, 1].item() / 255 * 2 - 1, abs=1e-6)


def test_z_score_and_quantile_normalisation() -> None:
    stats = norm_stats()
    state, actions = torch.randn(4, 8), torch.randn(4, 10, 7)
    mean, std, low, high = (torch.tensor(stats["state"][name]) for name in ("mean", "std", "q01", "q99"))
    expected = {
        "z_score": (state - mean) / (std + 1e-6),
        "quantile": (state - low) / (high - low + 1e-6) * 2 - 1,
    }
    for kind in ("z_score", "quantile"):
        normaliser = Normaliser(dataclasses.replace(small_config(), normalisation=kind), stats)
        normalised = normaliser.state(state)
        assert normalised.shape == (4, 32)
        assert not normalised[:, 8:].any()
        assert (normalised[:, :8] - expected[kind]).abs().max() < 1e-5
        back = normaliser.robot_actions(normaliser.actions(actions), state)
        assert (back - actions).abs().max() < 1e-5


def test_tiny_spreads_are_widened_as_openpi_does() -> None:
    stats = norm_stats()
    stats["state"]["std"] = [1e-6] * 8
    state = torch.tensor([stats["state"]["mean"]]) + 1e-3
    normalised = Normaliser(small_config(), stats).state(state)
    assert normalised[0, :8].tolist() == pytest.approx([500] * 8, rel=1e-3)


def test_lerobots_inverse_has_no_epsilon() -> None:
    stats = norm_stats()
    for key in ("state", "actions"):
        stats[key]["std"] = [1e-6] * 8
        stats[key]["q99"][0] = stats[key]["q01"][0]
    z_score = dataclasses.replace(small_config(), normalisation_epsilon="lerobot")
    quantile = dataclasses.replace(z_score, normalisation="quantile")
    mean = torch.tensor(stats["state"]["mean"])
    normalised = Normaliser(z_score, stats).state(mean + 1e-3)[:8]
    assert normalised.tolist() == pytest.approx([1e-3 / (1e-6 + 1e-8)] * 8, rel=1e-3)
    zero, one = torch.zeros(1, 1, 32), torch.ones(1, 1, 32)
    state = torch.zeros(1, 8)
    step = [Normaliser(c, stats).action_scale.double() for c in (z_score, quantile)]
    assert step[0].tolist() == pytest.approx([1e-6] * 7, rel=1e-6)
    assert step[1][0].item() == pytest.approx(0.5e-8, rel=1e-6)  # a spread of zero counts as 1e-8
    spread = torch.tensor(stats["actions"]["q99"]) - torch.tensor(stats["actions"]["q01"])
    moved = Normaliser(quantile, stats).robot_actions(one, state) - Normaliser(quantile, stats).robot_actions(
        zero, state
    )
    assert (moved[0, 0, 1:] - spread[1:] / 2).abs().max() < 1e-6


def test_state_is_written_into_the_prompt_of_other_pi05() -> None:
    characters = ["<bos>", *string.printable]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(characters)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    states = torch.tensor([[-1.5, -1.0, 0.0, 0.9999, 2.0], [0.5, -0.5, 0.1, -0.1, 0.0]])
    tokens, mask = PromptTokenizer(tokenizer, 60)(["put_it\n", " there"], states)
    texts = ["".join(characters[i] for i in row[valid]) for row, valid in zip(tokens, mask, strict=True)]
    assert texts == [
        "<bos>Task: put it, State: -1 0 128 255 255;\nAction: ",
        "<bos>Task: there, State: 192 64 140 115 128;\nAction: ",
    ]


def test_delta_actions_add_the_raw_state() -> None:
    config = dataclasses.replace(small_config(), delta_action_dims=6)
    plain, delta = Normaliser(small_config(), norm_stats()), Normaliser(config, norm_stats())
    state, actions = torch.randn(2, 8), torch.randn(2, 10, 32)
    added = delta.robot_actions(actions, state) - plain.robot_actions(actions, state)
    assert (added[..., :6] - state[:, None, :6]).abs().max() < 1e-5
    assert not added[..., 6].any()


def test_prompts_become_bos_text_newline() -> None:
    tokens, mask = make_tokenizer()(["put the block on the red plate", " put_the\nblock "])
    assert tokens.tolist() == [[2, 5, 6, 7, 8, 6, 9, 10, 4, 0, 0, 0], [2, 5, 6, 7, 4, 0, 0, 0, 0, 0, 0, 0]]
    assert mask.sum(1).tolist() == [9, 5]
    assert (tokens.dtype, mask.dtype) == (torch.int64, torch.bool)
    cut, mask = make_tokenizer(length=4)(["put the block on the red plate"])
    assert cut.tolist() == [[2, 5, 6, 7]]
    assert mask.all()


def test_impossible_sizes_are_refused() -> None:
    changes: tuple[dict[str, Any], ...]
    changes = ({"vision_heads": 5}, {"kv_heads": 3}, {"robot_action_dim": 33}, {"delta_action_dims": 8})
    for change in changes:
        with pytest.raises(ValueError, match="policy config"):
            dataclasses.replace(tabletop_config(), **change)


def test_embedded_policy_is_small_and_samples() -> None:
    policy = load_policy()
    assert policy.config == tabletop_config()
    assert isinstance(policy.config, Pi0Config)
    assert sum(file.stat().st_size for file in EMBEDDED_POLICY.iterdir()) < 4_000_000
    tokens, mask = policy.tokenizer(["put the block on the red plate"])
    assert "<unk>" not in policy.tokenizer.tokenizer.decode(tokens[0].tolist(), skip_special_tokens=False)
    state = torch.zeros(1, 8)
    images = torch.zeros(1, 2, 3, 64, 64)
    noise = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(0))
    normalised = sample_actions(policy.model, images, tokens, mask, policy.normaliser.state(state), noise)
    actions = policy.normaliser.robot_actions(normalised, state)
    assert actions.isfinite().all()
    assert actions[..., 3:6].abs().max() < 0.01  # the arm does not turn
