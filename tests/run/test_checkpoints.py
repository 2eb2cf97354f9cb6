"""Checkpoints and the learner: what is written comes back, and a crash at any point loses at most the newest one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.full_disk import full_disk

from dsrl_async.config.settings import CheckpointConfig, Config
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.run import checkpoints
from dsrl_async.run.learner.learner import Learner
from dsrl_async.run.weights import HEADER
from dsrl_async.sac import METRIC_NAMES
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters
from dsrl_async.shm.memory import create_memory
from dsrl_async.shm.replay import ReplayRing

HORIZON = 10


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def fill(memory: Arena, decisions: int, seed: int = 0) -> None:
    """Random transitions in both lanes, counted as a worker counts them."""
    rng, ring, counters = np.random.default_rng(seed), ReplayRing(memory), Counters(memory)
    for lane in (0, 1):
        for _ in range(decisions // 2):
            if rng.random() < 0.2 or ring.head[lane] == 0:
                ring.begin_episode(lane, rng.integers(0, 256, (64, 64, 3)).astype(np.uint8), rng.normal(size=8))
            image = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
            ring.append(lane, rng.normal(size=32), -1.0, 5, rng.random() < 0.1, 0, image, rng.normal(size=8))
            counters.actor_decisions[lane] += 1
            counters.actor_env_steps[lane] += 5


def make_learner(config: Config, memory: Arena, run_dir: Path, frames: list[bytes] | None = None) -> Learner:
    published = [] if frames is None else frames
    return Learner(config, memory, HORIZON, torch.device("cpu"), run_dir, published.append)


def test_learner_follows_the_ratio_publishes_and_measures(
    small_config: Config, memory: Arena, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsrl_async.run.learner.learner.METRICS_INTERVAL_S", 600.0)
    frames: list[bytes] = []
    learner = make_learner(small_config, memory, run_dir, frames)
    assert len(frames) == 1  # initial weights, so that the inference process has some
    assert learner.due() == 0
    fill(memory, 40)
    assert learner.due() == 40 - 16
    while learner.due():
        assert learner.update()
    assert learner.counters.learner_updates[0] == 24
    versions = [HEADER.unpack_from(frame)[2] for frame in frames]
    assert versions == [0, 10, 20]
    assert learner.counters.learner_metrics_update[0] == 1  # then once in ten minutes
    assert np.isfinite(learner.counters.learner_metrics[METRIC_NAMES.index("train/sac/critic_loss")])


def test_learner_does_nothing_while_a_batch_cannot_be_filled(
    small_config: Config, memory: Arena, run_dir: Path
) -> None:
    learner = make_learner(small_config, memory, run_dir)
    assert not learner.update()
    assert learner.counters.learner_updates[0] == 0


def test_restored_learner_continues_bit_for_bit(
    small_config: Config, spec: EnvironmentSpec, memory: Arena, run_dir: Path
) -> None:
    learner = make_learner(small_config, memory, run_dir)
    fill(memory, 60)
    for _ in range(20):
        learner.update()
    learner.checkpoint()
    checkpoint = checkpoints.find(run_dir)
    assert checkpoint is not None
    assert checkpoint.name == "00000020-00000060"
    fresh = create_memory(small_config, spec, HORIZON)
    counters, ring = Counters(fresh), ReplayRing(fresh)
    checkpoints.restore_shared(checkpoint, counters, ring)
    assert counters.learner_updates[0] == 20
    assert counters.actor_env_steps.tolist() == [150, 150]
    assert ring.size() == learner.ring.size() == 60
    restored = make_learner(small_config, fresh, run_dir)
    for _ in range(5):
        learner.update()
        restored.update()
    before, after = learner.agent.state_tensors(), restored.agent.state_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_abandoned_and_old_checkpoints_are_cleared_and_the_newest_is_found(
    small_config: Config, memory: Arena, run_dir: Path
) -> None:
    learner = make_learner(small_config, memory, run_dir)
    fill(memory, 40)
    for _ in range(4):
        learner.update()
        learner.checkpoint()
        # A process killed while writing leaves this behind:
        found = checkpoints.find(run_dir)
        assert found is not None
        shutil.copytree(found, run_dir / "checkpoints" / ".99999999-0.tmp")
        (run_dir / "checkpoints" / ".recovery.safetensors.tmp").touch()
        assert found.name.startswith(f"{int(learner.counters.learner_updates[0]):08d}")
    learner.update()
    learner.checkpoint()
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["00000004-00000040", "00000005-00000040"]


def test_a_full_disk_costs_a_checkpoint_and_neither_the_older_ones_nor_its_space(
    small_config: Config, memory: Arena, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config.model_copy(update={"checkpoint": CheckpointConfig(interval_minutes=1e-9)})
    learner = make_learner(config, memory, run_dir)
    fill(memory, 40)
    learner.update()
    older = learner.checkpoint()
    learner.update()
    with full_disk(20_000):
        learner.save_when_due()
    assert learner.counters.learner_failed_checkpoints[0] == 1
    assert "could not write a checkpoint" in caplog.text
    assert list((run_dir / "checkpoints").iterdir()) == [older]
    learner.save_when_due()
    assert checkpoints.find(run_dir) != older


def test_a_full_disk_leaves_the_agent_that_a_learner_would_be_replaced_with(
    small_config: Config, memory: Arena, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsrl_async.run.learner.learner.RECOVERY_INTERVAL_S", 0.0)
    learner, path = make_learner(small_config, memory, run_dir), checkpoints.recovery_path(run_dir)
    learner.save_when_due()
    written = path.read_bytes()
    fill(memory, 40)
    learner.update()
    with full_disk(20_000):
        learner.save_when_due()
    assert learner.counters.learner_failed_checkpoints[0] == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == written
    learner.save_when_due()
    assert path.read_bytes() != written


def test_a_failing_write_keeps_the_checkpoint_before(
    small_config: Config, memory: Arena, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner(small_config, memory, run_dir)
    fill(memory, 40)
    learner.update()
    first = learner.checkpoint()
    learner.update()

    def disk_full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        learner.checkpoint()
    learner.config.checkpoint.interval_minutes = 1e-9
    learner.save_when_due()  # while the run goes on, it is no reason to stop
    assert learner.counters.learner_failed_checkpoints[0] == 1
    assert checkpoints.find(run_dir) == first.resolve()
    monkeypatch.undo()
    learner.save_when_due()
    assert checkpoints.find(run_dir) != first.resolve()


def test_learner_that_replaces_another_takes_up_what_it_left(
    small_config: Config, memory: Arena, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner(small_config, memory, run_dir)
    fill(memory, 60)
    for _ in range(5):
        learner.update()
    monkeypatch.setattr("dsrl_async.run.learner.learner.RECOVERY_INTERVAL_S", 0.0)
    learner.save_when_due()
    left = learner.agent.state_tensors()
    for _ in range(3):
        learner.update()
    successor = make_learner(small_config, memory, run_dir)
    assert all(torch.equal(left[name], tensor) for name, tensor in successor.agent.state_tensors().items())
    assert successor.counters.learner_updates[0] == 8
    assert successor.counters.learner_lost_updates[0] == 3


@pytest.mark.parametrize("damage", ["state.json", "agent.safetensors", "replay/lane-0000.safetensors"])
def test_damaged_files_are_named_in_one_sentence(
    small_config: Config, spec: EnvironmentSpec, memory: Arena, run_dir: Path, damage: str
) -> None:
    learner = make_learner(small_config, memory, run_dir)
    fill(memory, 40)
    checkpoint = learner.checkpoint()
    path = checkpoint / damage
    path.write_bytes(path.read_bytes()[:-20])
    fresh = create_memory(small_config, spec, HORIZON)
    with pytest.raises(ValueError, match=damage.split("/")[-1]) as caught:
        checkpoints.restore_shared(checkpoint, Counters(fresh), ReplayRing(fresh))
    assert "\n" not in str(caught.value)
