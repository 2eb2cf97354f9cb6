"""The environment worker: it executes action chunks and writes observations and transitions. It imports no torch.

`Lane` is one environment with its slot and its part of the replay ring. `main` runs it in a process of its own, which
is forked from the `template`; serial mode calls `Lane` directly.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsrl_async.envs import Environment, NumberedScenes, environment_record, make_environment
from dsrl_async.envs.rewards import decision_reward, environment_reward
from dsrl_async.shm import events
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.assignments import Assignments
from dsrl_async.shm.counters import ACTOR_PHASES, Phases, Start, Stop, counters_of
from dsrl_async.shm.replay import ReplayRing, Seen
from dsrl_async.shm.slots import Slots
from dsrl_async.shm.spans import phases_of

TRAINING, EVALUATION = 0, 1
"""What an episode is for. It is the first key of the episode's seed, so evaluation never plays a training episode."""


def episode_seed(seed: int, purpose: int, lane: int, episode: int) -> int:
    """Return the number that determines an episode's scene and noise: a hash of the arguments, uint32."""
    return int(np.random.SeedSequence(seed, spawn_key=(purpose, lane, episode)).generate_state(1)[0])


class Lane:
    """One environment with its slot and its part of the replay ring, which steps from decision to decision.

    Lanes behind those of the training are the evaluation's: they have no part of the ring, and count by themselves.

    `start` begins an episode and asks for an action chunk. Once the chunk is there (`ready`), `advance` executes it,
    writes the transition and asks for the next chunk.

    Args:
        number: which slot and which part of the ring are its own.
        incarnation: how many workers this lane has had, this one included.
        seed: the seed of the run or the evaluation.
        env_config: the environment's settings, as `EnvConfig.model_dump()` returns them.
        arena: the shared memory.
        environment: the environment to step; by default one is made from `env_config` and `agent_cameras`.
        step_discount: the discount of a step within a decision, for an environment's own rewards.
        agent_cameras: the numbers of the cameras that the agent sees.

    Attributes:
        of_training: whether its transitions are learned from.
        row: where this lane counts in `counters`.
        evaluation: the numbers of the episodes to play; None in training, where there is always a next one.
        finished: whether all episodes of an evaluation are played.
    """

    def __init__(
        self,
        number: int,
        incarnation: int,
        seed: int,
        env_config: dict[str, Any],
        arena: Arena,
        environment: Environment | None = None,
        step_discount: float = 1.0,
        agent_cameras: Sequence[int] = (0,),
    ) -> None:
        self.number, self.incarnation, self.seed = number, incarnation, seed
        self.evaluation: Iterator[int] | None = None
        self.finished = False
        self.reward_rule = env_config["reward_rule"]
        self.use_step_penalty = env_config["use_step_penalty"]
        self.own_rewards, self.step_discount = env_config["reward"] == "environment", step_discount
        self.arena, self.slots, self.ring = arena, Slots(arena), ReplayRing(arena)
        self.counters, self.row = counters_of(arena, number)
        self.of_training = self.row == number
        if self.of_training:
            self.phase = phases_of(arena, "actor", number)
        else:
            self.phase = Phases(ACTOR_PHASES, self.counters.actor_phase_s[self.row])
        self.env = environment or make_environment(env_config, agent_cameras)
        self.noise_rng = np.random.default_rng(0)
        self.requests = 0
        self.request_number = 0
        self.episode_return = 0.0
        self.episode_len = 0

    def start(self) -> None:
        """Begin an episode and publish its first observation; if none is left to evaluate, set `finished`."""
        lane, row, slots = self.number, self.row, self.slots
        started_episodes = self.counters.actor_started_episodes
        if self.evaluation is None:
            started = int(started_episodes[row])
            episode = started * len(started_episodes) + lane
            seed = episode_seed(self.seed, TRAINING, lane, started)
        else:
            episode = next(self.evaluation, -1)
            if episode < 0:
                self.finished = True
                return
            seed = episode_seed(self.seed, EVALUATION, 0, episode)
        started_episodes[row] += 1
        self.noise_rng = np.random.default_rng(seed)
        self.episode_return, self.episode_len = 0.0, 0
        with self.phase("reset"):
            slots.task_index[lane] = self.env.reset(seed, episode)
        self._observe()
        if self.of_training:
            with self.phase("replay_write"):
                self.ring.begin_episode(lane, slots.sac_image[lane], slots.state[lane], self._seen())
        self._request()

    def ready(self) -> bool:
        """Say whether the action chunk is there."""
        return self.slots.answered(self.number, self.request_number)

    def advance(self) -> None:
        """Execute the action chunk, write what came of it, and publish the next observation."""
        lane, row, slots, counters = self.number, self.row, self.slots, self.counters
        policy_version = int(slots.policy_version[lane])
        with self.phase("physics"):
            outcome = self.env.step_chunk(slots.action_chunk[lane])
        if self.own_rewards:
            reward, terminal = environment_reward(outcome, self.step_discount), outcome.terminated
        else:
            # What fails for good is not terminal here: else its reward of -1, the last one, would beat trying longer.
            reward = decision_reward(outcome, self.reward_rule, self.use_step_penalty)
            terminal = outcome.success
        self._observe()
        if self.of_training:
            with self.phase("replay_write"):
                self.ring.append(
                    lane,
                    noise=slots.noise[lane] if slots.normalised_chunk is None else slots.normalised_chunk[lane],
                    reward=reward,
                    steps=outcome.steps,
                    terminal=terminal,
                    policy_version=policy_version,
                    next_image=slots.sac_image[lane],
                    next_state=slots.state[lane],
                    next_seen=self._seen(),
                )
        self.episode_return += reward
        self.episode_len += outcome.steps
        counters.actor_policy_lag[row] += max(0, int(counters.learner_updates[0]) - policy_version)
        counters.actor_env_steps[row] += outcome.steps
        counters.actor_decisions[row] += 1
        if outcome.terminated or outcome.truncated:
            counters.end_episode(row, self.episode_return, self.episode_len, success=outcome.success)
            self.start()
        else:
            self._request()

    def _observe(self) -> None:
        with self.phase("render"):
            self.env.observe(
                self.slots.images[self.number], self.slots.sac_image[self.number], self.slots.state[self.number]
            )

    def _seen(self) -> Seen | None:
        """What the policy sees of the observation in the slot, if the ring's rows have it."""
        lane, slots = self.number, self.slots
        return Seen(slots.images[lane], int(slots.task_index[lane])) if self.ring.keeps_seen else None

    def _request(self) -> None:
        normal = self.slots.standard_normal[self.number]
        self.noise_rng.standard_normal(out=normal, dtype=np.float32)
        self.requests += 1
        self.request_number = self.slots.request(self.number, self.incarnation, self.requests)


