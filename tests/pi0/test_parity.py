"""The policy against what openpi's own PyTorch model, and LeRobot's, computed.

`tests/pi0/goldens/*.safetensors` hold their actions; `scripts/references/write_goldens.py` made them, in
environments of their own. Weights and inputs come from the same seeded generator here and there. With `-s` every
comparison prints its figures.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsrl_async.bench import synthetic
from dsrl_async.bench.systems.policy import seeded_policy
from dsrl_async.pi0 import load_model, sample_actions
from dsrl_async.pi0.config import Pi0Config
from dsrl_async.pi0.model import Pi0
from dsrl_async.pi0.packed import can_pack, is_packed, pack_weights
from dsrl_async.pi0.tensors import model_tensors

GOLDENS = Path(__file__).parent / "goldens"
TIME_GRIDS: dict[str, Literal["accumulated", "exact"]] = {"openpi": "accumulated", "lerobot": "exact"}
FLOAT32_TOLERANCE = 1e-5
BFLOAT16_FACTOR = 1.5
"""How much farther from the float32 truth than the reference's own bfloat16 the policy's may be (RMS)."""


class Case(NamedTuple):
    """A golden: its file, and what the name of its tensor says."""

    reference: str
    size: str
    model: str
    batch: int
    steps: int

    def key(self, dtype: str) -> str:
        return f"{self.size}/{self.model}/batch{self.batch}/steps{self.steps}/{dtype}"


def golden_cases() -> list[Case]:
    """All of them, in an order in which consecutive ones share a policy."""
    cases = []
    for file in sorted(GOLDENS.glob("*.safetensors"), reverse=True):
        with safe_open(file, "pt") as stored:
            for key in sorted(stored.keys()):
                size, model, batch, steps, dtype = key.split("/")
                if dtype == "float32":
                    batch, steps = batch.removeprefix("batch"), steps.removeprefix("steps")
                    cases.append(Case(file.stem, size, model, int(batch), int(steps)))
    return sorted(cases, key=lambda case: (case.size, case.model, case.reference))


CASES = golden_cases()


def parameters(dtype: str) -> list[Any]:
    """The cases for `pytest.mark.parametrize`; real widths take longer."""
    return [
        pytest.param(
            case,
            id=f"{case.reference}-{case.key(dtype)}",
            marks=[pytest.mark.slow] if case.size == "two_layers" else [],
        )
        for case in CASES
    ]


@functools.cache
def golden(reference: str) -> dict[str, Tensor]:
    return load_file(GOLDENS / f"{reference}.safetensors")


def config_of(case: Case) -> Pi0Config:
    """LeRobot's conventions are an exact time grid, and a vision tower in float32 whatever the rest is in."""
    return Pi0Config(
        **synthetic.sizes(case.model, case.size),
        time_grid=TIME_GRIDS[case.reference],
        vision_float32=case.reference == "lerobot",
    )


@functools.lru_cache(maxsize=1)
def policy_of(config: Pi0Config, dtype: torch.dtype, packed: bool = False) -> Pi0:
    policy = seeded_policy(config, dtype, seed=0)
    if packed:
        if not can_pack(policy):
            pytest.skip("this CPU does not multiply bfloat16")
        pack_weights(policy)
    return policy


def inputs_of(case: Case) -> dict[str, Tensor]:
    sizes = synthetic.sizes(case.model, case.size)
    arrays = synthetic.observation(sizes, synthetic.prompt_lengths(sizes, case.batch), seed=0)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def relative_rms(error: Tensor, truth: Tensor) -> float:
    return (error.square().mean() / truth.square().mean()).sqrt().item()


def test_there_are_goldens_of_every_kind() -> None:
    for reference, batches, steps in (("openpi", {1, 3}, {4, 10}), ("lerobot", {1, 3}, {4, 10})):
        mine = [case for case in CASES if case.reference == reference]
        for size in ("toy", "two_layers"):
            assert {case.model for case in mine if case.size == size} == {"pi0", "pi05"}
        assert {case.batch for case in mine} == batches
        assert {case.steps for case in mine} == steps


