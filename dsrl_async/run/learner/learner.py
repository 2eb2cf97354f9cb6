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
from typing import NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from dsrl_async.config.load import read_yaml, validate
from dsrl_async.config.settings import Config
from dsrl_async.host.device import resolve_device
from dsrl_async.host.graphs import graphs_of
from dsrl_async.host.processes import FATAL, begin_child
from dsrl_async.host.stages import ranges_of, stages_of
from dsrl_async.policies import FrozenPolicy
from dsrl_async.policies.find import policy_record
from dsrl_async.run import checkpoints
from dsrl_async.run.channel import read_secret
from dsrl_async.run.evaluation.files import snapshot_of
from dsrl_async.run.instructions import Instructions, instructions_of
from dsrl_async.run.learner.na import make_na_updates
from dsrl_async.run.learner.sampling import Demonstrated, source_for
from dsrl_async.run.learner.updates import Updates
from dsrl_async.run.replay_ratio import updates_due
from dsrl_async.run.weights import WeightPublisher, encode
from dsrl_async.sac import METRIC_NAMES
from dsrl_async.sac.agent import SacAgent
from dsrl_async.sac.flat import layout_hash
from dsrl_async.shm import events
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters, Start, Stop
from dsrl_async.shm.replay import DEMONSTRATIONS, ReplayRing
from dsrl_async.shm.spans import phases_of

logger = logging.getLogger(__name__)

IDLE_POLL_S = 0.2
RECOVERY_INTERVAL_S = 20.0  # a learner that dies costs at most so much learning
METRICS_INTERVAL_S = 1.0  # reading the metrics waits for the device, so it is done seldom
CRITIC_LOSS, ACTOR_LOSS = (METRIC_NAMES.index(f"train/sac/{network}_loss") for network in ("critic", "actor"))

NETWORKS = {
    "critic": ("critic", "sac.critic_lr"),
    "noise_critic": ("noise critic", "sac.critic_lr"),
    "actor": ("actor", "sac.actor_lr"),
    "alpha": ("temperature", "sac.alpha_lr"),
    "target_critic": ("target critic", "sac.critic_lr"),
}
"""How the agent's tensors begin -> the network's name, and its learning rate; those that diverge first come first."""


