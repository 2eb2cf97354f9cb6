"""The script that makes the embedded policy."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dsrl_async.pi0.checkpoint import load_policy
from dsrl_async.pi0.config import tabletop_config

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "scripts" / "pretrain_tabletop.py"
    spec = importlib.util.spec_from_file_location("pretrain_tabletop", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def demonstrations() -> dict[str, Tensor]:
    """Three episodes of 12, 5 and 20 frames; the action's first component is the frame's number."""
    generator = torch.Generator().manual_seed(0)
    frames = 37
    action = torch.zeros(frames, 7)
    action[:, 0] = torch.arange(frames)
    action[:, 6] = torch.where(torch.arange(frames) % 2 == 0, 1.0, -1.0)
    state = torch.randn(frames, 8, generator=generator)
    state[:, 3:6] = 0
    return {
        "images": torch.randint(256, (frames, 2, 64, 64, 3), dtype=torch.uint8, generator=generator),
        "state": state,
        "action": action,
        "block_position": torch.randn(frames, 3, generator=generator),
        "episode": torch.tensor([0] * 12 + [2] * 5 + [7] * 20, dtype=torch.int32),
        "goal": torch.zeros(frames, dtype=torch.int32),
    }


def test_chunks_stay_within_their_episode(script: ModuleType) -> None:
    data = demonstrations()
    chunks = script.action_chunks(data["action"], data["episode"], 10)
    assert chunks.shape == (37, 10, 7)
    assert chunks[1, :, 0].tolist() == list(range(1, 11))
    assert chunks[9, :, 0].tolist() == [9, 10, 11, 0, 0, 0, 0, 0, 0, 0]
    assert chunks[16, :, 0].tolist() == [16] + [0] * 9
    assert (chunks[16, :, 6] == data["action"][16, 6]).all()


def test_demonstrations_are_normalised(script: ModuleType, tmp_path: Path) -> None:
    data = demonstrations()
    save_file(data, tmp_path / "data.safetensors")
    kept, stats = script.read_demonstrations(tmp_path / "data.safetensors", tabletop_config())
    assert torch.equal(kept.images, data["images"])
    assert stats["state"]["mean"] == pytest.approx(data["state"].mean(0).tolist())
    assert stats["state"]["std"][3] == pytest.approx(1e-3), "a constant dimension gets the floor"
    raw = kept.chunks[0, :, 0] * stats["actions"]["std"][0] + stats["actions"]["mean"][0]
    assert raw.tolist() == pytest.approx(list(range(10)), abs=1e-3)


def test_the_script_writes_a_policy_that_loads(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(demonstrations(), tmp_path / "data.safetensors")
    options = {"--data": tmp_path / "data.safetensors", "--joint-steps": 3, "--expert-steps": 3, "--threads": 1}
    options |= {"--joint-batch": 4, "--expert-batch": 4, "--samples": 2}
    for name in ("one", "two"):
        arguments = [str(part) for pair in {**options, "--out": tmp_path / name}.items() for part in pair]
        monkeypatch.setattr(sys, "argv", ["pretrain_tabletop.py", *arguments])
        script.main()
    one, two = load_policy(tmp_path / "one"), load_policy(tmp_path / "two")
    assert one.config == tabletop_config()
    other = two.model.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.model.state_dict().items()), "not seeded"
