"""`dsrl_async.load_agent`: what a run has learned, action by action as its evaluation has it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from numpy.typing import NDArray
from support.commands import call
from support.launched import FinishedRun

import dsrl_async
from dsrl_async.agent import Agent, Mode, with_kernels_that_run
from dsrl_async.config.load import validate
from dsrl_async.envs import make_environment
from dsrl_async.envs.images import resize_with_pad
from dsrl_async.envs.tabletop import TabletopEnvironment
from dsrl_async.run.worker.worker import EVALUATION, episode_seed
from dsrl_async.shm.slots import Slots

SEED, EPISODES, STEPS = 5, 2, 15
PROMPT = "put the block on the red plate"
NOISES: dict[Mode, list[str]] = {
    "deterministic": ["--noise", "deterministic"],
    "stochastic": ["--noise", "stochastic"],
    "base": ["--base"],
}
Chunks = list[NDArray[np.float32]]


@pytest.fixture(scope="module")
def agent(finished_run: FinishedRun) -> Agent:
    return dsrl_async.load_agent(finished_run.run_dir, device="cpu")


def test_a_run_with_tritons_kernels_is_loaded_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = validate({"policy": {"kernels": "triton", "denoise_steps": 7}, "device": "cpu"})
    kept = with_kernels_that_run(config).policy
    assert kept == config.policy.model_copy(update={"kernels": "torch"})
    monkeypatch.setattr("dsrl_async.run.preflight.check_kernels", lambda config: None)
    assert with_kernels_that_run(config) is config


def evaluated(run_dir: Path, noise: list[str], episodes: int = EPISODES) -> Chunks:
    """The action chunks of an evaluation by one worker, in order."""
    chunks: Chunks = []
    answer = Slots.answer

    def record(slots: Slots, lanes: Any, numbers: Any, action_chunk: Any, *more: Any) -> Any:
        chunks.extend(np.array(action_chunk))
        return answer(slots, lanes, numbers, action_chunk, *more)

    limits = ["--episodes", str(episodes), "--seed", str(SEED), "--env.max-episode-steps", str(STEPS)]
    with patch.object(Slots, "answer", record):
        done = call("evaluate", "--checkpoint", str(run_dir), "--processes", "1", *limits, *noise)
    assert done.result["episodes"] == episodes
    return chunks


def played(agent: Agent, mode: Mode) -> Chunks:
    """The chunks of the same episodes, with the environment stepped here."""
    env, chunks = TabletopEnvironment(max_episode_steps=STEPS), []
    images, state = np.zeros((2, 64, 64, 3), np.uint8), np.zeros(8, np.float32)
    for episode in range(EPISODES):
        seed = episode_seed(SEED, EVALUATION, 0, episode)
        generator = np.random.default_rng(seed)
        env.reset(seed, episode)
        ended = False
        while not ended:
            env.observe(images, np.zeros((64, 64, 3), np.uint8), state)
            observation = {"images": images, "state": state, "prompt": PROMPT}
            chunks.append(agent.act(observation, mode=mode, generator=generator, steps=agent.horizon))
            outcome = env.step_chunk(chunks[-1][: agent.chunk])
            ended = outcome.terminated or outcome.truncated
    env.close()
    return chunks


@pytest.mark.parametrize("mode", NOISES)
def test_it_acts_as_its_evaluation_bit_for_bit(finished_run: FinishedRun, agent: Agent, mode: Mode) -> None:
    of_evaluation, of_agent = evaluated(finished_run.run_dir, NOISES[mode]), played(agent, mode)
    assert len(of_agent) == EPISODES * STEPS // agent.chunk
    assert np.array_equal(np.stack(of_agent), np.stack(of_evaluation))
    assert np.ptp(np.stack(of_agent), axis=0).max() > 0.01


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.skipif(find_spec("libero") is None or find_spec("robosuite") is None, reason="pip install -e '.[libero]'")
def test_in_libero_it_acts_as_its_evaluation_bit_for_bit(tmp_path: Path) -> None:
    """It is given what LIBERO renders, of which both the policy's pictures and the agent's are made."""
    from dsrl_async.envs.libero import LiberoEnvironment

    limits = ["--serial", "--actors", "1", "--max-decisions", "3", "--replay.warmup-decisions", "1"]
    given = ["--config", "libero_spatial_small", "--env.task-ids", "[2]", "--sac.batch-size", "1", *limits]
    done = call("launch", *given, "--run-dir", str(tmp_path / "run"), "--log.console", "off")
    if "render" in done.stderr and done.code:
        pytest.skip(done.stderr)
    assert done.code == 0, done.stderr
    scene = ["--tasks", "2", "--init-states", "0", "--noise", "deterministic"]
    of_evaluation = evaluated(tmp_path / "run", scene, episodes=1)
    agent = dsrl_async.load_agent(tmp_path / "run", device="cpu")
    changes: dict[str, Any] = {"max_episode_steps": STEPS, "task_ids": None, "scene_order": "cycled"}
    env = make_environment(agent.config.env.model_copy(update=changes).model_dump())
    assert isinstance(env, LiberoEnvironment)
    env.number_scenes()
    state, size, of_agent, ended = np.zeros(8, np.float32), agent.spec.image_size, [], False
    number = 2 * 50
    env.reset(episode_seed(SEED, EVALUATION, 0, number), number)
    while not ended:
        env.observe(np.zeros((2, size, size, 3), np.uint8), np.zeros((64, 64, 3), np.uint8), state)
        rendered = [np.array(env._frame(camera)) for camera in (0, 1)]
        assert rendered[0].shape[0] > size
        of_agent.append(agent.act({"images": rendered, "state": state}, steps=agent.horizon))
        outcome = env.step_chunk(of_agent[-1][: agent.chunk])
        ended = outcome.terminated or outcome.truncated
    env.close()
    assert np.array_equal(np.stack(of_agent), np.stack(of_evaluation))


def observations(count: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, 2, 64, 64, 3), np.uint8)
    return {"images": images, "state": random.normal(size=(count, 8)).astype(np.float32), "prompt": [PROMPT] * count}


def row(batch: dict[str, Any], index: int) -> dict[str, Any]:
    return {key: value[index] for key, value in batch.items()}


@pytest.mark.parametrize("mode", NOISES)
def test_a_batch_has_the_rows_of_single_observations(agent: Agent, mode: Mode) -> None:
    batch = observations(3)
    together = agent.act(batch, mode=mode, generator=[np.random.default_rng(seed) for seed in range(3)])
    assert (together.shape, together.dtype) == ((3, agent.chunk, 7), np.float32)
    for index in range(3):
        alone = agent.act(row(batch, index), mode=mode, generator=np.random.default_rng(index))
        assert alone.shape == (agent.chunk, 7)
        assert np.abs(alone - together[index]).max() < 1e-5


def test_one_generator_is_drawn_row_after_row_and_the_agents_own_is_seeded(finished_run: FinishedRun) -> None:
    one, two = (dsrl_async.load_agent(finished_run.run_dir, device="cpu", mode="stochastic", seed=7) for _ in range(2))
    batch = observations(2)
    generator = np.random.default_rng(7)
    assert np.array_equal(one.act(batch), two.act(batch, generator=generator))
    assert not np.array_equal(one.act(batch), two.act(batch, generator=np.random.default_rng(8)))


def test_pictures_of_any_size_become_what_the_environment_makes_of_them(agent: Agent) -> None:
    large = np.random.default_rng(1).integers(0, 256, (2, 96, 128, 3), np.uint8)
    small = np.stack([resize_with_pad(picture, 64) for picture in large])
    state = np.zeros(8)
    expected = agent.act({"images": small, "state": state, "agent_image": resize_with_pad(large[0], 64)})
    assert np.array_equal(agent.act({"images": list(large), "state": state}), expected)
    other = agent.act({"images": small, "state": state, "agent_image": np.zeros((64, 64, 3), np.uint8)})
    assert not np.array_equal(other, expected)


def test_a_checkpoint_and_the_best_one_are_loaded(finished_run: FinishedRun, agent: Agent, tmp_path: Path) -> None:
    of_checkpoint = dsrl_async.load_agent(str(agent.checkpoint), device="cpu")
    assert np.array_equal(agent.act(observations(1)), of_checkpoint.act(observations(1)))
    with pytest.raises(ValueError, match=r"there is no best checkpoint in it"):
        dsrl_async.load_agent(finished_run.run_dir, best=True)
    run = Path(shutil.copytree(finished_run.run_dir, tmp_path / "run"))
    best = Path(shutil.copytree(agent.checkpoint, run / "best" / agent.checkpoint.name))
    state = json.loads((best / "state.json").read_text())
    del state["sha256"], state["files"]
    state["evaluation"] = {"success_rate": 0.5, "return": -3.0, "decisions": 10}
    (best / "state.json").write_text(json.dumps(state))
    assert dsrl_async.load_agent(run, best=True, device="cpu").checkpoint == best


def test_other_prompts_are_said_when_it_is_loaded(finished_run: FinishedRun) -> None:
    other = "put the block on the blue plate"
    agent = dsrl_async.load_agent(finished_run.run_dir, prompts=[other], device="cpu")
    assert agent.prompts == (PROMPT, other)
    batch = observations(2) | {"prompt": [PROMPT, other]}
    actions = agent.act(batch)
    assert np.abs(actions[1] - agent.act(row(batch, 1))).max() < 1e-5
    assert not np.array_equal(agent.act(row(batch, 1)), agent.act(row(batch, 1) | {"prompt": PROMPT}))
    with pytest.raises(ValueError, match=r"prompt is missing; this agent has 2"):
        agent.act({key: value for key, value in row(batch, 0).items() if key != "prompt"})


@pytest.fixture
def without_environment(finished_run: FinishedRun, tmp_path: Path) -> Path:
    """A run of an environment that is not installed here."""
    run = Path(shutil.copytree(finished_run.run_dir, tmp_path / "run"))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("name: tabletop", "name: absent_robot.module:make"))
    return run


def test_an_environment_that_is_not_here_needs_the_prompts(without_environment: Path, agent: Agent) -> None:
    with pytest.raises(ValueError, match=r"env\.name: .*absent_robot.*; or give load_agent `prompts`"):
        dsrl_async.load_agent(without_environment)
    abroad = dsrl_async.load_agent(without_environment, prompts=[PROMPT], device="cpu")
    assert np.array_equal(abroad.act(observations(1)), agent.act(observations(1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, r"images must hold the pictures of 2 cameras, not None"),
        (
            {"images": np.zeros((3, 64, 64, 3), np.uint8)},
            r"images must hold .* 2 cameras, not uint8 \[3, ",
        ),
        (
            {"images": np.zeros((2, 64, 64, 3))},
            r"must be uint8 .*, not float64 .*; pixels are whole numbers",
        ),
        (
            {"images": np.zeros((2, 64, 64), np.uint8)},
            r"must be uint8 \[height, width, 3\], not uint8 \[64, 64\]$",
        ),
        ({"images": np.zeros((2, 0, 64, 3), np.uint8)}, r"images must be uint8 \[height, width, 3\]"),
        ({"state": np.zeros(7)}, r"state must be finite numbers \[8\], or \[B, 8\] for a batch, not float32 \[7\]"),
        ({"state": np.full(8, np.nan)}, r"state must be finite numbers"),
        ({"state": np.zeros((0, 8))}, r"state must be finite numbers"),
        ({"state": "here"}, r"state must be numbers, not 'here'"),
        ({"state": np.zeros((2, 8))}, r"prompt must have an entry for each of the 2 rows of state"),
        ({"prompt": "fly"}, r"prompt 'fly' is none of this agent's, such as 'put the block on the red plate'"),
        ({"prompt": 3}, r"prompt 3 is none of this agent's"),
        ({"agent_image": np.zeros((32, 32, 3), np.uint8)}, r"agent_image must be uint8 \[64, 64, 3\]"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(agent: Agent, change: dict[str, Any], message: str) -> None:
    observation = row(observations(1), 0) | change
    if np.ndim(observation["state"]) == 2:
        observation["images"] = np.zeros((2, 2, 64, 64, 3), np.uint8)
        observation["prompt"] = [PROMPT]
    with pytest.raises(ValueError, match=message) as raised:
        agent.act(observation)
    assert "\n" not in str(raised.value)


def test_what_is_asked_for_otherwise_is_refused(agent: Agent, tmp_path: Path) -> None:
    observation = row(observations(1), 0)
    with pytest.raises(ValueError, match=r"steps must be between 1 and the policy's 10, not 11"):
        agent.act(observation, steps=11)
    with pytest.raises(ValueError, match=r"mode must be deterministic, stochastic or base, not 'best'"):
        agent.act(observation, mode="best")  # type: ignore[arg-type]  # which a caller without types may write
    with pytest.raises(ValueError, match=r"one for each of 1 rows, not 2"):
        agent.act(observation, generator=[np.random.default_rng(0)] * 2)
    with pytest.raises(ValueError, match=r"the observation lacks 'state'"):
        agent.act({"images": observation["images"]})
    with pytest.raises(ValueError, match=r"it does not exist; give a run directory"):
        dsrl_async.load_agent(tmp_path / "gone")


def test_another_policy_than_the_runs_is_refused(finished_run: FinishedRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run.run_dir, tmp_path / "run"))
    made_with = json.loads((run / "made_with.json").read_text())
    made_with["policy"]["weights"] = "0" * 64
    (run / "made_with.json").write_text(json.dumps(made_with))
    with pytest.raises(ValueError, match=r"is not the policy that the resumed run was made with"):
        dsrl_async.load_agent(run)


def test_the_public_names_come_with_their_first_use() -> None:
    code = "import sys, dsrl_async; assert not {'torch', 'numpy', 'dsrl_async.agent'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert {name: getattr(dsrl_async, name).__module__ for name in dsrl_async.__all__} == {
        "Agent": "dsrl_async.agent",
        "load_agent": "dsrl_async.agent",
    }
    with pytest.raises(AttributeError, match="has no attribute 'load_agents'"):
        dsrl_async.load_agents  # type: ignore[attr-defined]  # noqa: B018
