"""Demonstrations from file to update: how they are cut, what rows they become, that a run begins with them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.commands import call
from support.launched import SMALL

from dsrl_async.config.settings import Config
from dsrl_async.envs.tabletop_spec import TABLETOP
from dsrl_async.host.policies import policy_record
from dsrl_async.pretraining.tabletop_demonstrations import make_demonstrations
from dsrl_async.run import checkpoints, demonstrations
from dsrl_async.run.learner.sampling import Demonstrated, InPlace
from dsrl_async.run.learner.updates import Updates
from dsrl_async.run.supervisor.demonstrations import provide
from dsrl_async.sac import IMITATION_METRIC_NAME, METRIC_NAMES
from dsrl_async.sac.agent import SacAgent
from dsrl_async.sac.layout import NoiseLayout
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.memory import create_memory
from dsrl_async.shm.replay import DEMONSTRATIONS, ReplayRing

OPTIONS = [
    *SMALL,
    "--serial",
    "--sac.train-actor-steps",
    "0",
    "--sac.imitation-updates",
    "3",
    "--replay.demonstration-error",
    "0.5",
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One demonstration of the task."""
    path = tmp_path_factory.mktemp("demonstrations") / "shown.safetensors"
    make_demonstrations(path, episodes=1, seed=3, processes=1, task="swap2")
    return path


