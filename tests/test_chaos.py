"""The chaos harness: what it checks rows and ends by, and a short seeded part of it on real runs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.chaos import harness, rows, saved, soak
from support.chaos.launch import Hit, Launch


def drawn_rows(count: int = 40) -> rows.Drawn:
    """Rows as they must be, of episodes of two lanes."""
    episode = np.arange(count) + 7
    decision, random = np.arange(count) % rows.EPISODE_DECISIONS, np.arange(count) * 1001 % rows.UNIT
    states, following = rows.states(episode, decision, random), rows.states(episode, decision + 1, random)
    images = np.stack([rows.image_of(state) for state in states])
    noise = np.random.default_rng(0).normal(size=(count, 32)).astype(np.float32)
    rows.stamp(noise, images, states)
    outcome = rows.outcomes(states)
    return rows.Drawn(
        images=images,
        states=states,
        next_images=np.stack([rows.image_of(state) for state in following]),
        next_states=following,
        noise=noise,
        reward=outcome.success.astype(np.float32) - 1,
        steps=outcome.steps,
        terminal=outcome.success.copy(),
        discount=np.where(outcome.success, 0, 0.979**outcome.steps).astype(np.float32),
        lanes=episode % 2,
    )


def test_whole_rows_are_found_whole() -> None:
    drawn = drawn_rows()
    assert rows.problems(drawn, lanes=2) == {}
    assert drawn.terminal is not None
    assert 0 < drawn.terminal.sum() < 40
    assert len(np.unique(drawn.states[:, 3:], axis=0)) == 40


def exchange(array: Any, part: Any = slice(None)) -> Any:
    """Two rows, or parts of them, change places."""
    array[[4, 5], part] = array[[5, 4], part]
    return array


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda drawn: exchange(drawn.states), "observation"),
        (lambda drawn: exchange(drawn.images.reshape(40, -1), slice(6000)), "observation"),
        (lambda drawn: exchange(drawn.next_images.reshape(40, -1), slice(12000, None)), "next observation"),
        (lambda drawn: [exchange(part) for part in (drawn.next_states, drawn.next_images)], "successor"),
        (lambda drawn: exchange(drawn.noise), "noise is of another observation"),
        (lambda drawn: exchange(drawn.noise, slice(3)), "noise is torn"),
        (lambda drawn: exchange(drawn.noise, slice(30, None)), "noise is torn"),
        (lambda drawn: drawn.noise.__setitem__(5, 0), "noise is of another image"),
        (lambda drawn: drawn.noise.__setitem__(5, np.nan), "noise is torn"),
        (lambda drawn: drawn.reward.__iadd__(1), "reward"),
        (lambda drawn: drawn.steps.__iadd__(1), "outcome"),
        (lambda drawn: drawn.terminal.__setitem__(slice(None), True), "outcome"),
        (lambda drawn: drawn.discount.__imul__(0.979), "discount"),
        (lambda drawn: drawn.lanes.__iadd__(1), "lane"),
        (lambda drawn: drawn.states.__setitem__((5, 0), np.inf), "observation"),
    ],
)
def test_a_row_that_is_torn_or_foreign_is_found(spoil: Callable[[rows.Drawn], object], name: str) -> None:
    drawn = drawn_rows()
    spoil(drawn)
    found = rows.problems(drawn, lanes=2)
    assert name in found
    assert set(found[name]) <= {4, 5} or len(found[name]) > 30


def write_checkpoint(directory: Path, drawn: rows.Drawn) -> Path:
    """A checkpoint whose only lane holds one episode, which `drawn` begins."""
    path = directory / "checkpoints" / "00000003-00000010"
    (path / "replay").mkdir(parents=True)
    save_file({"weights": np.ones(3, np.float32)}, path / "agent.safetensors")
    counters = {"learner_updates": [3], "actor_decisions": [10]}
    (path / "state.json").write_text(json.dumps({"counters": counters}))
    complete = np.array([True] * 3 + [False])
    columns = {
        "image": drawn.images[:4],
        "state": drawn.states[:4],
        "noise": drawn.noise[:4],
        "reward": drawn.reward[:4],
        "steps": drawn.steps[:4] if drawn.steps is not None else None,
        "terminal": drawn.terminal[:4] if drawn.terminal is not None else None,
        "complete": complete,
    }
    save_file(
        {name: np.ascontiguousarray(column) for name, column in columns.items()}, path / "replay/lane-0000.safetensors"
    )
    return path


def one_episode() -> rows.Drawn:
    episode, decision, random = np.full(5, 2), np.arange(5), np.full(5, 77)
    states = rows.states(episode, decision, random)
    images = np.stack([rows.image_of(state) for state in states])
    noise = np.zeros((5, 32), np.float32)
    rows.stamp(noise, images, states)
    outcome = rows.outcomes(states)
    reward = outcome.success.astype(np.float32) - 1
    return rows.Drawn(images, states, images, states, noise, reward, outcome.steps, outcome.success)


def test_rows_and_files_of_a_checkpoint_are_checked(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, one_episode())
    assert saved.checkpoints(tmp_path) == [checkpoint]
    assert saved.problems(checkpoint, lanes=1) == (3, [])
    agent = checkpoint / "agent.safetensors"
    whole = agent.read_bytes()
    agent.write_bytes(whole[:-1])
    assert "cannot be read" in saved.problems(checkpoint, lanes=1)[1][0]
    save_file({"weights": np.array([np.nan], np.float32)}, agent)
    assert saved.problems(checkpoint, lanes=1)[1] == [f"{checkpoint.name}: weights is not finite"]
    agent.write_bytes(whole)
    foreign = one_episode()
    foreign.noise[1] = foreign.noise[2]
    spoilt = write_checkpoint(tmp_path / "spoilt", foreign)
    assert "noise is of another observation" in " ".join(saved.problems(spoilt, lanes=1)[1])


def reason_problems(reason: str, *hits: tuple[str, str], asked: str = "terminated") -> list[tuple[str, str]]:
    launch = Launch.__new__(Launch)
    launch.hits, launch.asked = [Hit(name, what, 0.0) for name, what in hits], {asked}
    return launch._wrong_reason(reason, disk=False)


def test_a_reason_must_name_who_was_hit() -> None:
    learner = ("learner", "SIGKILL")
    ended = (
        "failed: learner ended 3 times soon after its start (killed by SIGKILL): see /tmp/inference/logs/learner.log"
    )
    assert reason_problems(ended, learner, learner, learner) == []
    assert reason_problems(ended, learner, learner)[0][0] == "false report"
    assert reason_problems(ended, *[("inference", "SIGKILL")] * 3)[0][0] == "false report"
    assert reason_problems("failed: something")[0][0] == "false report"
    assert reason_problems("terminated") == []
    assert reason_problems("interrupted")[0][0] == "false report"


def test_the_ring_soaks_without_a_torn_row_and_a_blind_reader_is_found() -> None:
    result = soak.soak(rows=20_000, drawn=20_000, lanes=2, seed=1, limit_s=20)
    assert (result.bad, result.wrong) == (0, {})
    assert result.written >= 20_000
    assert result.drawn >= 20_000
    assert soak.soak(rows=1e9, drawn=1e9, lanes=2, seed=1, limit_s=20, blind=True).bad > 0


def test_a_harness_that_was_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With runs that are no processes; what the killed one has left are its log, half a line, and a process."""

    class Run:
        def __init__(self, harness: harness.Harness, number: int, long_run: bool) -> None:
            self.harness, self.number = harness, number

        def play(self) -> None:
            numbers.append(self.number)
            self.harness.fault(self.number, "SIGKILL", "learner", 0.0, "running")

    numbers: list[int] = []
    monkeypatch.setattr(harness, "Run", Run)
    options = harness.Options(tmp_path / "out", faults=3, seed=1, minutes=1.0)
    assert harness.run(options) == 0
    log = tmp_path / "out" / "log.jsonl"
    with log.open("a") as file:
        file.write('{"type": "finding", "time": 1.5, "run": 3, "kind": "hang", "after": 3}\n{"type": "fault", "ti')
    marker = {"DSRL_CHAOS_OUT": str((tmp_path / "out").resolve())}
    with subprocess.Popen(["sleep", "60"], env=os.environ | marker) as left:
        while b"sleep" not in Path(f"/proc/{left.pid}/cmdline").read_bytes():
            time.sleep(0.01)
        assert harness.run(dataclasses.replace(options, faults=5)) == 1  # what was found before counts, too
        assert left.wait(timeout=10) == -signal.SIGKILL
    assert numbers == [1, 2, 3, 4, 5]
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["number"] for entry in entries if entry["type"] == "fault"] == [1, 2, 3, 4, 5]
    assert harness.run(dataclasses.replace(options, faults=5)) == 1
    assert numbers == [1, 2, 3, 4, 5]


def test_runs_under_faults_keep_every_promise(tmp_path: Path) -> None:
    """A short seeded part of `python scripts/chaos.py`, with patience enough for a busy machine."""
    options = harness.Options(tmp_path, faults=12, seed=SEED, jobs=2, longest_stop_s=2.0, minutes=1.0, heartbeat_s=20.0)
    code = harness.run(options)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry for entry in log if entry["type"] == "finding"] == []
    assert code == 0
    kinds = Counter(entry["type"] for entry in log)
    assert kinds["fault"] >= 12
    assert sum(entry["rows"] for entry in log if entry["type"] == "launch") > 500
    assert sum(entry["renames"] for entry in log if entry["type"] == "launch") > 0


SEED = 3
"""Draws faults of several kinds."""
