"""The comparison with LIBERO's wrapper: its arithmetic with made-up samples, and starting actors as a run does."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.planted import Planted

from dsrl_async.bench import env
from dsrl_async.bench.env import FAST, OWN, STOCK, forked_workers, memory_mb, summarise


def test_medians_ratios_and_differences_are_those_of_their_samples() -> None:
    samples = {
        STOCK: {"start": [8.0], "step": [200.0, 400.0, 300.0], "memory": [900.0, 1000.0, 1000.0]},
        OWN: {"start": [2.0], "step": [50.0, 70.0, 60.0], "memory": [500.0, 500.0, 100.0]},
    }
    samples[STOCK] |= {"start_together": [30.0, 40.0], "memory_together": [8000.0, 8000.0]}
    samples[OWN] |= {"start_together": [7.0, 7.0], "memory_together": [2000.0, 2000.0]}
    seen = list(summarise(samples, {OWN: {"images": 3.0, "states": 0.5}}))
    figures = {(system, metric): (value, unit, repeats) for system, metric, value, unit, repeats in seen}
    assert len(figures) == len(seen)
    assert figures[STOCK, "start"] == (8.0, "CPU-s", 1)
    assert figures[OWN, "step"] == (60.0, "CPU-ms", 3)
    assert figures[STOCK, "steps_per_second"] == (pytest.approx(1000 / 300), "steps per CPU-s", 3)
    assert figures[STOCK, "start_together"] == (35.0, "s", 2)
    assert figures[OWN, "memory_together"] == (2000.0, "MB", 2)
    ratios = {metric: figures[f"{OWN}/{STOCK}", metric] for metric in (*samples[OWN], "steps_per_second")}
    assert {metric: (value, repeats) for metric, (value, _, repeats) in ratios.items()} == {
        "start": (0.25, 1),
        "step": (pytest.approx(0.2), 3),
        "steps_per_second": (pytest.approx(5.0), 3),
        "memory": (0.5, 3),
        "start_together": (0.2, 2),
        "memory_together": (0.25, 2),
    }
    assert {unit for _, unit, _ in ratios.values()} == {"ratio"}
    assert figures[f"{OWN}-{STOCK}", "pixels"] == (3.0, "of 255", 3)
    assert figures[f"{OWN}-{STOCK}", "robot_state"] == (0.5, "m or rad", 3)


def test_without_libero_there_is_nothing_to_compare_with() -> None:
    samples = {OWN: {"step": [50.0]}, FAST: {"step": [10.0]}}
    distance = {system: {"images": 0.0, "states": 0.0} for system in samples}
    assert {system for system, *_ in summarise(samples, distance)} == {OWN, FAST}


class FakeProcess:
    """In the place of a system's process: takes no time, and sees what is made up for it."""

    alive: set[str]

    def __init__(self, arguments: argparse.Namespace, system: str, directory: Path) -> None:
        self.system, self.directory, self.pid = system, directory, os.getpid()

    def __enter__(self) -> FakeProcess:
        assert self.system not in self.alive, "the one before is still there"
        self.alive.add(self.system)
        return self

    def __exit__(self, *_: object) -> None:
        self.alive.remove(self.system)

    def answer(self) -> dict[str, float]:
        return {"start": 1.0}

    def ask(self, episode: int) -> dict[str, float]:
        assert self.alive == {STOCK, OWN, FAST}
        images, states = np.full((2, 2), 100, np.uint8), np.zeros((2, 8), np.float32)
        if self.system == FAST:
            images[1, 1] -= 7 * (episode == 1)
            states[0, 3] -= 0.25 * (episode == 0)
        np.savez(env.seen_file(self.directory, self.system), images=images, states=states)
        return {"reset": 3.0, "step": 4.0, "memory": 5.0}


def test_starts_and_episodes_are_counted_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeProcess.alive = set()
    monkeypatch.setattr(env, "start", FakeProcess)
    monkeypatch.setattr(env, "start_together", lambda *_: {"start_together": 6.0, "memory_together": 7.0})
    arguments = argparse.Namespace(system=[STOCK, OWN, FAST], starts=2, repeats=3, together=8)
    figures = {(system, metric): (value, n) for system, metric, value, _, n in env.measure(arguments, tmp_path)}
    assert FakeProcess.alive == set()
    for system in arguments.system:
        repeats = {metric: n for (of, metric), (_, n) in figures.items() if of == system}
        assert repeats == {metric: 2 if metric.startswith("start") else 3 for metric in env.UNITS} | {
            "memory_together": 2
        }
    assert figures[f"{OWN}-{STOCK}", "pixels"] == (0, 3)
    assert figures[f"{FAST}-{STOCK}", "pixels"] == (7, 3)
    assert figures[f"{FAST}-{STOCK}", "robot_state"] == (0.25, 3)


def test_forked_workers_share_what_the_template_has_made_and_leave_nothing() -> None:
    before = set(psutil.Process().children())
    with forked_workers({}, 3) as pids:
        template, *actors = map(psutil.Process, pids)
        assert [actor.name() for actor in actors] == ["actor-000", "actor-001", "actor-002"]
        together, alone = sum(map(memory_mb, pids)), template.memory_info().rss / 1e6
        assert 0.5 * alone < together < 2 * alone  # four processes of their own would take nearly 4 times as much
    assert set(psutil.Process().children()) == before
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_an_actor_that_ends_in_its_start_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from dsrl_async.envs.tabletop import TabletopEnvironment\n"
        "def broken(*arguments):\n"
        "    raise ValueError('no such scene')\n"
        "TabletopEnvironment.reset = broken\n"
    )
    planted = Planted(tmp_path, {"dsrl_async.run.worker.template": code})
    monkeypatch.setenv("PYTHONPATH", planted.variables["PYTHONPATH"])
    sentence = r"environment process \d ended \(exit code 1\): ValueError: no such scene"
    with pytest.raises(ValueError, match=sentence), forked_workers({}, 2):
        pass
    assert not psutil.Process().children()
