"""The inference process: batches observations that are ready, chooses noise, samples action chunks.

`InferenceServer` does the work; `main` runs it in a process of its own, serial mode and evaluation call it directly.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import zmq
from torch import Tensor

from dsrl_async.config import Config, read_yaml, validate
from dsrl_async.device import register_memory, resolve_device
from dsrl_async.envs import EnvironmentSpec, environment_spec
from dsrl_async.pi0.checkpoint import LoadedPolicy, load_policy, resolve_dtype
from dsrl_async.pi0.sampler import language_bucket
from dsrl_async.pi0.tokenizer import longest_prompt
from dsrl_async.processes import prepare_child
from dsrl_async.replay_ratio import decisions_allowed
from dsrl_async.sac.flat import layout_hash
from dsrl_async.sac.networks import Actor
from dsrl_async.shm import events
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import INFERENCE_PHASES, Counters, Phases
from dsrl_async.shm.slots import Slots
from dsrl_async.steering import Mode, SteeredPolicy
from dsrl_async.weights import Weights, WeightSubscriber

logger = logging.getLogger(__name__)

THROTTLED_POLL_S = 0.005  # how often the learner's progress is looked at while the actors wait for it
IDLE_POLL_S = 1.0


class InferenceServer:
    """Answers requests in the slots.

    Args:
        config: of the run.
        arena: its shared memory.
        device: of policy and actor.
        mode: how noise is chosen, see `SteeredPolicy`.
        notify: called with the lanes that were answered.
        policy_directory: checkpoint of the frozen policy.
        training: warm up with Gaussian noise and keep the replay ratio; evaluation does neither.
    """

    def __init__(
        self,
        config: Config,
        arena: Arena,
        device: torch.device,
        mode: Mode,
        notify: Callable[[np.ndarray], None],
        policy_directory: Path,
        training: bool = True,
    ) -> None:
        self.config, self.training, self._notify = config, training, notify
        self.slots, self.counters = Slots(arena), Counters(arena)
        self.phase = Phases(INFERENCE_PHASES, self.counters.inference_phase_s)
        spec: EnvironmentSpec = environment_spec(config.env.model_dump())
        policy = load_policy(
            policy_directory, device, resolve_dtype(config.policy.dtype, device), **config.policy.overrides()
        )
        self.tokens, self.token_mask = (table.to(device) for table in policy.tokenizer(spec.prompts))
        self.language_length = language_lengths(policy, spec.prompts)
        self.frozen, self.prompts = policy, spec.prompts
        self.actor = Actor(config.sac, policy.config.action_horizon, device, config.seed)
        self.policy_version = -1  # no weights received yet
        largest = next((size for size in config.inference.buckets if size >= config.actors), None)
        sizes = [size for size in config.inference.buckets if largest is None or size <= largest]
        self.sizes, self.largest_bucket = sizes, sizes[-1]
        self.policies = {
            (size, length): SteeredPolicy(policy, self.actor, config, size, length, mode)
            for size in reversed(sizes)  # the largest first, so that the others fit into its memory when captured
            for length in sorted(set(self.language_length.tolist()), reverse=True)
        }
        if device.type != "cuda":
            logger.info("no CUDA graphs: the policy runs on %s", device)
        pool = None
        for steered in self.policies.values():
            if config.policy.compile:
                steered.run()  # compiles, now and not while actors wait
            if device.type == "cuda":
                pool = steered.capture(pool)

    def load_weights(self, weights: Weights) -> None:
        """Copy actor weights in place; everything that was captured stays valid."""
        with self.phase("weights"):
            # A copy first: the vector is a read-only view of a network frame.
            self.actor.load_flat_(torch.from_numpy(np.array(weights.flat)))
            self.policy_version = weights.policy_version
            self.counters.inference_policy_version[0] = weights.policy_version

    def handed_out(self) -> int:
        """Decisions completed or being executed."""
        slots = self.slots
        executing = (slots.request_id == slots.response_id) & (slots.request_id != 0)
        return self.counters.decisions() + int(np.count_nonzero(executing))

    def allowed(self, wanted: int) -> int:
        """How many of `wanted` requests may be answered now, so that the actors do not outrun the learner.

        Where they must wait, all of them do until all may go on: a full batch costs little more than a batch of one.
        The learner can always get far enough for that, see `decisions_allowed`.
        """
        config = self.config
        wanted = min(wanted, self.largest_bucket)
        if not self.training:
            return wanted
        warmup = config.replay.warmup_decisions
        handed_out = self.handed_out()
        if config.max_decisions is not None:
            wanted = min(wanted, config.max_decisions - handed_out)
        if handed_out < warmup:
            return min(wanted, warmup - handed_out)
        if self.policy_version < 0:
            return 0
        limit = decisions_allowed(
            int(self.counters.learner_updates[0]),
            config.replay_ratio,
            warmup,
            config.replay_ratio_tolerance,
            config.actors,
        )
        return wanted if not config.throttle_actors or handed_out + wanted <= limit else 0

    def serve_ready(self, ready: np.ndarray) -> int:
        """Answer as many of the `ready` lanes as fit a batch and may be answered; returns how many that was."""
        lanes = ready[: max(0, self.allowed(len(ready)))]
        if len(lanes):
            self._serve(lanes)
        return len(lanes)

    def _serve(self, lanes: np.ndarray) -> None:
        count = len(lanes)
        slots = self.slots
        bucket = next(size for size in self.sizes if size >= count)
        length = int(self.language_length[slots.task_index[lanes]].max())
        steered = self.policies[bucket, length]
        with self.phase("gather"):
            numbers = slots.request_id[lanes]
            waited_ns = time.monotonic_ns() - slots.request_ns[lanes]
            for buffer, rows in (
                (steered.images, slots.images),
                (steered.state, slots.state),
                (steered.sac_image, slots.sac_image),
                (steered.standard_normal, slots.standard_normal),
            ):
                gather(rows, lanes, buffer)
            tokens, token_mask = self._prompts(slots.task_index[lanes], steered.state[:count])
            steered.tokens[:count].copy_(tokens[:, :length])
            steered.token_mask[:count].copy_(token_mask[:, :length])
            # `allowed` ends a batch where the warm-up ends, so that a batch is of one kind
            steered.warmup.fill_(self.training and self.handed_out() < self.config.replay.warmup_decisions)
        with self.phase("compute"):
            steered.run()
            action_chunk = steered.actions[:count].cpu().numpy()
            noise = steered.noise[:count].cpu().numpy()
        with self.phase("scatter"):
            answered = slots.answer(lanes, numbers, action_chunk, noise, max(self.policy_version, 0))
            self._notify(answered)
        counters = self.counters
        counters.inference_batches[0] += 1
        counters.inference_rows[0] += count
        counters.inference_padded_rows[0] += bucket
        counters.inference_queue_wait_s[0] += waited_ns.sum() * 1e-9

    def _prompts(self, task_index: np.ndarray, state: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and validity [B, language slots]: a look-up, except for policies whose prompts hold the state."""
        if self.frozen.config.state_in_prompt:
            normalised = self.frozen.normaliser.state(state)[:, : self.frozen.config.robot_state_dim]
            return self.frozen.tokenizer([self.prompts[task] for task in task_index], normalised)
        rows = torch.from_numpy(task_index).to(self.tokens.device)
        return self.tokens[rows], self.token_mask[rows]


