"""The inference process: batches observations that are ready, chooses noise, samples action chunks.

`InferenceServer` does the work; `main` runs it in a process of its own, serial mode and evaluation call it directly.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import zmq
from safetensors import safe_open

from dsrl_async.config.load import read_yaml, validate
from dsrl_async.config.settings import Config
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.host.device import resolve_device
from dsrl_async.host.processes import begin_child
from dsrl_async.host.stages import ranges_of, stages_of
from dsrl_async.policies.find import policy_record
from dsrl_async.run.channel import Channel, read_secret
from dsrl_async.run.evaluation.files import snapshot_agent
from dsrl_async.run.inference.batching import batch_wait_s, choose_batch
from dsrl_async.run.inference.copies import Copies, prepare_uploads
from dsrl_async.run.inference.policies import Policies, load_policies
from dsrl_async.run.replay_ratio import decisions_allowed
from dsrl_async.run.weights import Weights, WeightSubscriber
from dsrl_async.sac.flat import layout_hash
from dsrl_async.shm import events
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters, NoiseMode, Stop
from dsrl_async.shm.slots import Slots
from dsrl_async.shm.spans import phases_of

logger = logging.getLogger(__name__)

THROTTLED_POLL_S = 0.005  # how often the learner's progress is looked at while the workers wait for it
IDLE_POLL_S = 1.0

WARM_UP_MODES = {"gaussian": NoiseMode.WARM_UP, "actor": NoiseMode.STOCHASTIC, "base": NoiseMode.BASE}
"""`Config.warmup` -> how its noise is chosen."""


class InferenceServer:
    """Answers requests in the slots.

    Args:
        config: the run's settings.
        arena: the run's shared memory.
        policies: for every size of `Config.batch_sizes`.
        notify: called with the lanes that were answered.
        mode: how the noise of every row is chosen; None is for training, which warms up, samples, and keeps the replay
            ratio.
        run_dir: where the snapshots of a run's evaluations are.
    """

    def __init__(
        self,
        config: Config,
        arena: Arena,
        policies: Policies,
        notify: Callable[[np.ndarray], None],
        mode: NoiseMode | None = None,
        run_dir: Path | None = None,
    ) -> None:
        self.config, self.policies, self.mode, self._notify = config, policies, mode, notify
        self.run_dir = run_dir
        self.slots, self.counters = Slots(arena), Counters(arena)
        self.phase = phases_of(arena, "inference", ranges=ranges_of(policies.device))
        way = prepare_uploads(arena, policies.device)
        self.counters.inference_uploads[0] = way.uploads
        self.copies = Copies(arena, policies, way)
        self.sizes = config.batch_sizes()
        self.policy_version = -1  # no weights received yet
        self.training_lanes = config.actors
        self._evaluation = 0  # the value of `control_evaluation` that was seen last
        self.evaluation_mode: NoiseMode | None = None  # None while there is no evaluation to answer rows of

    def load_weights(self, weights: Weights) -> None:
        """Copy actor weights in place; everything that was captured stays valid."""
        with self.phase("weights"):
            # A copy first: the vector is a read-only view of a network frame.
            self.policies.actor.load_flat_(torch.from_numpy(np.array(weights.flat)))
            self.policy_version = weights.policy_version
            self.counters.inference_policy_version[0] = weights.policy_version

    def take_up_evaluation(self) -> None:
        """If the supervisor has begun another evaluation, answer its rows from now on, with its snapshot's weights.

        They are copied in place, as `load_weights` does.
        """
        counters = self.counters
        if (begun := counters.begun_evaluation(self._evaluation)) is None:
            return
        self.evaluation_mode = None
        self._evaluation, decisions, mode = begun
        assert self.run_dir is not None
        agent = snapshot_agent(self.run_dir, decisions)
        try:
            if mode != NoiseMode.BASE:
                assert self.policies.snapshot is not None
                with self.phase("weights"), safe_open(agent, framework="pt") as file:
                    self.policies.snapshot.load_flat_(file.get_tensor("actor.flat"))
        except Exception as error:  # whatever safetensors may say
            logger.error("there can be no evaluation: %s cannot be used: %s", agent, error)
            counters.inference_evaluation[0] = -self._evaluation
            return
        self.evaluation_mode = mode
        counters.inference_evaluation[0] = self._evaluation

    def handed_out(self) -> int:
        """Decisions of the training that are completed or being executed."""
        slots, lanes = self.slots, slice(self.training_lanes)
        executing = (slots.request_id[lanes] == slots.response_id[lanes]) & (slots.request_id[lanes] != 0)
        return self.counters.decisions() + int(np.count_nonzero(executing))

    def warmup(self) -> int:
        """Decisions of the warm-up; of a group its share, as the learner's machine deals it out."""
        counters = self.counters
        return int(counters.control_warmup[0]) if counters.control_granted[0] else self.config.replay.warmup_decisions

    def allowed(self, wanted: int, handed_out: int) -> int:
        """How many of `wanted` requests of the training may be answered now, so that it does not outrun the learner.

        Where they must wait, all of them do until all may go on: one full batch costs less than its rows one by one.
        The learner can always get far enough for that, see `decisions_allowed`.
        """
        config = self.config
        wanted = min(wanted, self.sizes[-1])
        if self.mode is not None:
            return wanted
        granted, warmup = int(self.counters.control_granted[0]), self.warmup()
        if granted and handed_out + wanted > granted:  # of a group: the learner's machine keeps the ratio
            return 0
        if config.max_decisions is not None:
            wanted = min(wanted, config.max_decisions - handed_out)
        if handed_out < warmup and config.warmup != "actor":
            return min(wanted, warmup - handed_out)
        if self.policy_version < 0:
            return 0
        if handed_out < warmup:
            return min(wanted, warmup - handed_out)
        if (
            granted or handed_out < self.counters.control_warmup_end[0]
        ):  # the agent acts, until there is something to learn from
            return wanted
        limit = decisions_allowed(
            int(self.counters.learner_updates[0]),
            config.replay_ratio,
            warmup + int(self.counters.control_passed_decisions[0]),
            config.replay_ratio_tolerance,
            config.actors,
        )
        return wanted if not config.throttle_actors or handed_out + wanted <= limit else 0

    def serve_ready(self, ready: np.ndarray) -> int:
        """Answer as many of the `ready` lanes as make a good batch and may be answered; returns how many that was.

        Those of an evaluation always may: the replay ratio and the limits are none of theirs.
        """
        mode = self.mode
        if mode is not None:
            of_training, evaluating = np.ones(len(ready), bool), None
        else:
            of_training, evaluating = ready < self.training_lanes, self.evaluation_mode
        wanted = int(np.count_nonzero(of_training))
        handed_out = self.handed_out() if mode is None else 0
        taken = of_training & (of_training.cumsum() <= self.allowed(wanted, handed_out))
        if evaluating is not None:
            taken |= ~of_training
        lanes = ready[taken]
        if len(lanes) == 0:
            return 0
        if mode is None:  # `allowed` ends a batch where the warm-up ends
            warming_up = handed_out < self.warmup()
            mode = WARM_UP_MODES[self.config.warmup] if warming_up else NoiseMode.STOCHASTIC
        count, size = choose_batch(len(lanes), self.sizes)
        modes = np.where(of_training[taken], mode, mode if evaluating is None else evaluating).astype(np.uint8)
        self._serve(lanes[:count], size, modes[:count])
        return count

    def _serve(self, lanes: np.ndarray, size: int, modes: np.ndarray) -> None:
        """Answer `lanes` with a batch of `size` rows, whose noise is chosen by the `modes`, uint8 [n]."""
        count = len(lanes)
        slots, policies = self.slots, self.policies
        with self.phase("gather"):
            numbers = slots.numbers(lanes)
            task_index = slots.task_index[lanes]
            length = int(policies.prompt_lengths[task_index].max())
            policy = policies.steered_batches[size, length]
            waited_ns = time.monotonic_ns() - slots.request_ns[lanes]
            with policies.stage("host_to_device"):
                self.copies.up((size, length), lanes)
            policy.fill_prompts(task_index)
            policy.fill_modes(modes)
        with self.phase("compute"):
            policy.run()
            outputs = self.copies.down(policy.outputs[:count], policies.stage)
            noise, actions = np.split(outputs, [slots.noise.shape[1]], axis=1)
            action_chunk, normalised = actions.reshape(count, -1, slots.action_chunk.shape[2]), None
            if slots.normalised_chunk is not None:
                action_chunk, normalised = np.split(action_chunk, 2, axis=1)
        with self.phase("scatter"):
            version = max(self.policy_version, 0)
            answered = slots.answer(lanes, numbers, action_chunk, noise, version, normalised)
            self._notify(answered)
        counters = self.counters
        counters.inference_batches[0] += 1
        counters.inference_rows[0] += count
        counters.inference_padded_rows[0] += size
        counters.inference_queue_wait_s[0] += waited_ns.sum() * 1e-9