@pytest.mark.parametrize("case", parameters("float32"))
def test_float32_equals_the_reference(case: Case) -> None:
    expected = golden(case.reference)[case.key("float32")]
    actions = sample_actions(policy_of(config_of(case), torch.float32), **inputs_of(case), denoise_steps=case.steps)
    difference = (actions - expected).abs().max().item()
    print(f"\n{case.reference} {case.key('float32')}: max abs difference {difference:.1e}", end="")
    assert expected.abs().max() > 2, "the reference's actions are trivial"
    assert difference <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("case", parameters("bfloat16"))
@pytest.mark.parametrize("packed", [False, True])
def test_bfloat16_is_as_close_to_float32_as_the_references(case: Case, packed: bool) -> None:
    """Also `packed`, as a run on a CPU computes it."""
    truth = golden(case.reference)[case.key("float32")]
    theirs = relative_rms(golden(case.reference)[case.key("bfloat16")] - truth, truth)
    policy = policy_of(config_of(case), torch.bfloat16, packed)
    assert is_packed(policy) == packed
    actions = sample_actions(policy, **inputs_of(case), denoise_steps=case.steps)
    ours = relative_rms(actions - truth, truth)
    print(f"\n{case.reference} {case.key('bfloat16')}: relative RMS error {ours:.1e}, theirs {theirs:.1e}", end="")
    assert 1e-4 < theirs < 0.03
    assert 1e-4 < ours <= BFLOAT16_FACTOR * theirs


# --- what these comparisons would not let pass -------------------------------------------------------------

PLANTED = {model: Case("openpi", "toy", model, batch=1, steps=10) for model in ("pi0", "pi05")}

Weights = dict[str, Tensor]
"""A policy's tensors under openpi's names, to be damaged in place in the way in which a mistake in the code would."""


def save_weights(path: Path, case: Case, damage: Callable[[Weights], None]) -> Path:
    weights = {
        part.name: torch.from_numpy(synthetic.weight(part.name, part.shape, 0))
        for parts in model_tensors(config_of(case)).values()
        for part in parts
    }
    damage(weights)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path / "model.safetensors")
    return path / "model.safetensors"


def difference_from_golden(case: Case, model: Pi0, inputs: dict[str, Tensor]) -> float:
    actions = sample_actions(model, **inputs, denoise_steps=case.steps)
    return (actions - golden(case.reference)[case.key("float32")]).abs().max().item()


TOY = synthetic.SIZES["toy"]
FIRST_ROTATED = r"(language_model|gemma_expert\.model)\.layers\.0\.self_attn\.[qk]_proj"


def each(weights: Weights, pattern: str) -> list[str]:
    found = [name for name in weights if re.search(pattern, name)]
    assert found, f"no tensor's name has '{pattern}' in it"
    return found


