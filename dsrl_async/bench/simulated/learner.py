"""A learner process that takes a given time for an update and learns nothing.

It does the updates that the replay ratio asks for, and publishes weights that never change as often as a run does.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from dsrl_async.bench.simulated.environment import HORIZON, sharpen_timers
from dsrl_async.config.load import read_yaml, validate
from dsrl_async.host.processes import begin_child
from dsrl_async.run.channel import read_secret
from dsrl_async.run.replay_ratio import updates_due
from dsrl_async.run.weights import WeightPublisher, encode
from dsrl_async.sac.flat import layout_hash
from dsrl_async.sac.networks import Actor
from dsrl_async.shm import events
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters, Stop

IDLE_POLL_S = 0.1


def main(argument: str) -> None:
    """`argument` is the job of `run.learner.learner.main` with `update_s`, the seconds of an update."""
    job = begin_child(argument, "learner")
    sharpen_timers()
    config = validate(read_yaml(Path(job["run_dir"]) / "config.yaml"))
    actor = Actor(config.sac, HORIZON, torch.device("cpu"), config.seed)
    layout, flat = layout_hash(actor), actor.flat.detach().numpy()
    counters, publisher = Counters(Arena.attach(job["arena"])), WeightPublisher(read_secret(job["channel_fd"]))
    publisher.publish(encode(0, layout, flat))
    updates, warmup = 0, config.replay.warmup_decisions
    while counters.stop < Stop.EVERYONE:
        counters.learner_heartbeat_ns[0] = time.monotonic_ns()
        publisher.serve_late_joiners()
        events.clear(job["transition_ready_fd"])
        if not updates_due(counters.decisions(), updates, config.replay_ratio, warmup):
            events.wait(job["transition_ready_fd"], timeout_s=IDLE_POLL_S)
            continue
        time.sleep(job["update_s"])
        updates += 1
        counters.learner_updates[0] = updates
        if updates % config.learner.publish_interval == 0:
            publisher.publish(encode(updates, layout, flat))
    publisher.close()


if __name__ == "__main__":
    main(sys.argv[1])