@pytest.fixture(scope="module")
def run_dir(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    directory = tmp_path_factory.mktemp("run") / "run"
    result = call(
        *("launch", *OPTIONS, "--seed", "3", "--max-decisions", "20", "--run-dir", str(directory)),
        *("--replay.demonstrations", str(file)),
    ).result
    assert (result["decisions"], result["updates"]) == (20, 4)
    return directory


def test_every_frame_up_to_the_success_has_a_decision() -> None:
    cut = demonstrations.sequences(frames=9, success=6, chunk=3)
    assert [[decision.frame for decision in sequence] for sequence in cut] == [[0, 3, 6], [1, 4], [2, 5]]
    assert cut[0][1] == demonstrations.Decision(3, 3, -1, 6)
    assert cut[0][2] == demonstrations.Decision(6, 1, 0, 7)
    assert cut[1][1] == demonstrations.Decision(4, 3, 2, 7)
    assert cut[2][1] == demonstrations.Decision(5, 2, 1, 7)
    assert demonstrations.sequences(frames=1, success=0, chunk=3) == [[demonstrations.Decision(0, 1, 0, 0)]]


def test_chunks_go_on_as_the_demonstrator_did() -> None:
    action = np.arange(5, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(demonstrations.chunk_of(action, [1, 4], 3)[..., 0], [[1, 2, 3], [4, 4, 4]])


def test_rows_say_what_came_of_the_noise_that_makes_the_actions(run_dir: Path, file: Path) -> None:
    """The policy is asked again, by itself, what it makes of the rows' noise."""
    rows, shown = load_file(demonstrations.rows_path(run_dir)), load_file(file)
    frames = len(shown["success"])
    cut = demonstrations.sequences(frames, frames - 1, 5)
    order = [decision for sequence in cut for decision in [*sequence, None]]
    assert len(order) == len(rows["complete"])
    config = checkpoints_config(run_dir)
    policy = policy_record(config.policy).load(config.policy, torch.device("cpu"), TABLETOP.prompts, lambda: None)
    batch = policy.batch(1, int(policy.prompt_lengths.max()))
    layout = NoiseLayout(config.sac, policy.spec.action_horizon)
    complete = 0
    for row, decision in enumerate(order):
        if decision is None:
            assert not rows["complete"][row]
            continue
        assert rows["steps"][row] == decision.steps
        assert rows["terminal"][row] == (decision.success_step >= 0)
        assert rows["reward"][row] == -1.0 + (decision.success_step >= 0)
        np.testing.assert_array_equal(rows["state"][row], shown["state"][decision.frame])
        np.testing.assert_array_equal(rows["image"][row], shown["images"][decision.frame, 0])
        np.testing.assert_array_equal(rows["imitated"][row], rows["noise"][row])
        batch.images.copy_(torch.from_numpy(shown["images"][decision.frame]))
        batch.state.copy_(torch.from_numpy(shown["state"][decision.frame]))
        batch.fill_prompts(np.zeros(1, np.int64))
        batch.encode()
        batch.noise.copy_(layout.expand(torch.from_numpy(rows["noise"][row])[None]))
        batch.denoise()
        executed = demonstrations.chunk_of(shown["action"], [decision.frame], 5)[0]
        scale = batch.normaliser.action_scale.numpy()  # type: ignore[attr-defined]  # of a Pi0
        error = np.sqrt(np.square((batch.actions[0, :5].numpy() - executed) / scale).mean())
        assert rows["complete"][row] == rows["near"][row]
        assert rows["near"][row] == (error <= 0.5) or abs(error - 0.5) < 1e-3
        complete += rows["complete"][row]
    assert complete > len(order) / 2


def checkpoints_config(run_dir: Path) -> Config:
    from dsrl_async.config.load import read_run_settings, validate

    return validate(read_run_settings(run_dir))


def test_the_same_seed_gives_the_same_run_and_another_error_is_refused_on_a_resume(
    run_dir: Path, file: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    arguments = ["--replay.demonstrations", str(file), "--max-decisions", "20", "--run-dir", str(again)]
    assert call("launch", *OPTIONS, "--seed", "3", *arguments).code == 0
    agents = [checkpoints.agent_file(found) for found in map(checkpoints.find, (run_dir, again)) if found is not None]
    assert agents[0].read_bytes() == agents[1].read_bytes()
    rows = demonstrations.rows_path(again).read_bytes()
    refused = call("launch", "--resume", str(again), "--replay.demonstration-error", "0.1", "--max-decisions", "22")
    assert refused.code == 2
    assert "replay.demonstration_error: the resumed run was made with 0.5" in refused.stderr
    refused = call("launch", "--resume", str(again), "--replay.demonstrations", "null", "--max-decisions", "22")
    assert "replay.demonstrations: the resumed run was made with" in refused.stderr
    file_elsewhere = file.rename(file.with_suffix(".gone"))
    try:  # the rows are the run's own now
        assert call("launch", "--resume", str(again), "--max-decisions", "22").result["updates"] == 6
    finally:
        file_elsewhere.rename(file)
    assert demonstrations.rows_path(again).read_bytes() == rows


def test_whether_the_actor_imitates_is_among_the_metrics(run_dir: Path) -> None:
    metrics = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["metrics"]
    assert list(metrics) == [*METRIC_NAMES, IMITATION_METRIC_NAME]


def test_every_batch_has_its_share(run_dir: Path) -> None:
    config = checkpoints_config(run_dir)
    count = demonstrations.count_rows(run_dir)
    assert count is not None
    arena: Arena = create_memory(config, TABLETOP, 10, count)
    shown, ring = ReplayRing(arena, DEMONSTRATIONS), ReplayRing(arena)
    near, decisions = demonstrations.load_rows(run_dir, shown, tasks=1)
    assert decisions == demonstrations.count(config, TABLETOP).decisions >= near == shown.size()
    image, state = np.zeros((64, 64, 3), np.uint8), np.zeros(8, np.float32)
    ring.begin_episode(0, image, state)
    for _ in range(20):
        ring.append(0, np.full(32, 9.0), 0.0, 5, False, 0, image, state)
    agent, source = SacAgent(config.sac, 10), InPlace(ring)
    updates = Updates(agent, source, 16, None, Demonstrated(shown, torch.device("cpu"), 0.25, 16))
    updates.refresh()
    rows = load_file(demonstrations.rows_path(run_dir))
    of_rows = {row.tobytes() for row in rows["noise"][rows["complete"]]}
    for _ in range(3):
        assert updates.draw_batch()
        assert (updates.batch.noise[:12] == 9.0).all()
        assert {row.numpy().tobytes() for row in updates.batch.noise[12:]} <= of_rows
        assert updates.imitated is not None
        assert torch.equal(updates.imitated.noise, updates.batch.noise[12:])
        assert (updates.imitated.weight == 1).all()
        states = {row.tobytes() for row in rows["state"]}
        assert {row.numpy().tobytes() for row in updates.batch.states[[*range(12, 16), *range(28, 32)]]} <= states


@pytest.mark.parametrize("kept", [1.0, 0.4])
def test_it_is_said_for_how_many_decisions_there_is_noise(
    run_dir: Path, tmp_path: Path, kept: float, caplog: pytest.LogCaptureFixture
) -> None:
    config, fields = checkpoints_config(run_dir), load_file(demonstrations.rows_path(run_dir))
    decided = np.flatnonzero(fields["steps"])
    near = decided[: round(kept * len(decided))]
    fields["near"][:] = np.isin(np.arange(len(fields["near"])), near)
    save_file(fields, demonstrations.rows_path(tmp_path))
    ring = ReplayRing(create_memory(config, TABLETOP, 10, len(fields["near"])), DEMONSTRATIONS)
    with caplog.at_level("INFO"):
        provide(SimpleNamespace(spec=TABLETOP), tmp_path, ring, pytest.fail, lambda: None)  # type: ignore[arg-type]
    assert f"noise was found for {len(near)} of {len(decided)} decisions" in caplog.text
    assert ("soon learned by heart" in caplog.text) == (kept < 0.5)


def test_a_file_without_success_is_refused_before_anything_starts(file: Path, tmp_path: Path) -> None:
    fields = load_file(file)
    save_file(fields | {"success": np.zeros_like(fields["success"])}, tmp_path / "none.safetensors")
    refused = call(
        *("launch", *OPTIONS, "--replay.demonstrations", str(tmp_path / "none.safetensors")),
        *("--run-dir", str(tmp_path / "run")),
    )
    assert refused.code == 2
    assert "replay.demonstrations: " in refused.stderr
    assert "never succeeds" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_what_the_policy_cannot_make_ends_the_start_with_a_sentence(file: Path, tmp_path: Path) -> None:
    refused = call(
        *("launch", *OPTIONS, "--replay.demonstrations", str(file), "--replay.demonstration-error", "1e-9"),
        *("--run-dir", str(tmp_path / "run")),
    )
    assert refused.code != 0
    assert "for none of" in refused.stderr
    assert "raise replay.demonstration_error" in refused.stderr
