"""A run in one process and in a fixed order: the same components, bit-for-bit reproducible by seed.

Meant for the debugger and for tests. Each round all waiting requests are answered, then every lane executes its
action chunk, then the learner does the updates that the replay ratio asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsrl_async.config.settings import Config
from dsrl_async.host.machine import cpu_threads
from dsrl_async.host.stages import stages_of
from dsrl_async.run import checkpoints
from dsrl_async.run.inference.policies import Policies, load_policies
from dsrl_async.run.inference.server import InferenceServer
from dsrl_async.run.learner.learner import Diverged, Learner
from dsrl_async.run.supervisor import ending
from dsrl_async.run.supervisor.session import Session
from dsrl_async.run.supervisor.workers import evaluation_job
from dsrl_async.run.weights import decode
from dsrl_async.run.worker.worker import Lane, prepare_evaluation
from dsrl_async.sac.flat import layout_hash
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.assignments import Assignments


def run_serial(session: Session) -> dict[str, Any]:
    """Run on the CPU until a limit or a signal; ends with a checkpoint and returns the summary."""
    run, config, arena = session.run, session.config, session.arena
    torch.set_num_threads(cpu_threads(config.learner.threads))
    device = torch.device("cpu")
    stage = stages_of(arena, "inference", device)
    with session.wait("loading the policy"):
        policies = load_policies(config, run.spec, device, run.policy, session.counters, stage)
    with session.wait("making the agent"):
        server, learner = join(config, arena, policies, run.horizon, device, session.run_dir, lambda lanes: None)
    env_config, of_agent = config.env.model_dump(), (config.sac.step_discount, config.sac.cameras)
    with session.wait("making the environments") as say:
        lanes = [Lane(number, 1, config.seed, env_config, arena, None, *of_agent) for number in range(config.actors)]
        for lane in lanes:
            say(f"first resets, {lane.number} of {len(lanes)} done")
            lane.start()
        evaluation = EvaluationLanes(session)
    try:
        while (reason := session.reason_to_stop()) is None:
            session.evaluate(lambda lane: None)
            learner.snapshot_when_asked()
            server.take_up_evaluation()
            answer_all(server)
            for lane in lanes:
                if lane.ready():
                    lane.advance()
            evaluation.advance()
            while learner.due() and learner.update():
                pass
            session.answer_warnings()
            learner.save_when_due()
            if session.tick_due():
                session.tick({})
    except Diverged as error:
        reason = ending.failure(f"{error}; {checkpoints.what_is_left(session.run_dir)}")
    else:
        reason = end_learning(session, learner, reason)
    for lane in [*lanes, *evaluation.lanes]:
        lane.env.close()
    return session.finish(reason, {})


def answer_all(server: InferenceServer) -> None:
    """Answer all requests of the training, and then those of the evaluation: the training's batches are the same with
    and without it, to the last bit."""
    for of_training in (True, False):
        while len(ready := server.slots.ready()):
            if not server.serve_ready(ready[(ready < server.training_lanes) == of_training]):
                break


class EvaluationLanes:
    """The lanes of the evaluation, which in a run play in processes of their own."""

    def __init__(self, session: Session) -> None:
        config, arena = session.config, session.arena
        env_config, of_agent = config.env.model_dump(), (config.sac.step_discount, config.sac.cameras)
        numbers = range(config.actors, config.lanes)
        self.lanes = [Lane(number, 1, config.seed, env_config, arena, None, *of_agent) for number in numbers]
        job = evaluation_job(session)
        if job is None:
            return
        self._assignments = Assignments(arena, self.lanes[0].counters)
        for lane in self.lanes:
            lane.finished = True
            prepare_evaluation(lane, self._assignments, job)

    def advance(self) -> None:
        """Let each lane begin the episode that it is given, or execute the action chunk that is there."""
        for lane in self.lanes:
            if not lane.finished:
                if lane.ready():
                    lane.advance()
            elif (episode := self._assignments.next(lane.row)) is not None:
                lane.evaluation, lane.finished = iter([episode]), False
                lane.start()


def end_learning(session: Session, learner: Learner, reason: str) -> str:
    """Write the last checkpoint; returns `reason`, or why there is none."""
    why = session.missing_directory()
    try:
        if why is None:
            learner.last_checkpoint()
    except (Diverged, OSError) as error:
        why = str(error)
    return reason if why is None else ending.without_checkpoint(reason, why, checkpoints.what_is_left(session.run_dir))


def join(
    config: Config,
    arena: Arena,
    policies: Policies,
    horizon: int,
    learner_device: torch.device,
    run_dir: Path,
    notify: Callable[[np.ndarray], None],
) -> tuple[InferenceServer, Learner]:
    """Both in this process: what the learner publishes the server takes in at once."""
    server = InferenceServer(config, arena, policies, notify, run_dir=run_dir)
    layout, size = layout_hash(policies.actor), policies.actor.flat.numel()

    def publish(frame: bytes) -> None:
        server.load_weights(decode(frame, layout, size))

    return server, Learner(
        config, arena, horizon, learner_device, run_dir, publish, policies.frozen, policies.instructions
    )
