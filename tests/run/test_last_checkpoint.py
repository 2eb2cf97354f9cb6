"""What a run has learned is not lost by its end: full disks, agents that diverge, learners that die too late."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.commands import call
from support.launched import SMALL, Launched, checkpoint_of, state_of
from support.learners import HORIZON, fill, make_learner
from support.paths import FIXTURES
from support.planted import Planted

from dsrl_async.config.settings import Config
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.run import checkpoints
from dsrl_async.run.learner.learner import Diverged, Learner
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters
from dsrl_async.shm.memory import create_memory
from dsrl_async.shm.replay import ReplayRing


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


@pytest.fixture
def learner(small_config: Config, memory: Arena, run_dir: Path) -> Learner:
    """A learner that has done three updates."""
    learner = make_learner(small_config, memory, run_dir)
    fill(memory, 40)
    for _ in range(3):
        learner.update()
    return learner


def save_recovery(learner: Learner) -> None:
    checkpoints.save_recovery(learner.run_dir, learner._agent_bytes, learner.counters, learner.beat)


def restored(config: Config, spec: EnvironmentSpec, run_dir: Path) -> tuple[Counters, ReplayRing, bool]:
    memory = create_memory(config, spec, HORIZON)
    counters, ring = Counters(memory), ReplayRing(memory)
    saved = checkpoints.latest(run_dir)
    assert saved is not None
    return counters, ring, checkpoints.restore_shared(saved, counters, ring, tasks=1)


# A full disk


class FullDisk:
    """After so many system calls that need room on the disk, all others fail."""

    CALLS = ((os, "mkdir"), (os, "fsync"), (Path, "write_bytes"), (Path, "write_text"), (Path, "replace"))

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, times: int) -> None:
        self.left, self.times = after, times
        for owner, name in self.CALLS:
            monkeypatch.setattr(owner, name, self.limited(getattr(owner, name)))

    def limited(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.left -= 1
            if self.left < 0 and self.left >= -self.times:
                if function.__name__ == "write_bytes":  # a part of it still has room
                    function(arguments[0], arguments[1][:100])
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **keywords)

        return call


@pytest.mark.parametrize("times", [1, 10**6], ids=["once", "from then on"])
@pytest.mark.parametrize("saved_before", ["checkpoint", "recovery", "both"])
def test_whichever_write_finds_the_disk_full_a_whole_agent_is_left(
    small_config: Config,
    spec: EnvironmentSpec,
    learner: Learner,
    monkeypatch: pytest.MonkeyPatch,
    saved_before: str,
    times: int,
) -> None:
    run_dir, reached = learner.run_dir, set()
    if saved_before != "recovery":
        learner.checkpoint()
    if saved_before != "checkpoint":
        learner.update()
        save_recovery(learner)
    before = int(learner.counters.learner_updates[0])
    for after in range(100):
        learner.update()
        done = int(learner.counters.learner_updates[0])
        with monkeypatch.context() as patch:
            disk = FullDisk(patch, after, times)
            try:
                learner.last_checkpoint()
                outcome = done
            except OSError:
                outcome = before
        counters, ring, replay = restored(small_config, spec, run_dir)
        assert counters.learner_updates[0] in (outcome, done)  # it may be there although its last fsync failed
        reached.add((bool(counters.learner_updates[0] == done), replay))
        saved = checkpoints.latest(run_dir)
        assert saved is not None
        assert int(load_file(checkpoints.agent_file(saved))["updates"]) == counters.learner_updates[0]
        assert not list((run_dir / "checkpoints").glob(".*"))  # nothing that fills the disk
        assert ring.size() >= 40 * replay
        if disk.left >= 0:
            break
        before = int(counters.learner_updates[0])
    else:
        pytest.fail("the disk was never large enough")
    assert (True, True) in reached
    if saved_before != "recovery" or times == 1:
        assert len({whole for whole, _ in reached}) == 1 + (times > 1)


def test_without_its_replay_the_checkpoint_fits_and_says_so(
    small_config: Config, spec: EnvironmentSpec, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full_of_lanes(path: Path, content: bytes) -> int:
        if path.parent.name == "replay":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_of_lanes)
        written = learner.last_checkpoint()
    assert sorted(path.name for path in written.iterdir()) == ["agent.safetensors", "state.json"]
    assert checkpoints.read_state(written)["replay"] is False
    counters, ring, replay = restored(small_config, spec, learner.run_dir)
    assert (counters.learner_updates[0], counters.decisions(), ring.size(), replay) == (3, 40, 0, False)
    whole = learner.last_checkpoint()  # there is room again, and nothing has been learned since
    assert whole.name == "000000003-00000040"
    assert checkpoints.latest(learner.run_dir) == whole
    assert restored(small_config, spec, learner.run_dir)[2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real one, of 2 MB, where one may be mounted."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if os.system(f"mount -t tmpfs -o size=2m dsrl {directory} 2>/dev/null") != 0:
        pytest.skip("nothing may be mounted here")
    try:
        yield directory
    finally:
        os.system(f"umount -l {directory}")


def test_a_run_on_a_disk_that_is_too_small_for_its_replay_goes_on_later(
    small_disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = small_disk / "run"
    done = call("launch", "--run-dir", str(run_dir), *SMALL, "--serial", "--max-decisions", "200")
    assert done.result["exit_reason"] == "max_decisions"
    assert "the last checkpoint has no replay buffer" in caplog.text
    assert state_of(run_dir)["replay"] is False
    updates = done.result["updates"]
    moved = Path(shutil.copytree(run_dir, tmp_path / "moved"))
    done = call("launch", "--resume", str(moved), "--serial", "--max-decisions", "230")
    assert "the replay buffer was not saved: updates begin again after 16 decisions" in caplog.text
    assert done.result["decisions"] == 230
    assert done.result["updates"] == updates + 14  # neither during the second warm-up, nor all at once after it
    assert checkpoints.check(checkpoint_of(moved))["counters"]["control_warmup_end"] == [216]


def full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_where_nothing_fits_the_recovery_file_stays_and_the_run_goes_on_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, arguments = tmp_path / "run", [*SMALL, "--serial", "--max-decisions"]
    recovery = checkpoints.recovery_path(run_dir)
    monkeypatch.setattr("dsrl_async.run.learner.learner.RECOVERY_INTERVAL_S", 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", full)
        done = call("launch", "--run-dir", str(run_dir), *arguments, "60")
    saved = checkpoints.read_state(recovery)["counters"]
    updates, decisions = saved["learner_updates"][0], sum(saved["actor_decisions"])
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (done.code, json.loads(done.stdout)) == (1, summary)
    assert summary["exit_reason"] == (
        "failed: no checkpoint was written at the end (max_decisions): [Errno 28] No space left on device; "
        f"{recovery} holds the agent of update {updates}, and --resume {run_dir} goes on from there"
    )
    assert list((run_dir / "checkpoints").iterdir()) == [recovery]
    done = call("launch", "--resume", str(run_dir), "--serial", "--max-decisions", str(decisions + 40))
    assert done.result["updates"] == updates + 40 - 16
    assert done.result["decisions"] == decisions + 40
    assert not recovery.exists()  # the checkpoint has more updates
    assert checkpoint_of(run_dir).name == f"{updates + 24:08d}-{decisions + 40:08d}"


def at_the_stop(code: str) -> dict[str, str]:
    """What to plant in the learner, so that it meets `code` each time when it writes the last checkpoint."""
    fault = f"""
