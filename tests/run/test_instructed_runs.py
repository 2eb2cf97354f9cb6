"""Runs whose agent knows its task, from the environment to the use of what they have learned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from support.commands import call
from support.launched import SMALL, Launched
from support.user_environments import INSTALLED, found_in, write_policy

import dsrl_async
from dsrl_async.run.checkpoints import find, learned_prompts

WORDS = ("reach the green one", "reach the blue one")


class Trained(NamedTuple):
    run_dir: Path
    policy: Path


def options(policy: Path, kind: str, algorithm: str = "sac") -> list[str]:
    of_environment = ["--env.name", "reaching", "--policy.checkpoint", str(policy), "--sac.batch-size", "8"]
    return [*SMALL, *of_environment, "--sac.instruction", kind, "--sac.algorithm", algorithm]


def agent_of(run_dir: Path) -> Path:
    checkpoint = find(run_dir)
    assert checkpoint is not None
    return checkpoint / "agent.safetensors"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("told") / "policy"
    write_policy(directory, cameras=2, image_size=32, robot_state_dim=5, robot_action_dim=3, action_dim=6)
    with found_in(INSTALLED):
        yield directory


@pytest.fixture(scope="module")
def trained(policy: Path) -> Trained:
    """An asynchronous run, which is evaluated meanwhile."""
    run_dir = policy.parent / "run"
    evaluated = ["--evaluation.every-decisions", "30", "--evaluation.episodes", "2", "--evaluation.actors", "1"]
    result = Launched(run_dir, *options(policy, "task"), *evaluated, "--max-decisions", "60").finish()
    assert (result["returncode"], result["exit_reason"]) == (0, "max_decisions"), result["stderr"]
    assert result["updates"] > 20
    return Trained(run_dir, policy)


def test_rows_have_the_task_of_their_episode(trained: Trained) -> None:
    """What the environment says of it is in the state, too, see `reaching`."""
    lanes = [load_file(file) for file in sorted((agent_of(trained.run_dir).parent / "replay").iterdir())]
    tasks = np.concatenate([lane["task_index"] for lane in lanes])
    states = np.concatenate([lane["state"] for lane in lanes])
    assert set(tasks.tolist()) == {0, 1}
    assert np.array_equal(tasks, states[:, 3])
    assert learned_prompts(agent_of(trained.run_dir)) == WORDS
    sac = yaml.safe_load((trained.run_dir / "config.yaml").read_text())["sac"]
    assert (sac["instruction"], sac["instruction_dim"]) == ("task", 2)


def test_it_was_evaluated_meanwhile(trained: Trained) -> None:
    results = list((trained.run_dir / "evaluation").glob("*/result.json"))
    assert results
    best = agent_of(next((trained.run_dir / "best").iterdir()))
    assert learned_prompts(best) == WORDS


@pytest.mark.parametrize(("kind", "algorithm"), [("task", "na"), ("embedding", "sac")])
def test_serial_runs_go_on_with_what_they_know(policy: Path, tmp_path: Path, kind: str, algorithm: str) -> None:
    arguments = [*options(policy, kind, algorithm), "--serial"]
    ways = [("a", ["--max-decisions", "26"]), ("b", ["--max-decisions", "22"])]
    for name, limit in ways:
        assert call("launch", *arguments, *limit, "--run-dir", str(tmp_path / name)).result["updates"] > 0
    resumed = call("launch", "--resume", str(tmp_path / "b"), "--max-decisions", "26")
    assert resumed.result["decisions"] == 26
    checkpoints = [agent_of(tmp_path / name).parent for name, _ in ways]
    tasks = [load_file(checkpoint / "replay" / "lane-0000.safetensors")["task_index"] for checkpoint in checkpoints]
    assert np.array_equal(tasks[0][:8], tasks[1][:8])  # of the warm-up
    assert set(np.concatenate(tasks).tolist()) == {0, 1}
    learned = [learned_prompts(agent_of(tmp_path / name)) for name, _ in ways]
    assert learned == [WORDS, WORDS]


def test_another_kind_is_another_run(trained: Trained) -> None:
    for kind in ("none", "embedding"):
        done = call("launch", "--resume", str(trained.run_dir), "--sac.instruction", kind, "--max-decisions", "70")
        assert done.stderr == (
            f"error: sac.instruction: the resumed run was made with task, not {kind}; leave it so, or start a new run\n"
        )


def test_what_it_is_told_changes_what_it_does(trained: Trained) -> None:
    agent = dsrl_async.load_agent(trained.run_dir, device="cpu")
    observation = {
        "images": np.full((2, 2, 32, 32, 3), 100, np.uint8),
        "state": np.zeros((2, 5), np.float32),
        "prompt": list(WORDS),
    }
    agent.act(observation)
    (steered,) = agent._batches.values()
    assert steered.task_index.tolist() == [0, 1]
    noise = steered.noise.clone()
    assert not torch.equal(noise[0], noise[1])  # all but the prompts is the same for the agent
    agent.act({**observation, "prompt": [WORDS[1], WORDS[1]]})
    assert torch.allclose(steered.noise, noise[1:].expand(2, -1), atol=1e-6)


def test_it_is_evaluated_on_what_it_has_learned(trained: Trained) -> None:
    evaluated = call("evaluate", "--checkpoint", str(trained.run_dir), "--processes", "1", "--episodes", "2")
    assert evaluated.result["episodes"] == 2
    base = call("evaluate", "--checkpoint", str(trained.run_dir), "--processes", "1", "--episodes", "1", "--base")
    assert base.result["episodes"] == 1

    for kind in ("none", "embedding"):
        other = call("evaluate", "--checkpoint", str(trained.run_dir), "--episodes", "1", "--sac.instruction", kind)
        assert other.stderr == (f"error: sac.instruction: the agent was trained with task, not {kind}; leave it out\n")
    refused = "reach the red one"
    with pytest.raises(ValueError, match=f"trained with 2 instructions, and '{refused}' is none of them"):
        dsrl_async.load_agent(trained.run_dir, prompts=[refused], device="cpu")
