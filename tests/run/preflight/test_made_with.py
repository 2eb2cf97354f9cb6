"""A run is resumed with the policy that it was made with, wherever that lies now, and with no other."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsrl_async.config.load import validate
from dsrl_async.config.settings import ConfigError
from dsrl_async.pi0.config import EMBEDDED_POLICY
from dsrl_async.pi0.identity import SAMPLE_BYTES, SAMPLES
from dsrl_async.run import preflight


def found(directory: Path, **policy: Any) -> dict[str, Any]:
    return preflight.made_with(preflight.check_run(validate({"policy": {"checkpoint": str(directory), **policy}})))


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED_POLICY, tmp_path / "policy"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that was made with the embedded policy."""
    (tmp_path / "run").mkdir()
    preflight.record_made_with(tmp_path / "run", preflight.made_with(preflight.check_run(validate({}))))
    return tmp_path / "run"


def check(run_dir: Path, policy: Path, **settings: Any) -> list[str]:
    return preflight.check_made_with(run_dir, found(policy, **settings), policy)


def change_tensor(name: str, change: Callable[[np.ndarray], None]) -> Callable[[Path], None]:
    def edit(policy: Path) -> None:
        tensors = load_file(policy / "model.safetensors")
        change(tensors[name])
        save_file(tensors, policy / "model.safetensors")

    return edit


def change_stats(policy: Path) -> None:
    stats = json.loads((policy / "norm_stats.json").read_text())
    stats["norm_stats"]["actions"]["std"][3] *= 1.0001
    (policy / "norm_stats.json").write_text(json.dumps(stats))


def change_tokenizer(policy: Path) -> None:
    """Two words of the prompt change places."""
    content = json.loads((policy / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["red"], words["put"] = words["put"], words["red"]
    (policy / "tokenizer.json").write_text(json.dumps(content))


LARGE = "paligemma_with_expert.paligemma.model.language_model.layers.1.mlp.gate_proj.weight"
"""A tensor of which only samples are read."""


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (
            change_tensor("action_out_proj.bias", lambda x: np.put(x, 31, 0.5)),
            r"weights \(sha256 \w{12} then, \w{12} now\)",
        ),
        (change_tensor(LARGE, lambda x: np.add(x, 1e-4, out=x)), "weights"),
        (change_tensor(LARGE, lambda x: np.put(x, 0, 9.0)), "weights"),
        (change_tensor(LARGE, lambda x: np.put(x, x.size - 1, 9.0)), "weights"),
        (change_stats, "norm stats"),
        (change_tokenizer, "tokenizer"),
    ],
    ids=["last bias", "fine-tuned layer", "first weight", "last weight", "norm stats", "tokenizer"],
)
def test_another_policy_is_refused(run_dir: Path, policy: Path, edit: Callable[[Path], None], what: str) -> None:
    edit(policy)
    with pytest.raises(
        ConfigError, match=rf"^policy\.checkpoint: {policy} is not the policy .* differs in {what}"
    ) as caught:
        check(run_dir, policy)
    assert "start a new run" in str(caught.value)


def test_settings_that_change_the_policy_are_refused_by_name_and_value(run_dir: Path, policy: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"differs in action_horizon \(10 then, 7 now\), delta_action_dims \(0 then, 3 now\);"
    ):
        check(run_dir, policy, action_horizon=7, delta_action_dims=3)
    assert check(run_dir, policy, action_horizon=10) == []  # written out, it is the same


def test_the_same_policy_is_taken_wherever_it_lies_and_however_it_is_cut(run_dir: Path, policy: Path) -> None:
    assert load_file(policy / "model.safetensors")[LARGE].nbytes > SAMPLES * SAMPLE_BYTES
    assert check(run_dir, policy) == []
    tensors = load_file(policy / "model.safetensors")
    names = sorted(tensors)
    (policy / "model.safetensors").unlink()
    for part, cut in enumerate((names[:20], names[20:])):
        save_file({name: tensors[name] for name in cut}, policy / f"part-{part}.safetensors", {"made": "elsewhere"})
    stats = json.loads((policy / "norm_stats.json").read_text())
    (policy / "norm_stats.json").write_text(json.dumps(stats, separators=(",", ":")))
    assert check(run_dir, policy) == []


def test_other_versions_of_the_simulator_are_announced(run_dir: Path) -> None:
    saved = json.loads((run_dir / "made_with.json").read_text())
    (run_dir / "made_with.json").write_text(
        json.dumps({**saved, "packages": {"mujoco": "3.3.0", "robosuite": "1.4.0"}})
    )
    now = found(EMBEDDED_POLICY)["packages"]["mujoco"]
    assert check(run_dir, EMBEDDED_POLICY) == [f"mujoco 3.3.0 -> {now}", "robosuite 1.4.0 -> none"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"policy": 3}', '{"policy": {"config": []}, "packages": {}}', '{"policy": {}, "packages": 1}'],
)
def test_a_damaged_record_is_refused_in_one_sentence(run_dir: Path, content: str) -> None:
    (run_dir / "made_with.json").write_text(content)
    with pytest.raises(ConfigError, match=r"made_with\.json .*; restore it, or remove it") as caught:
        check(run_dir, EMBEDDED_POLICY)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_record_is_resumed_and_that_is_said(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run_dir / "made_with.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert check(run_dir, EMBEDDED_POLICY) == []
    assert "was not recorded; it goes on with" in caplog.text