def main(argument: str) -> None:
    """Run the inference process; `argument` is the JSON that `supervisor.Supervisor` wrote."""
    job = begin_child(argument, "inference")
    torch.set_num_threads(job["threads"])
    config = validate(read_yaml(Path(job["run_dir"]) / "config.yaml"))
    arena, channel = Arena.attach(job["arena"]), read_secret(job["channel_fd"])
    device = resolve_device(config.device)
    spec = EnvironmentSpec.of_plain(job["spec"])
    stage = stages_of(arena, "inference", device)
    policies = load_policies(config, spec, device, policy_record(config.policy), Counters(arena), stage)
    server = InferenceServer(config, arena, policies, notifier(job["wake_fds"]), run_dir=Path(job["run_dir"]))
    serve(server, channel, job["observation_ready_fd"])


def notifier(wake_fds: Sequence[int]) -> Callable[[np.ndarray], None]:
    """Wakes the processes of the given lanes; `wake_fds` has one for each lane."""

    def notify(lanes: np.ndarray) -> None:
        for lane in lanes.tolist():
            events.notify(wake_fds[lane])

    return notify


def serve(server: InferenceServer, channel: Channel, observation_ready: int) -> None:
    """Answer requests, and take in new weights and evaluations, until the run stops."""
    config = server.config
    actor = server.policies.actor
    subscriber = WeightSubscriber(channel, layout_hash(actor), actor.flat.numel())
    poller = zmq.Poller()
    poller.register(subscriber.socket, zmq.POLLIN)
    poller.register(observation_ready, zmq.POLLIN)
    counters = server.counters
    patience_s = batch_wait_s(config.inference.batch_wait_ms, server.policies.device.type == "cpu")
    deadline = None  # until when to wait for a fuller batch
    while counters.stop < Stop.EVERYONE:
        counters.inference_heartbeat_ns[0] = time.monotonic_ns()
        if (weights := subscriber.newest(int(counters.learner_updates[0]))) is not None:
            server.load_weights(weights)
        server.take_up_evaluation()
        events.clear(observation_ready)
        ready = server.slots.ready()
        if len(ready) == 0:
            deadline = None
            wait(server, poller, "wait_request", IDLE_POLL_S)
            continue
        now = time.monotonic()
        deadline = deadline or now + patience_s
        enough = config.actors if server.evaluation_mode is None else config.lanes
        if len(ready) < min(server.sizes[-1], enough) and now < deadline:
            wait(server, poller, "wait_batch", deadline - now)
        elif server.serve_ready(ready):
            deadline = None
        else:
            wait(server, poller, "wait_learner", THROTTLED_POLL_S)
    subscriber.close()


def wait(server: InferenceServer, poller: zmq.Poller, phase: str, seconds: float) -> None:
    with server.phase(phase):
        poller.poll(max(1, round(seconds * 1000)))


if __name__ == "__main__":
    main(sys.argv[1])
