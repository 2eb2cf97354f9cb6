"""The learner process: samples the replay ring, updates the SAC agent, broadcasts actor weights, writes checkpoints.

`Learner` does the work; `main` runs it in a process of its own, and serial mode calls it directly.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from dsrl_async.config.load import read_yaml, validate
from dsrl_async.config.settings import Config
from dsrl_async.host.device import resolve_device
from dsrl_async.host.files import replacing
from dsrl_async.host.graphs import graphs_of
from dsrl_async.host.processes import begin_child
from dsrl_async.host.stages import ranges_of, stages_of
from dsrl_async.run import checkpoints
from dsrl_async.run.channel import read_secret
from dsrl_async.run.learner.sampling import source_for
from dsrl_async.run.learner.updates import Updates
from dsrl_async.run.replay_ratio import updates_due
from dsrl_async.run.weights import WeightPublisher, encode, plausible
from dsrl_async.sac.agent import SacAgent
from dsrl_async.sac.flat import layout_hash
from dsrl_async.shm import events
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters, Stop
from dsrl_async.shm.replay import ReplayRing
from dsrl_async.shm.spans import phases_of

logger = logging.getLogger(__name__)

IDLE_POLL_S = 0.2
RECOVERY_INTERVAL_S = 20.0  # a learner that dies costs at most so much learning
METRICS_INTERVAL_S = 1.0  # reading the metrics waits for the device, so it is done seldom


class Learner:
    """The agent and its bookkeeping. `publish` hands a frame of actor weights (see `weights`) onwards."""

    def __init__(
        self,
        config: Config,
        arena: Arena,
        horizon: int,
        device: torch.device,
        run_dir: Path,
        publish: Callable[[bytes], None],
    ) -> None:
        self.config, self.run_dir, self._publish = config, run_dir, publish
        self.ring, self.counters = ReplayRing(arena), Counters(arena)
        self.phase = phases_of(arena, "learner", ranges=ranges_of(device))
        self.stage = stages_of(arena, "learner", device)
        self.agent = make_agent(config, horizon, device)
        self.updates = Updates(self.agent, source_for(self.ring, device), config.sac.batch_size)
        self._metrics_read = -math.inf
        self._checkpoint_time = self._recovery_time = time.monotonic()
        self._saves = int(self.counters.learner_saves[0])
        self._restore()
        with graphs_of(config.learner.graphs, device, self.counters.learner_graphs) as graphs:
            if graphs:
                self.updates.capture()
        self.publish()

    def _restore(self) -> None:
        """Take up the agent of the run: what a learner that died in this launch left, else the last checkpoint's."""
        recovery, checkpoint = checkpoints.recovery_path(self.run_dir), checkpoints.find(self.run_dir)
        if recovery.is_file():
            load_agent(self.agent, recovery)
        elif checkpoint is not None:
            load_agent(self.agent, checkpoint / checkpoints.AGENT)
        # The count of updates goes on, so that the replay ratio asks for no burst; what is gone is told.
        lost = int(self.counters.learner_updates[0]) - self.agent.updates
        self.counters.learner_lost_updates[0] = lost
        if lost:
            logger.warning("%d updates were lost with the learner that did them", lost)

    def due(self) -> int:
        """Gradient updates that the replay ratio asks for now."""
        config = self.config
        return updates_due(
            self.counters.decisions(),
            int(self.counters.learner_updates[0]),
            config.replay_ratio,
            config.replay.warmup_decisions,
        )

    def launch_size(self) -> int:
        """How many updates to enqueue at once: on a GPU those that are due, up to the next publication."""
        if self.updates.captured is None:
            return 1
        interval = self.config.learner.publish_interval
        return min(self.due(), interval - int(self.counters.learner_updates[0]) % interval)

    def update(self, count: int = 1) -> bool:
        """Do `count` gradient updates; False if the replay buffer could not fill a batch.

        Nothing waits for the device but a publication and, now and then, the reading of the metrics.
        """
        for number in range(count):
            with self.phase("sample"):
                drawn = (number or self.updates.refresh()) and self.updates.draw_batch()
            if not drawn:
                return False
            with self.phase("update"), self.stage("update"):
                self.updates.run()
            self.counters.learner_updates[0] += 1
        updates = int(self.counters.learner_updates[0])
        if updates % self.config.learner.publish_interval == 0:
            self.publish()
        now = time.monotonic()
        if now - self._metrics_read >= METRICS_INTERVAL_S:
            self._metrics_read = now
            metrics = self.updates.metrics
            self.counters.note_metrics(metrics.cpu().numpy(), updates)
        return True

    def publish(self) -> None:
        """Hand the actor's weights to the inference process, if they are finite; their version is the number of updates
        done."""
        with self.phase("publish"):
            version = int(self.counters.learner_updates[0])
            flat = self.agent.actor.flat.detach().cpu().numpy()
            if not plausible(flat):
                logger.warning("the actor's weights after update %d are not finite: they are not published", version)
                return
            self._publish(encode(version, layout_hash(self.agent.actor), flat))

    def save_when_due(self) -> None:
        """Write a checkpoint, or the smaller recovery file, when its time has come or somebody asks for it.

        A write that fails (a full disk) is counted and tried again later: it must not cost what has been learned.
        """
        now, saves = time.monotonic(), int(self.counters.control_saves[0])
        try:
            if now - self._checkpoint_time >= self.config.checkpoint.interval_minutes * 60 or saves > self._saves:
                self._checkpoint_time, self._saves = now, saves
                self.checkpoint()
                self.counters.learner_saves[0] = saves
            elif now - self._recovery_time >= RECOVERY_INTERVAL_S:
                self._recovery_time = now
                with self.phase("checkpoint"), replacing(checkpoints.recovery_path(self.run_dir)) as temporary:
                    temporary.write_bytes(self._agent_bytes())
        except OSError as error:
            self.counters.learner_failed_checkpoints[0] += 1
            logger.warning("could not write a checkpoint: %s", error)

    def checkpoint(self) -> Path:
        """Write a checkpoint of the agent, the counters and the replay buffer."""
        with self.phase("checkpoint"):
            return checkpoints.save(
                self.run_dir,
                self._agent_bytes(),
                self.counters,
                self.ring,
                self.config.checkpoint.keep,
                self.beat,
            )

    def _agent_bytes(self) -> bytes:
        """The contents of the agent's safetensors file."""
        return to_bytes(self.agent.state_tensors())

    def beat(self) -> None:
        self.counters.learner_heartbeat_ns[0] = time.monotonic_ns()