import errno, os, pathlib, signal
from dsrl_async.run import checkpoints
save = checkpoints.save
def planted(run_dir, agent, counters, *rest):
    if counters.stop == 2:
        {code}
    return save(run_dir, agent, counters, *rest)
checkpoints.save = planted
"""
    return {"dsrl_async.run.learner.learner": fault}


def test_an_end_without_a_checkpoint_says_what_is_left(tmp_path: Path) -> None:
    planted = Planted(tmp_path, at_the_stop("raise OSError(errno.ENOSPC, 'No space left on device')"))
    arguments = [*SMALL, "--max-decisions", "150", "--checkpoint.interval-minutes", "0.001"]
    run = Launched(tmp_path / "run", *arguments, planted=planted)
    result = run.finish()
    assert result["returncode"] == 1
    left = checkpoint_of(run.run_dir)
    assert result["exit_reason"] == (
        "failed: no checkpoint was written at the end (max_decisions): [Errno 28] No space left on device; "
        f"{left} holds the agent of update {int(left.name[:8])}, and --resume {run.run_dir} goes on from there"
    )
    assert result["restarts"]["learner"] == 0


# Recovery or checkpoint


@pytest.mark.parametrize("newer", ["recovery", "checkpoint"])
def test_a_learner_that_replaces_another_takes_what_has_more_updates(
    small_config: Config, memory: Arena, learner: Learner, newer: str
) -> None:
    save: dict[str, Callable[[], object]] = {"checkpoint": learner.checkpoint}
    save["recovery"] = lambda: save_recovery(learner)
    for kind in sorted(save, key=lambda kind: kind == newer):
        learner.update()
        save[kind]()
    left = learner.agent.state_tensors()
    for _ in range(2):
        learner.update()
    successor = make_learner(small_config, memory, learner.run_dir)
    assert all(torch.equal(left[name], tensor) for name, tensor in successor.agent.state_tensors().items())
    assert successor.counters.learner_lost_updates[0] == 2


def test_a_newer_recovery_file_gives_the_agent_and_the_checkpoint_the_replay_buffer(
    small_config: Config, spec: EnvironmentSpec, memory: Arena, learner: Learner
) -> None:
    """As after `kill -9`, or where the machine lost its power."""
    learner.checkpoint()
    fill(memory, 20, seed=1)
    learner.update()
    save_recovery(learner)
    counters, ring, replay = restored(small_config, spec, learner.run_dir)
    assert (counters.learner_updates[0], counters.decisions(), ring.size(), replay) == (4, 60, 40, True)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_recovery_file_that_cannot_be_used_is_not(learner: Learner, content: bytes) -> None:
    checkpoints.recovery_path(learner.run_dir).write_bytes(content)
    assert checkpoints.latest(learner.run_dir) is None
    written = learner.checkpoint()
    assert checkpoints.latest(learner.run_dir) == written


# An agent that diverges


TENSORS = {
    "critic.flat": "critic",
    "actor.flat": "actor",
    "alpha.raw": "temperature",
    "target_critic.flat": "target critic",
    "critic.adam.exp_avg_sq": "critic",
    "actor.adam.exp_avg": "actor",
}


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30])
@pytest.mark.parametrize("tensor", TENSORS)
def test_an_agent_that_is_not_finite_is_not_saved(learner: Learner, tensor: str, value: float) -> None:
    good = learner.checkpoint()
    learner.update()
    learner.agent._tensors()[tensor].detach().view(-1)[-1] = np.inf if ".adam." in tensor else value
    for save in (learner.checkpoint, learner.last_checkpoint, lambda: save_recovery(learner)):
        with pytest.raises(Diverged, match=f"the agent's {TENSORS[tensor]} is not finite, .*after update 4 ") as caught:
            save()
        assert "after update 3 all was well" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert [path.name for path in good.parent.iterdir()] == [good.name]


def test_weights_that_are_not_finite_are_not_published(small_config: Config, memory: Arena, run_dir: Path) -> None:
    frames: list[bytes] = []
    learner = make_learner(small_config, memory, run_dir, frames)
    learner.agent.actor.flat.data[5] = -np.inf
    with pytest.raises(Diverged, match=r"agent's actor is not finite, .* after update 0 "):
        learner.publish()
    assert len(frames) == 1


def test_a_loss_that_is_not_finite_ends_the_learning_while_the_weights_still_are(learner: Learner) -> None:
    learner._metrics_read = -np.inf
    learner.agent.target_critic.flat.fill_(1e30)
    with pytest.raises(Diverged, match=r"not finite, .* update 4 \(critic loss (inf|nan), actor loss .*lower sac"):
        learner.update()


def diverge(run_dir: Path, launch: Callable[[list[str]], dict[str, Any]]) -> None:
    """Resume a good run with learning rates that cannot be, by `launch`: what is left is good."""
    shutil.copytree(FIXTURES / "run_beb78af", run_dir)
    rates = ["--sac.critic-lr", "1e30", "--sac.actor-lr", "1e30", "--checkpoint.interval-minutes", "0.001"]
    result = launch(["--resume", str(run_dir), "--max-decisions", "900", *rates])
    loss = r"loss (nan|inf|[-+.e0-9]+)"
    assert re.fullmatch(
        r"failed: (the critic's loss|the agent's critic) is not finite, or beyond 1e\+09, after update "
        rf"\d+ \(critic {loss}, actor {loss}; after update \d+ all was well\): lower sac.critic_lr, or look at the "
        rf"rewards; {run_dir}/checkpoints/\S+ holds the agent of update \d+, and --resume {run_dir} goes on from there",
        result["exit_reason"],
    )
    for path in (run_dir / "checkpoints").glob("*/agent.safetensors"):
        checkpoints.check_agent(path)


def test_a_run_that_diverges_says_so_and_its_good_checkpoint_goes_on(tmp_path: Path) -> None:
    def launch(arguments: list[str]) -> dict[str, Any]:
        done = call("launch", *arguments, "--serial")
        assert done.code == 1
        return dict(json.loads(done.stdout))

    diverge(tmp_path / "run", launch)
    rates = ["--sac.critic-lr", "3e-4", "--sac.actor-lr", "3e-4"]
    done = call("launch", "--resume", str(tmp_path / "run"), *rates, "--serial", "--max-minutes", "0.02")
    assert done.result["exit_reason"] == "max_minutes"


def test_a_learner_that_diverges_is_not_started_again(tmp_path: Path) -> None:
    def launch(arguments: list[str]) -> dict[str, Any]:
        result = Launched(tmp_path / "run", *arguments).finish()
        assert result["returncode"] == 1
        assert result["restarts"] == {"actor": 0, "inference": 0, "learner": 0, "template": 0}
        return result

    diverge(tmp_path / "run", launch)


# A learner that dies in the stop


def test_a_learner_that_dies_at_the_end_has_a_successor_that_writes_the_checkpoint(tmp_path: Path) -> None:
    once = tmp_path / "once"
    code = f"once = pathlib.Path({str(once)!r}); once.exists() or (once.touch(), os.kill(os.getpid(), signal.SIGKILL))"
    planted = Planted(tmp_path, at_the_stop(code))
    arguments = [*SMALL, "--max-decisions", "150", "--checkpoint.interval-minutes", "0.001"]
    run = Launched(tmp_path / "run", *arguments, planted=planted)
    result = run.finish()
    assert (result["returncode"], result["exit_reason"]) == (0, "max_decisions")
    assert result["restarts"]["learner"] == 1
    state = checkpoints.check(checkpoint_of(run.run_dir))
    assert sum(state["counters"]["actor_decisions"]) == 150
    assert state["replay"]
    assert run.left_over() == []


# Modes


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids="{:03o}".format)
def test_what_a_run_writes_has_the_modes_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        done = call("launch", "--run-dir", str(tmp_path / "run"), *SMALL, "--serial", "--max-decisions", "30")
    finally:
        os.umask(before)
    assert done.code == 0, done.stderr
    for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]:
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path
