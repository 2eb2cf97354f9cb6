"""Checkpoints and the learner: what is written comes back, and a crash at any point loses at most the newest one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.full_disk import full_disk
from support.learners import HORIZON, fill, make_learner

from dsrl_async.config.settings import CheckpointConfig, Config
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.run import checkpoints
from dsrl_async.run.weights import HEADER
from dsrl_async.sac import METRIC_NAMES
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters
from dsrl_async.shm.memory import create_memory
from dsrl_async.shm.replay import ReplayRing


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


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
    checkpoints.restore_shared(checkpoint, counters, ring, tasks=1)
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


def read_tree(root: Path) -> dict[str, str]:
    """Every name in a directory, with what is behind it."""

    def read(path: Path) -> str:
        if path.is_symlink():
            return f"link to {path.readlink()}"
        return path.read_bytes().hex() if path.is_file() else f"no file, mode {path.stat().st_mode:o}"

    return {str(path.relative_to(root)): read(path) for path in sorted(root.rglob("*"))}


BESIDE = (
    "{}.bak",
    "{} (1)",
    "{} (copy)",
    "{}_old",
    "copy of {}",
    "{}-2",
    "{}~",
    ".{}",
    ".{}.Xy3z9Q",
    "{}.tmp",
    "1-2",
    "٣-٤",
)
"""Names of copies of a checkpoint: by hand, by file managers, by rsync; the last are numbers, but not its own."""
NOTES = ("notes.txt", ".DS_Store", "._{}", ".syncthing.{}.tmp", ".nfs000000000012", "7-7", "{}.sha256", ".8-8.tmp")


def litter(root: Path, checkpoint: Path) -> None:
    """What people and their tools leave beside a checkpoint."""
    for name in BESIDE:
        shutil.copytree(checkpoint, root / name.format(checkpoint.name))
    shutil.copytree(
        checkpoint, root / checkpoint.name.translate({ord(digit): 0x660 + int(digit) for digit in "0123456789"})
    )
    for name in NOTES:
        (root / name.format(checkpoint.name)).write_text("a note")
    (root / "9-9").symlink_to("nowhere")
    (root / "2026-11").mkdir()
    (root / "99999999-99999999").mkdir()  # a half copy: `state.json` is written last, and sorted last
    shutil.copy(checkpoint / checkpoints.AGENT, root / "99999999-99999999")
    (root / "99999998-99999999" / "state.json").mkdir(parents=True)
    (root / "5-5").mkdir(mode=0)
    os.mkfifo(root / "6-6")


def test_what_lies_beside_checkpoints_is_neither_taken_for_one_nor_removed(
    small_config: Config, spec: EnvironmentSpec, memory: Arena, run_dir: Path
) -> None:
    root, learner = run_dir / "checkpoints", make_learner(small_config, memory, run_dir)
    fill(memory, 40)
    learner.update()
    litter(root, learner.checkpoint())
    for left in (".77777777-88888888.tmp", ".77777777-88888889.tmp"):  # by processes that were killed
        (root / left).mkdir()
    before = read_tree(root)
    for _ in range(4):
        learner.update()
        newest = learner.checkpoint()
        assert checkpoints.find(run_dir) == newest
        fresh = create_memory(small_config, spec, HORIZON)
        checkpoints.restore_shared(newest, Counters(fresh), ReplayRing(fresh), tasks=1)
        assert Counters(fresh).learner_updates[0] == learner.counters.learner_updates[0]
    after, kept = read_tree(root), ("00000004-00000040", "00000005-00000040")
    assert [path.name for path in checkpoints.complete(root)] == list(kept)
    removed = ("00000001-00000040/", ".7")
    stays = {name: what for name, what in before.items() if not f"{name}/".startswith(removed)}
    assert {name: what for name, what in after.items() if not name.startswith(kept)} == stays


def test_what_lies_in_an_old_checkpoint_stays_when_that_is_removed(
    small_config: Config, memory: Arena, run_dir: Path
) -> None:
    learner = make_learner(small_config, memory, run_dir)
    fill(memory, 40)
    for number in range(4):
        learner.update()
        written = learner.checkpoint()
        if number < 2:
            (written / "note.txt").write_text("mine")
            shutil.copy(written / "replay" / "lane-0000.safetensors", written / "replay" / "lane-0000.safetensors~")
    assert checkpoints.find(run_dir) == written
    for name in ("00000001-00000040", "00000002-00000040"):
        left = [file.name for file in (run_dir / "checkpoints" / name).rglob("*") if file.is_file()]
        assert sorted(left) == ["lane-0000.safetensors~", "note.txt"]


def test_an_old_checkpoint_that_is_a_link_or_cannot_be_removed_costs_nothing(
    small_config: Config,
    memory: Arena,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    learner = make_learner(small_config, memory, run_dir)
    fill(memory, 40)
    learner.update()
    first = learner.checkpoint()
    elsewhere = first.rename(run_dir / first.name)
    first.symlink_to(elsewhere)
    shutil.copytree(first, first.with_name("1-40"))
    before = read_tree(elsewhere)

    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    for _ in range(3):
        learner.update()
        newest = learner.checkpoint()
    assert "cannot be removed: Operation not permitted" in caplog.text
    assert checkpoints.find(run_dir) == newest
    assert first.is_symlink()
    assert checkpoints.complete(first.parent)[:2] == [first.with_name("1-40"), first]
    assert read_tree(elsewhere) == before


@pytest.mark.parametrize("foreign", ["file", "link", "half copy", "fifo", "temporary file"])
def test_a_name_that_something_else_has_costs_no_checkpoint(
    small_config: Config, memory: Arena, run_dir: Path, foreign: str
) -> None:
    learner, root = make_learner(small_config, memory, run_dir), run_dir / "checkpoints"
    fill(memory, 40)
    learner.update()
    name = root / "00000001-00000040"
    if foreign == "file":
        name.write_text("mine")
    elif foreign == "link":
        name.symlink_to("nowhere")
    elif foreign == "half copy":
        (name / "replay").mkdir(parents=True)
        (name / checkpoints.AGENT).write_text("half")
    elif foreign == "fifo":
        os.mkfifo(name)
    else:
        (root / ".00000001-00000040.tmp").write_text("mine")
    before = read_tree(root)
    written = learner.checkpoint()
    assert written == learner.checkpoint()  # the second time it is there already
    assert written.name == "000000001-00000040"
    assert checkpoints.find(run_dir) == written
    assert before.items() <= read_tree(root).items()


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

    monkeypatch.setattr(Path, "write_bytes", disk_full)
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
        checkpoints.restore_shared(checkpoint, Counters(fresh), ReplayRing(fresh), tasks=1)
    assert "\n" not in str(caught.value)