def rotate_backwards(weights: Weights) -> None:
    for name in each(weights, FIRST_ROTATED):
        halves = weights[name].unflatten(0, (-1, 2, TOY["head_dim"] // 2))
        weights[name] = halves.flip(1).reshape(weights[name].shape)


def pair_neighbouring_channels(weights: Weights) -> None:
    for name in each(weights, FIRST_ROTATED):
        pairs = weights[name].unflatten(0, (-1, TOY["head_dim"] // 2, 2))
        weights[name] = pairs.transpose(1, 2).reshape(weights[name].shape)


def language_without_sqrt_width(weights: Weights) -> None:
    weights[synthetic.EMBEDDING] /= TOY["vlm_width"] ** 0.5


def images_divided_by_sqrt_width(weights: Weights) -> None:
    for name in each(weights, "multi_modal_projector"):
        weights[name] /= TOY["vlm_width"] ** 0.5


def norm_weight_without_the_one(weights: Weights) -> None:
    for name in each(weights, r"layers\.3\.input_layernorm\.weight"):
        weights[name] -= 1


def final_norm_unscaled(weights: Weights) -> None:
    for name in each(weights, r"gemma_expert\.model\.norm\.weight"):
        weights[name].zero_()


def gate_and_up_swapped(weights: Weights) -> None:
    for name in each(weights, r"layers\.5\.mlp\.gate_proj"):
        up = name.replace("gate", "up")
        weights[name], weights[up] = weights[up], weights[name]


def time_before_action(weights: Weights) -> None:
    weights["action_time_mlp_in.weight"] = weights["action_time_mlp_in.weight"].roll(TOY["expert_width"], 1)


def cosine_before_sine(weights: Weights) -> None:
    weights["time_mlp_in.weight"] = weights["time_mlp_in.weight"].roll(TOY["expert_width"] // 2, 1)


def shift_before_scale(weights: Weights) -> None:
    for name in each(weights, r"post_attention_layernorm\.dense"):
        scale, shift, gate = weights[name].chunk(3)
        weights[name] = torch.cat([shift, scale, gate])


def gate_left_out(weights: Weights) -> None:
    for name in each(weights, r"layers\.2\.input_layernorm\.dense"):
        weights[name].chunk(3)[2].fill_(1.0 if name.endswith("bias") else 0.0)


def vision_bias_left_out(weights: Weights) -> None:
    for name in each(weights, r"encoder\.layers\.26\.self_attn\.q_proj\.bias"):
        weights[name].zero_()


def vision_norm_unscaled(weights: Weights) -> None:
    for name in each(weights, r"post_layernorm\.weight"):
        weights[name].fill_(1.0)


def position_table_left_out(weights: Weights) -> None:
    for name in each(weights, "position_embedding"):
        weights[name].zero_()


@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_weights_from_a_file_give_the_same(model: str, tmp_path: Path) -> None:
    case = PLANTED[model]
    loaded = load_model(save_weights(tmp_path, case, lambda weights: None), config_of(case))
    assert difference_from_golden(case, loaded, inputs_of(case)) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    ("model", "mistake"),
    [
        ("pi0", rotate_backwards),
        ("pi0", pair_neighbouring_channels),
        ("pi0", language_without_sqrt_width),
        ("pi0", images_divided_by_sqrt_width),
        ("pi0", norm_weight_without_the_one),
        ("pi0", final_norm_unscaled),
        ("pi0", gate_and_up_swapped),
        ("pi0", time_before_action),
        ("pi0", vision_bias_left_out),
        ("pi0", vision_norm_unscaled),
        ("pi0", position_table_left_out),
        ("pi05", rotate_backwards),
        ("pi05", cosine_before_sine),
        ("pi05", shift_before_scale),
        ("pi05", gate_left_out),
    ],
)
def test_a_mistake_in_a_component_is_found(model: str, mistake: Callable[[Weights], None], tmp_path: Path) -> None:
    case = PLANTED[model]
    wrong = load_model(save_weights(tmp_path, case, mistake), config_of(case))
    assert difference_from_golden(case, wrong, inputs_of(case)) > 5 * FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    "mistake",
    [
        lambda inputs: inputs["state"].zero_(),
        lambda inputs: inputs["images"].copy_(inputs["images"].flip(1)),
        lambda inputs: inputs["token_mask"].fill_(True),
        lambda inputs: inputs["token_mask"][:, 16:].fill_(False),
    ],
    ids=["state dropped", "cameras swapped", "empty slots seen", "last token dropped"],
)
def test_a_mistake_in_an_input_is_found(mistake: Callable[[dict[str, Tensor]], Tensor]) -> None:
    case = PLANTED["pi0"]
    inputs = inputs_of(case)
    mistake(inputs)
    policy = policy_of(config_of(case), torch.float32)
    assert difference_from_golden(case, policy, inputs) > 5 * FLOAT32_TOLERANCE


@pytest.mark.parametrize("model", ["pi0", "pi05"])
def test_the_other_time_grid_is_found(model: str) -> None:
    case = PLANTED[model]
    wrong = seeded_policy(Pi0Config(**synthetic.sizes(model, "toy"), time_grid="exact"), torch.float32, 0)
    assert difference_from_golden(case, wrong, inputs_of(case)) > FLOAT32_TOLERANCE


def test_the_exact_gelu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case, gelu = PLANTED["pi0"], torch.nn.functional.gelu
    policy = policy_of(config_of(case), torch.float32)
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x, approximate: gelu(x))
    assert difference_from_golden(case, policy, inputs_of(case)) > 5 * FLOAT32_TOLERANCE
