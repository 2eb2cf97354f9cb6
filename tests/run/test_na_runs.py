"""Runs with `sac.algorithm: na`, from the launch to the use of what they have learned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.commands import call
from support.launched import SMALL, Launched

import dsrl_async
from dsrl_async.run.checkpoints import find

NA = [*SMALL, "--sac.algorithm", "na", "--sac.batch-size", "4", "--sac.train-actor-steps", "0"]
OF_NOISE_CRITIC = ("train/sac/noise_critic_loss", "train/noise_critic/grad_norm")


def agent_of(run_dir: Path) -> Path:
    checkpoint = find(run_dir)
    assert checkpoint is not None
    return checkpoint / "agent.safetensors"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished asynchronous run."""
    directory = tmp_path_factory.mktemp("na") / "run"
    result = Launched(directory, *NA, "--max-decisions", "40").finish(120)
    assert result["exit_reason"] == "max_decisions"
    assert result["updates"] > 0
    return directory


def test_serial_runs_agree_bit_for_bit(tmp_path: Path) -> None:
    arguments = [*NA, "--serial", "--max-decisions", "26"]
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        result = call("launch", *arguments, "--seed", seed, "--run-dir", str(tmp_path / name)).result
        assert result["updates"] == 26 - 16
    weights = [agent_of(tmp_path / name).read_bytes() for name in ("a", "b", "c")]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_what_a_run_leaves(run_dir: Path) -> None:
    agent = load_file(agent_of(run_dir))
    assert {"critic.flat", "noise_critic.flat", "noise_critic.adam.exp_avg"} <= agent.keys()
    lane = load_file(agent_of(run_dir).parent / "replay" / "lane-0000.safetensors")
    assert lane["action"].shape == (len(lane["complete"]), 35)
    complete = lane["complete"]
    assert lane["action"][complete].any(axis=1).all()
    assert lane["policy_images"].any(axis=(1, 2, 3, 4)).all()
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert all(np.isfinite(last["metrics"][name]) for name in OF_NOISE_CRITIC)


def test_it_is_resumed_with_its_own_algorithm_only(run_dir: Path) -> None:
    refused = call("launch", "--resume", str(run_dir), "--sac.algorithm", "sac", "--max-decisions", "60")
    assert refused.code != 0
    assert "sac.algorithm: the resumed run was made with na, not sac; leave it so" in refused.stderr
    result = call("launch", "--resume", str(run_dir), "--serial", "--max-decisions", "44").result
    assert result["decisions"] == 44


def test_it_is_evaluated_and_loaded(run_dir: Path) -> None:
    result = call("evaluate", "--checkpoint", str(run_dir), "--episodes", "2", "--processes", "1").result
    assert result["episodes"] == 2
    agent = dsrl_async.load_agent(run_dir)
    observation = {"images": [np.zeros((64, 64, 3), np.uint8)] * 2, "state": np.zeros(8, np.float32)}
    assert agent.act({**observation, "prompt": agent.prompts[0]}).shape == (5, 7)
