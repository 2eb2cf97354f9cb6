"""Checkpoints under RLinf's own names: the same network, and what is refused, by RLinf's name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.rlinf_names import to_rlinf
from torch import Tensor

from dsrl_async.pi0 import load_model, load_policy, synthetic
from dsrl_async.pi0.checkpoint import _read_tensor, export_tensors
from dsrl_async.pi0.files import find_policy
from dsrl_async.pi0.identity import identity
from dsrl_async.pi0.policy import Pi0Policy
from dsrl_async.pi0.tensors import read_header

SIZES: dict[str, Any] = {
    **{"image_size": 64, "patch_size": 16, "vision_depth": 1, "vision_mlp": 24, "vlm_width": 40, "vlm_mlp": 48},
    **{"expert_width": 32, "expert_mlp": 56, "depth": 2, "vocab_size": 120, "action_horizon": 8},
}
"""No two widths of a matrix are the same, so that one that is not transposed has another shape."""
NORM = "llm.layers.0.pre_attention_norms.1.scale"
GATING = "llm.layers.0.mlps.0.w_gating"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pi0` and `pi05`, each as `openpi` and as `rlinf`."""
    root = tmp_path_factory.mktemp("checkpoints")
    for pi05 in (False, True):
        config, kind = synthetic.pi0_config(pi05, **SIZES), "pi05" if pi05 else "pi0"
        openpi, rlinf = root / kind / "openpi", root / kind / "rlinf"
        synthetic.write_checkpoint(openpi, config, "openpi")
        rewrite(shutil.copytree(openpi, rlinf), to_rlinf)
        said = {**json.loads((openpi / "config.json").read_text()), "pi05": pi05, "pcd": False, "dtype": "bfloat16"}
        (rlinf / "config.json").write_text(json.dumps(said))
    return root


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file)
    return directory


def sampled(directory: Path) -> Tensor:
    """Actions of three random observations, in the robot's units."""
    policy = Pi0Policy(load_policy(directory), ["put the block on the plate", "no"], denoise_steps=3)
    batch = policy.batch(3, int(policy.prompt_lengths.max()))
    generator = torch.Generator().manual_seed(0)
    batch.images.random_(0, 256, generator=generator)
    for inputs in (batch.state, batch.noise):
        inputs.normal_(generator=generator)
    batch.fill_prompts(torch.tensor([0, 1, 0]).numpy())
    batch.encode()
    batch.denoise()
    return batch.actions.clone()


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_actions_are_those_of_openpis_file_bit_for_bit(written: Path, kind: str) -> None:
    of_openpi, of_rlinf = (sampled(written / kind / names) for names in ("openpi", "rlinf"))
    assert of_openpi.abs().max() > 0.1
    assert torch.equal(of_openpi, of_rlinf)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_what_is_read_from_rlinfs_file_is_openpis_again(written: Path, kind: str) -> None:
    before = load_file(written / kind / "openpi" / "model.safetensors")
    back = export_tensors(load_model(written / kind / "rlinf"))
    assert len(back) > 60
    assert all(torch.equal(before[name].float(), tensor) for name, tensor in back.items())


@pytest.mark.parametrize("staging", [4 * 5 * 7, 4 * 5 * 3, 4 * 5, 4 * 2])
def test_a_transposed_tensor_is_read_in_pieces(tmp_path: Path, staging: int) -> None:
    """All at once, several columns at a time, one, and a part of one."""
    matrix = torch.arange(35.0).view(5, 7)
    save_file({"before": torch.ones(3), "w": matrix.T.contiguous()}, tmp_path / "one.safetensors")
    stored = read_header(tmp_path / "one.safetensors")["w"]._replace(shape=(5, 7), transposed=True)
    target = torch.zeros(5, 7)
    _read_tensor(stored, target, torch.empty(staging, dtype=torch.uint8))
    assert torch.equal(target, matrix)


def test_wrapped_names_and_rlinfs_additions_are_understood(written: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(written / "pi0" / "rlinf", tmp_path / "wrapped"))
    expected = load_model(directory).state_dict()
    rewrite(directory, lambda tensors: {f"model._orig_mod.{name}": tensor for name, tensor in tensors.items()})
    rewrite(directory, lambda tensors: {**tensors, "value_head.mlp.0.weight": torch.zeros(2, 2)})
    loaded = load_model(directory).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.items())


def test_the_identity_is_of_the_weights_and_stays(written: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(written / "pi0" / "rlinf", tmp_path / "changed"))
    first = identity(find_policy(written / "pi0" / "rlinf"), ["put"])
    assert first == identity(find_policy(directory), ["put"])

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[GATING][1, 0, 0] += 1
        return tensors

    rewrite(directory, change)
    assert identity(find_policy(directory), ["put"])["weights"] != first["weights"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"paligemma_with_expert.paligemma.model.language_model.norm.weight": torch.zeros(40)},
            r"has the tensor 'img\.\S+', as RLinf names it, and .* has 'paligemma_with_expert\S+', as openpi names it",
        ),
        (
            lambda t: renamed(t, "llm.layers.1.attn.q_proj.1.weight", "llm.layers.1.self_attn.q_proj.1.weight"),
            r"has the tensor 'llm\.layers\.1\.self_attn\.q_proj\.1\.weight', which RLinf's Pi0 has not$",
        ),
        (lambda t: without(t, GATING), r"lacks the tensor 'llm\.layers\.0\.mlps\.0\.w_gating'$"),
        (
            lambda t: without(t, NORM),
            r"lacks the tensor 'llm\.layers\.0\.pre_attention_norms\.1\.scale': RLinf's openpi_pytorch_to_openpi_rlinf",
        ),
        (
            lambda t: t | {GATING: t[GATING].transpose(1, 2).contiguous()},
            r"w_gating'\) has shape \[40, 48\], the config expects",
        ),
        (
            lambda t: t | {GATING: t[GATING][:1].contiguous()},
            r"w_gating' has shape \[1, 40, 48\], which RLinf's has not$",
        ),
        (
            lambda t: t | {"img.encoder.layers.0.attn.in_proj_bias": torch.zeros(3455)},
            r"in_proj_bias' has shape \[3455\], which RLinf's has not$",
        ),
        (
            lambda t: t | {"llm.layers.900000000.attn.q_proj.0.weight": torch.zeros(2, 2)},
            r"which RLinf's Pi0 has not$",
        ),
        (lambda t: t | {"pointnet.proj.weight": torch.zeros(2)}, r"has an unexpected tensor 'pointnet\.proj\.weight'$"),
        (
            lambda t: t | {"llm.layers.0.mlps.1.w_gating_lora_a": torch.zeros(2)},
            r"w_gating_lora_a' is a LoRA adapter",
        ),
        (lambda t: {n: v for n, v in t.items() if n.startswith("img.")}, r"lacks the tensor 'llm\.embedder\."),
    ],
)
def test_what_is_not_rlinfs_is_refused_by_name(
    written: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    directory = Path(shutil.copytree(written / "pi0" / "rlinf", tmp_path / "changed"))
    with pytest.raises(ValueError, match=message) as raised:
        find_policy(rewrite(directory, change))
    assert str(directory / "model.safetensors") in str(raised.value)


def test_a_point_cloud_is_refused(written: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(written / "pi0" / "rlinf", tmp_path / "changed"))
    said = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**said, "pcd": True}))
    with pytest.raises(ValueError, match=r"config\.json: pcd is True, supported is False"):
        find_policy(directory)


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {other: tensor for other, tensor in tensors.items() if other != name}


def renamed(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return without(tensors, old) | {new: tensors[old]}