class Diverged(RuntimeError):
    """The agent holds numbers that are not plausible, or is about to: it must not be saved, and learns no more."""


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
        policy: FrozenPolicy | None = None,
        instructions: Instructions | None = None,
    ) -> None:
        """`policy` is the frozen policy on the learner's device, which DSRL-NA needs; `instructions` what the agent is
        told of its tasks, if anything."""
        self.config, self.run_dir, self._publish = config, run_dir, publish
        self._instructions = instructions
        self.ring, self.counters = ReplayRing(arena), Counters(arena)
        self.phase = phases_of(arena, "learner", ranges=ranges_of(device))
        self.stage = stages_of(arena, "learner", device)
        self.counters.note_start(Start.LOADING, self.counters.learner_start)
        source, demonstrated = source_for(self.ring, device), None
        table = None if instructions is None else torch.from_numpy(instructions.table).to(device)
        if f"{DEMONSTRATIONS}head" in arena.fields:
            shown, size = ReplayRing(arena, DEMONSTRATIONS), config.sac.batch_size
            demonstrated = Demonstrated(shown, device, config.replay.demonstration_share, size, table)
        if config.sac.algorithm == "na":
            assert policy is not None
            products = products_of(config)
            self.updates: Updates = make_na_updates(config, policy, device, source, products, table, demonstrated)
        else:
            agent = make_agent(config, horizon, device)
            self.updates = Updates(agent, source, config.sac.batch_size, table, demonstrated)
        self.agent = self.updates.agent
        self._metrics_read = -math.inf
        self._sound_updates = 0  # at the last look at the agent, which was sound
        self._checkpoint_time = self._recovery_time = time.monotonic()
        self._saves = int(self.counters.learner_saves[0])
        self._snapshots = int(self.counters.learner_snapshots[0])  # one that a predecessor was asked for is due
        self._restore()
        if demonstrated is not None and config.sac.imitation_updates and checkpoints.latest(run_dir) is None:
            loss = self.updates.imitate(config.sac.imitation_updates)
            logger.info("%d updates of imitation: -log pi is %.3g", config.sac.imitation_updates, loss)
        if config.learner.compile:
            self.counters.note_start(Start.PREPARING, self.counters.learner_start)
            self.updates.compile()
        with graphs_of(config.learner.graphs, device, self.counters.learner_graphs) as graphs:
            if graphs:
                self.counters.note_start(Start.PREPARING, self.counters.learner_start)
                self.updates.capture()
        self.publish()

    def _restore(self) -> None:
        """Take up the agent of the run, as it was when it was saved last."""
        if (saved := checkpoints.latest(self.run_dir)) is not None:
            load_agent(self.agent, checkpoints.agent_file(saved))
        # The count of updates goes on, so that the replay ratio asks for no burst; what is gone is told.
        lost = int(self.counters.learner_updates[0]) - self.agent.updates
        self.counters.learner_lost_updates[0] = lost
        if lost:
            logger.warning("%d updates were lost with the learner that did them", lost)

    def due(self) -> int:
        """Gradient updates that the replay ratio asks for now."""
        config = self.config
        if self.warming_up():
            return 0
        return updates_due(
            self.counters.decisions(),
            int(self.counters.learner_updates[0]),
            config.replay_ratio,
            config.replay.warmup_decisions + int(self.counters.control_passed_decisions[0]),
        )

    def warming_up(self) -> bool:
        """Whether decisions are only gathered, at the beginning or after a resume without the replay buffer."""
        end = max(self.config.replay.warmup_decisions, int(self.counters.control_warmup_end[0]))
        return self.counters.decisions() < end

    def launch_size(self) -> int:
        """How many updates to enqueue at once: on a GPU those that are due, up to the next publication."""
        if self.updates.captured is None:
            return 1
        interval = self.config.learner.publish_interval
        return min(self.due(), interval - int(self.counters.learner_updates[0]) % interval)

    def update(self, count: int = 1) -> bool:
        """Do `count` gradient updates; False if the replay buffer could not fill a batch.

        Nothing waits for the device but a publication and, now and then, the reading of the metrics.

        Raises:
            Diverged: the agent turns out not to be sound.
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
            metrics = self._sound_metrics()
            self.counters.note_metrics(metrics, updates)
        return True

    def publish(self) -> None:
        """Hand the actor's weights to the inference process; their version is the number of updates done.

        Raises:
            Diverged: as `update`; nothing is handed over.
        """
        with self.phase("publish"):
            version = int(self.counters.learner_updates[0])
            self._sound_metrics()
            flat = self.agent.actor.flat.detach().cpu().numpy()
            if not checkpoints.is_sound("actor.flat", flat):
                raise self._diverged()
            self._sound_updates = version
            self._publish(encode(version, layout_hash(self.agent.actor), flat))

    def _sound_metrics(self) -> np.ndarray:
        """The metrics of the last update; raises Diverged if the critic's loss says that the agent is lost."""
        metrics = self.updates.metrics.cpu().numpy()
        if not math.isfinite(metrics[CRITIC_LOSS]):
            raise self._diverged()
        return metrics

    def _diverged(self) -> Diverged:
        """What is wrong with the agent, in one sentence."""
        tensors = self.agent.state_tensors()
        broken = [name for name, tensor in tensors.items() if not checkpoints.is_sound(name, tensor.numpy())]
        network = next((name for name in NETWORKS if any(tensor.startswith(name) for tensor in broken)), None)
        what = "the critic's loss" if network is None else f"the agent's {NETWORKS[network][0]}"
        critic_loss, actor_loss = self.updates.metrics[[CRITIC_LOSS, ACTOR_LOSS]].tolist()
        return Diverged(
            f"{what} is not finite, or beyond {checkpoints.LARGEST_VALUE:g}, after update {self.agent.updates} "
            f"(critic loss {critic_loss:.4g}, actor loss {actor_loss:.4g}; after update {self._sound_updates} all was "
            f"well): lower {NETWORKS[network or 'critic'][1]}, or look at the rewards"
        )

    def save_when_due(self) -> None:
        """Write a checkpoint, or the smaller recovery file, when its time has come or somebody asks for it.

        A write that fails (a full disk) is counted and tried again later: it must not cost what has been learned.

        Raises:
            Diverged: the agent is not sound; what was saved before stays.
        """
        now, saves = time.monotonic(), int(self.counters.control_saves[0])
        try:
            if now - self._checkpoint_time >= self.config.checkpoint.interval_minutes * 60 or saves > self._saves:
                self._checkpoint_time, self._saves = now, saves
                self.checkpoint()
                self.counters.learner_saves[0] = saves
            elif now - self._recovery_time >= RECOVERY_INTERVAL_S:
                self._recovery_time = now
                with self.phase("checkpoint"):
                    checkpoints.save_recovery(self.run_dir, self._agent_bytes, self.counters, self.beat)
        except OSError as error:
            self.counters.learner_failed_checkpoints[0] += 1
            logger.warning("could not write a checkpoint: %s", error)

    def snapshot_when_asked(self) -> None:
        """Write the agent as it is now for an evaluation that begins, if there is one.

        If that fails (a full disk), there is none.

        Raises:
            Diverged: as `save_when_due`.
        """
        if (asked := self.counters.asked_snapshot(self._snapshots)) is None:
            return
        self._snapshots, decisions = asked
        try:
            with self.phase("checkpoint"):
                checkpoints.save_agent(
                    snapshot_of(self.run_dir, decisions), self._agent_bytes(), self.counters, self.beat
                )
        except OSError as error:
            logger.warning("could not write the agent for an evaluation: %s", error)
        self.counters.answer_snapshot(self._snapshots)

    def last_checkpoint(self) -> Path:
        """Write the checkpoint that a run ends with: without the replay buffer if the disk is too full for that.

        Raises:
            OSError: not even the agent fits; what was saved before stays.
            Diverged: as `save_when_due`.
        """
        try:
            return self.checkpoint()
        except OSError as error:
            logger.warning("could not write the last checkpoint (%s), trying it without the replay buffer", error)
            return self.checkpoint(replay=False)

    def checkpoint(self, replay: bool = True) -> Path:
        """Write a checkpoint of the agent, the counters and the replay buffer."""
        with self.phase("checkpoint"):
            return checkpoints.save(
                self.run_dir,
                self._agent_bytes(),
                self.counters,
                self.ring,
                self.config.checkpoint.keep,
                self.beat,
                replay,
            )

    def _agent_bytes(self, metadata: dict[str, str] | None = None) -> bytes:
        """The contents of the agent's safetensors file, with this and what the agent was told in its metadata; raises
        Diverged if anything in it is not finite."""
        tensors = self.agent.state_tensors()
        if not all(checkpoints.is_sound(name, tensor.numpy()) for name, tensor in tensors.items()):
            raise self._diverged()
        self._sound_metrics()
        self._sound_updates = self.agent.updates
        if self._instructions is not None:
            metadata = {**(metadata or {}), **checkpoints.learned_metadata(self._instructions.learned)}
        return to_bytes(tensors, metadata)

    def beat(self) -> None:
        self.counters.learner_heartbeat_ns[0] = time.monotonic_ns()