def learner_device(config: Config) -> torch.device:
    """Return the learner's device, with `learner.precision` set for this process."""
    return resolve_device(config.learner.device or config.device, tf32=config.learner.precision == "tf32")


def make_agent(config: Config, horizon: int, device: torch.device) -> SacAgent:
    """Make the agent of a run, with its initial weights."""
    products = torch.bfloat16 if config.learner.precision == "bf16" else torch.float32
    return SacAgent(config.sac, horizon, device, config.seed, products)


def load_agent(agent: SacAgent, path: Path) -> None:
    """Load an agent's safetensors file; raises ValueError with one sentence if it is damaged or does not fit."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    agent.load_state_tensors(tensors)


def main(argument: str) -> None:
    """Run the learner as a process; `argument` is the JSON that `supervisor.Supervisor` wrote."""
    job = begin_child(argument)
    torch.set_num_threads(job["threads"])
    run_dir = Path(job["run_dir"])
    config = validate(read_yaml(run_dir / "config.yaml"))
    publisher = WeightPublisher(read_secret(job["channel_fd"]))
    arena = Arena.attach(job["arena"])
    # Where NVIDIA's MPS lets the processes share a GPU, what the robots wait for goes first (docs/learner.md).
    os.environ.setdefault("CUDA_MPS_CLIENT_PRIORITY", "1")
    device = learner_device(config)
    learner = Learner(config, arena, job["horizon"], device, run_dir, publisher.publish)
    learn(learner, publisher, job["transition_ready_fd"])
    learner.checkpoint()
    publisher.close()


def learn(learner: Learner, publisher: WeightPublisher, transition_ready: int) -> None:
    """Do the updates that are due, and wait for decisions, until the run stops."""
    config, counters = learner.config, learner.counters
    while counters.stop < Stop.EVERYONE:
        learner.beat()
        publisher.serve_late_joiners()
        learner.save_when_due()
        events.clear(transition_ready)
        if learner.due() and learner.update(learner.launch_size()):
            continue
        warming_up = counters.decisions() < config.replay.warmup_decisions
        with learner.phase("wait_data" if warming_up else "wait_ratio"):
            events.wait(transition_ready, timeout_s=IDLE_POLL_S)


if __name__ == "__main__":
    main(sys.argv[1])