def language_lengths(policy: LoadedPolicy, prompts: Sequence[str]) -> np.ndarray:
    """Language slots that each prompt needs, rounded up so that there are few different lengths: int64 [prompts].

    A run's prompts are known when it starts, so a batch needs no more slots than its longest prompt has tokens.
    """
    config, tokenizer = policy.config, policy.tokenizer
    state_width = config.robot_state_dim if config.state_in_prompt else None
    lengths = [longest_prompt(tokenizer.ids, prompt, tokenizer.length, state_width) for prompt in prompts]
    return np.array([language_bucket(length, tokenizer.length) for length in lengths])


def gather(rows: np.ndarray, lanes: np.ndarray, buffer: Tensor) -> None:
    """Copy rows [N, ...] of `lanes` to the front of `buffer` [B, ...], once and straight from the shared memory.

    On CUDA that is a transfer per row, asynchronous if the memory is registered (`device.register_memory`).
    """
    if buffer.device.type == "cpu":
        np.take(rows, lanes, axis=0, out=buffer[: len(lanes)].numpy())
    else:
        for index, lane in enumerate(lanes):
            buffer[index].copy_(torch.from_numpy(rows[lane]), non_blocking=True)


def main(argument: str) -> None:
    """Run the inference process; `argument` is the JSON that `supervisor.Supervisor` wrote."""
    job = json.loads(argument)
    prepare_child(job["parent"])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    torch.set_num_threads(job["threads"])
    config = validate(read_yaml(Path(job["run_dir"]) / "config.yaml"))
    wake_fds, observation_ready = job["wake_fds"], job["observation_ready_fd"]

    def notify(lanes: np.ndarray) -> None:
        for lane in lanes:
            events.notify(wake_fds[lane])

    arena = Arena.attach(job["arena"])
    device = resolve_device(config.device)
    register_memory(arena, device)
    server = InferenceServer(config, arena, device, "stochastic", notify, Path(job["policy"]))
    subscriber = WeightSubscriber(job["weights_address"], layout_hash(server.actor), server.actor.flat.numel())
    poller = zmq.Poller()
    poller.register(subscriber.socket, zmq.POLLIN)
    poller.register(observation_ready, zmq.POLLIN)
    counters = server.counters
    deadline = None  # until when to wait for a fuller batch
    while counters.control_stop[0] < 2:
        counters.inference_heartbeat_ns[0] = time.monotonic_ns()
        if (weights := subscriber.newest()) is not None:
            server.load_weights(weights)
        events.clear(observation_ready)
        ready = server.slots.ready()
        if len(ready) == 0:
            deadline = None
            wait(server, poller, "wait_request", IDLE_POLL_S)
            continue
        now = time.monotonic()
        deadline = deadline or now + config.inference.batch_wait_ms / 1000
        if len(ready) < min(server.largest_bucket, config.actors) and now < deadline:
            wait(server, poller, "wait_request", deadline - now)
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