def learner_device(config: Config) -> torch.device:
    """Return the learner's device, with `learner.precision` set for this process."""
    return resolve_device(config.learner.device or config.device, tf32=config.learner.precision == "tf32")


def make_agent(config: Config, horizon: int, device: torch.device) -> SacAgent:
    """Make the agent of a run of DSRL-SAC, with its initial weights."""
    return SacAgent(config.sac, horizon, device, config.seed, products_of(config))


def products_of(config: Config) -> torch.dtype:
    """What the agent's convolutions and matrix products round their inputs to, see `networks.Actor`."""
    return torch.bfloat16 if config.learner.precision == "bf16" else torch.float32


def load_agent(agent: SacAgent, path: Path) -> None:
    """Load an agent's safetensors file; raises ValueError with one sentence if it is damaged or does not fit."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    agent.load_state_tensors(tensors)


def main(argument: str) -> None:
    """Run the learner as a process; `argument` is the JSON that `supervisor.Supervisor` wrote."""
    job = begin_child(argument, "learner")
    torch.set_num_threads(job["threads"])
    run_dir = Path(job["run_dir"])
    config = validate(read_yaml(run_dir / "config.yaml"))
    publisher = WeightPublisher(read_secret(job["channel_fd"]))
    arena = Arena.attach(job["arena"])
    # Where NVIDIA's MPS lets the processes share a GPU, what the robots wait for goes first (docs/learner.md).
    os.environ.setdefault("CUDA_MPS_CLIENT_PRIORITY", "1")
    device = learner_device(config)
    try:
        policy = instructions = None
        if config.sac.algorithm == "na" or config.sac.instruction_dim:
            counters = Counters(arena)
            counters.note_start(Start.LOADING, counters.learner_start)
            record = policy_record(config.policy)
            instructions = instructions_of(config.sac, record, job["prompts"])
            if config.sac.algorithm == "na":
                policy = record.load(config.policy, device, job["prompts"], lambda: None)
        learner = Learner(config, arena, job["horizon"], device, run_dir, publisher.publish, policy, instructions)
        learn(learner, publisher, job["transition_ready_fd"])
    except Diverged as error:
        end_for_good(error)
    try:
        learner.last_checkpoint()
    except (Diverged, OSError) as error:
        end_for_good(error)
    publisher.close()


def end_for_good(error: Exception) -> NoReturn:
    """End this process as one whose successor would fail likewise."""
    print(error, file=sys.stderr)
    sys.exit(FATAL)


def learn(learner: Learner, publisher: WeightPublisher, transition_ready: int) -> None:
    """Do the updates that are due, and wait for decisions, until the run stops."""
    counters = learner.counters
    while counters.stop < Stop.EVERYONE:
        learner.beat()
        publisher.serve_late_joiners()
        learner.save_when_due()
        learner.snapshot_when_asked()
        events.clear(transition_ready)
        if learner.due() and learner.update(learner.launch_size()):
            continue
        with learner.phase("wait_data" if learner.warming_up() else "wait_ratio"):
            events.wait(transition_ready, timeout_s=IDLE_POLL_S)


if __name__ == "__main__":
    main(sys.argv[1])
