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
from dsrl_async.run.weights import decode
from dsrl_async.run.worker.worker import Lane
from dsrl_async.sac.flat import layout_hash
from dsrl_async.shm.arena import Arena


def run_serial(session: Session) -> dict[str, Any]:
    """Run on the CPU until a limit or a signal; ends with a checkpoint and returns the summary."""
    run, config, arena = session.run, session.config, session.arena
    torch.set_num_threads(cpu_threads(config.learner.threads))
    device = torch.device("cpu")
    stage = stages_of(arena, "inference", device)
    policies = load_policies(config, run.spec, device, run.policy, session.counters, stage)
    server, learner = join(config, arena, policies, run.horizon, device, session.run_dir, lambda lanes: None)
    env_config, of_agent = config.env.model_dump(), (config.sac.step_discount, config.sac.cameras)
    lanes = [Lane(number, 1, config.seed, env_config, arena, None, *of_agent) for number in range(config.actors)]
    for lane in lanes:
        lane.start()
    try:
        while (reason := session.reason_to_stop()) is None:
            while server.serve_ready(server.slots.ready()):
                pass
            for lane in lanes:
                if lane.ready():
                    lane.advance()
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
    for lane in lanes:
        lane.env.close()
    return session.finish(reason, {})


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
    server = InferenceServer(config, arena, policies, notify)
    layout, size = layout_hash(policies.actor), policies.actor.flat.numel()

    def publish(frame: bytes) -> None:
        server.load_weights(decode(frame, layout, size))

    return server, Learner(config, arena, horizon, learner_device, run_dir, publish)
