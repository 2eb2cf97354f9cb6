"""A run's evaluations without processes: a test is the learner, the inference process and the workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from safetensors.numpy import save

from dsrl_async.config.load import validate
from dsrl_async.run import checkpoints, preflight
from dsrl_async.run.evaluation.files import snapshot_of
from dsrl_async.run.preflight import CheckedRun
from dsrl_async.run.supervisor.evaluation import Evaluations, Finished
from dsrl_async.shm.assignments import Assignments
from dsrl_async.shm.counters import EVALUATION_LANES, Counters
from dsrl_async.shm.memory import create_memory

AGENT = save({})


class PlayedRun:
    """A launch of a run with evaluation. `succeeds` says of an episode's number whether it succeeds."""

    def __init__(self, run_dir: Path, decisions: int = 0, updates: int = 0, **evaluation: object) -> None:
        config = validate({"actors": 2, "evaluation": {"every_decisions": 100, "episodes": 3, **evaluation}})
        self.run: CheckedRun = dataclasses.replace(preflight.check_run(config))
        self.run_dir, self.arena = run_dir, create_memory(config, self.run.spec, 10)
        self.counters, self.lanes = Counters(self.arena), Counters(self.arena, EVALUATION_LANES)
        self.assignments = Assignments(self.arena, self.lanes)
        self.woken: list[int] = []
        self.wall_s = 0.0
        self.at(decisions, updates)
        self.evaluations = Evaluations(self.run, run_dir, self.arena)

    def at(self, decisions: int, updates: int | None = None) -> None:
        """Let the training be so far: 5 env steps a decision, and an update a decision."""
        self.counters.actor_decisions[0] = decisions
        self.counters.actor_env_steps[0] = 5 * decisions
        self.counters.learner_updates[0] = decisions if updates is None else updates

    def step(self) -> Finished | None:
        return self.evaluations.step(self.wall_s, self.woken.append)

    def learn(self) -> None:
        """Write the snapshot that is asked for."""
        if (asked := self.counters.asked_snapshot(int(self.counters.learner_snapshots[0]))) is not None:
            place = snapshot_of(self.run_dir, asked[1])
            checkpoints.save_agent(place, AGENT, self.counters, lambda: None)
            self.counters.answer_snapshot(asked[0])

    def infer(self) -> None:
        self.counters.inference_evaluation[0] = self.counters.control_evaluation[0]

    def end_episodes(self, succeeds: Callable[[int], bool]) -> list[int]:
        """End the episode of every lane that plays one; returns their numbers."""
        ended = []
        for row in range(len(self.lanes.actor_episodes)):
            if (number := self.assignments.next(row)) is not None:
                success = succeeds(number)
                self.lanes.end_episode(row, -3.0 if success else -10.0, 15 if success else 50, success)
                ended.append(number)
        return ended

    def finish(self, succeeds: Callable[[int], bool] = lambda number: False) -> Finished:
        """Go on until an evaluation is finished."""
        for _ in range(50):
            if (finished := self.step()) is not None:
                return finished
            self.learn()
            self.infer()
            self.end_episodes(succeeds)
        raise AssertionError("no evaluation ends")