def prepare(job: Mapping[str, Any]) -> Environment | None:
    """Make what every worker needs before its first episode, as far as it survives a fork (see `template`)."""
    record = environment_record(job["env"])  # a user's module is imported, and shared
    if not record.survives_fork:
        return None
    environment = record.make(job["agent_cameras"])
    if (evaluation := job["evaluation"]) is not None and (number := evaluation["begin_with"]) is not None:
        environment.reset(0, number)  # compiles the scene; each episode begins with a reset of its own
    return environment


def main(job: Mapping[str, Any], environment: Environment | None) -> None:
    """Run an environment worker in this process, which the template has forked.

    `job` is what `template.Template` tells its workers, `environment` what `prepare` made, if anything.
    """
    arena, number, wake = Arena.attach(job["arena"]), job["number"], job["wake_fd"]
    # From here on a simulator or an OpenGL driver that hangs while the scene is made is noticed like any other.
    counters, row = counters_of(arena, number)
    counters.actor_heartbeat_ns[row] = time.monotonic_ns()
    counters.note_start(Start.LOADING, counters.actor_start[row])
    of_agent = job["step_discount"], job["agent_cameras"]
    lane = Lane(number, job["incarnation"], job["seed"], job["env"], arena, environment, *of_agent)
    take_part_in_evaluation(lane, job)
    play(lane, wake, job["notify_fds"])


def take_part_in_evaluation(lane: Lane, job: Mapping[str, Any]) -> None:
    """Have a lane play the episodes that it is given, if it is one of those, see `template.Template`."""
    evaluation = job["evaluation"]
    if evaluation is not None and lane.number >= evaluation["from_lane"]:
        assignments = Assignments(lane.arena, lane.counters)
        lane.evaluation = assignments.take(lane.row, job["wake_fd"], job["notify_fds"], job["incarnation"])
        prepare_evaluation(lane, assignments, evaluation)


def prepare_evaluation(lane: Lane, assignments: Assignments, evaluation: Mapping[str, Any]) -> None:
    """Have the environment of a lane play numbered scenes, and film what it is told to; see `template.Template`."""
    if isinstance(lane.env, NumberedScenes):
        lane.env.number_scenes()
    if evaluation["video_dir"] is not None:
        from dsrl_async.envs.recording import RecordingEnvironment

        lane.env = RecordingEnvironment(
            lane.env,
            lambda: bool(assignments.film[lane.row]),
            Path(evaluation["video_dir"]),
            evaluation["rate_hz"],
            evaluation["preview"],
        )


def play(lane: Lane, wake_fd: int, notify_fds: Sequence[int]) -> None:
    """Step the lane until the run stops or nothing is left to evaluate; then close the environment."""
    counters = lane.counters

    def beat() -> None:
        counters.actor_heartbeat_ns[lane.row] = time.monotonic_ns()

    def announce() -> None:
        for fd in notify_fds:
            events.notify(fd)
        beat()

    try:
        counters.note_start(Start.PREPARING, counters.actor_start[lane.row])
        lane.start()
        announce()
        while counters.stop < Stop.WORKERS and not lane.finished:
            if lane.ready():
                lane.advance()
                announce()
            else:
                with lane.phase("wait_action"):
                    events.wait(wake_fd, timeout_s=1.0)
                beat()
    finally:
        lane.env.close()
