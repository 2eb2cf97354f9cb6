"""A worker's decisions: what it executes, writes, counts and asks for."""

from __future__ import annotations

import numpy as np
import pytest

from dsrl_async.config.load import validate
from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.envs import ChunkOutcome, EnvironmentSpec
from dsrl_async.envs.tabletop_spec import TABLETOP
from dsrl_async.run.worker.worker import (
    EVALUATION,
    TRAINING,
    Lane,
    decision_reward,
    environment_reward,
    episode_seed,
)
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.memory import create_memory

HORIZON = 10
CONTINUES = ChunkOutcome(steps=5, success_step=-1, terminated=False, truncated=False)
SUCCEEDS = ChunkOutcome(steps=3, success_step=2, terminated=True, truncated=False)
RUNS_OUT = ChunkOutcome(steps=2, success_step=-1, terminated=False, truncated=True)
FAILS = ChunkOutcome(steps=4, success_step=-1, terminated=True, truncated=False, rewards=(0.0, 1.0, 0.5, -8.0))


class ScriptedEnvironment:
    """Plays given outcomes; its observation tells how many have been played."""

    def __init__(self, outcomes: list[ChunkOutcome]) -> None:
        self.spec: EnvironmentSpec = TABLETOP
        self.outcomes, self.played = outcomes, 0
        self.seeds: list[int] = []
        self.actions: list[np.ndarray] = []

    def reset(self, seed: int, number: int = 0) -> int:
        self.seeds.append(seed)
        return 0

    def step_chunk(self, action_chunk: np.ndarray) -> ChunkOutcome:
        self.actions.append(action_chunk.copy())
        self.played += 1
        return self.outcomes[self.played - 1]

    def observe(self, images: np.ndarray, sac_image: np.ndarray, state: np.ndarray) -> None:
        images[:], sac_image[:], state[:] = self.played, self.played + 100, self.played

    def close(self) -> None:
        pass


def play(
    memory: Arena, config: Config, outcomes: list[ChunkOutcome], incarnation: int = 1
) -> tuple[Lane, ScriptedEnvironment]:
    environment = ScriptedEnvironment(outcomes)
    discount = config.sac.step_discount
    lane = Lane(1, incarnation, 9, config.env.model_dump(), memory, environment, discount)
    lane.start()
    for number in range(len(outcomes)):
        assert not lane.ready()
        waiting = lane.slots.ready()
        assert waiting.tolist() == [1]
        lane.slots.answer(
            waiting,
            lane.slots.request_id[waiting],
            np.full((1, 10, 7), number, np.float32),
            np.full((1, 32), number, np.float32),
            policy_version=number,
            normalised=None if lane.slots.normalised_chunk is None else np.full((1, 10, 7), -number, np.float32),
        )
        assert lane.ready()
        lane.advance()
    return lane, environment


def test_transitions_of_a_success_then_a_truncated_episode(memory: Arena, small_config: Config) -> None:
    lane, environment = play(memory, small_config, [CONTINUES, SUCCEEDS, CONTINUES, RUNS_OUT])
    rows = {name: array[1] for name, array in lane.ring.rows.items()}
    # Rows: two decisions, the closing observation, two decisions, the closing observation, a new first one.
    assert rows["complete"][:7].tolist() == [True, True, False, True, True, False, False]
    decided = [0, 1, 3, 4]
    assert rows["reward"][decided].tolist() == [-1, 0, -1, -1]
    assert rows["steps"][decided].tolist() == [5, 3, 5, 2]
    assert rows["terminal"][decided].tolist() == [False, True, False, False]
    assert rows["policy_version"][decided].tolist() == [0, 1, 2, 3]
    assert rows["noise"][decided, 0].tolist() == [0, 1, 2, 3]
    assert rows["state"][:7, 0].tolist() == [0, 1, 2, 2, 3, 4, 4]
    assert rows["image"][:7, 0, 0, 0].tolist() == [100, 101, 102, 102, 103, 104, 104]
    assert lane.ring.head.tolist() == [0, 7]
    assert [actions.shape for actions in environment.actions] == [(5, 7)] * 4


def test_rows_of_actions_hold_what_the_policy_computes_and_the_robot_gets_its_own_units(small_config: Config) -> None:
    config = configured(small_config, sac={"algorithm": "na"})
    memory = create_memory(config, TABLETOP, HORIZON)
    lane, environment = play(memory, config, [CONTINUES, CONTINUES, RUNS_OUT])
    assert [actions[0, 0] for actions in environment.actions] == [0, 1, 2]
    assert lane.ring.rows["action"][1, :3].min(axis=1).tolist() == [0, -1, -2]
    assert lane.ring.rows["action"][1, :3].max(axis=1).tolist() == [0, -1, -2]


def test_counters_and_episode_log(memory: Arena, small_config: Config) -> None:
    lane, environment = play(memory, small_config, [CONTINUES, SUCCEEDS, CONTINUES, RUNS_OUT])
    counters = lane.counters
    assert counters.actor_decisions.tolist() == [0, 4]
    assert counters.actor_env_steps.tolist() == [0, 15]
    assert counters.actor_episodes.tolist() == [0, 2]
    assert counters.actor_successes.tolist() == [0, 1]
    assert counters.actor_started_episodes.tolist() == [0, 3]
    assert counters.actor_episode_return[1, :2].tolist() == [-1, -2]
    assert counters.actor_episode_len[1, :2].tolist() == [8, 7]
    assert counters.actor_episode_success[1, :2].tolist() == [1, 0]
    assert environment.seeds == [episode_seed(9, TRAINING, 1, episode) for episode in range(3)]


def test_policy_lag_is_in_updates_since_the_policy_was_published(memory: Arena, small_config: Config) -> None:
    from dsrl_async.shm.counters import Counters

    Counters(memory).learner_updates[0] = 10
    lane, _ = play(memory, small_config, [CONTINUES, CONTINUES, CONTINUES])
    assert lane.counters.actor_policy_lag[1] == (10 - 0) + (10 - 1) + (10 - 2)


@pytest.mark.parametrize(
    ("outcome", "rule", "penalty", "reward"),
    [
        (CONTINUES, "chunk_success", True, -1),
        (SUCCEEDS, "chunk_success", True, 0),
        (CONTINUES, "chunk_success", False, 0),
        (SUCCEEDS, "chunk_success", False, 1),
        (SUCCEEDS, "first_step", True, -1),
        (SUCCEEDS._replace(success_step=0), "first_step", True, 0),
    ],
)
def test_reward_rules(outcome: ChunkOutcome, rule: str, penalty: bool, reward: float) -> None:
    assert decision_reward(outcome, rule, penalty) == reward


def configured(config: Config, **sections: dict[str, object]) -> Config:
    settings = config.model_dump()
    return Config.model_validate({**settings, **{name: settings[name] | keys for name, keys in sections.items()}})


def test_rewards_of_the_environment_are_discounted_within_a_decision(memory: Arena, small_config: Config) -> None:
    given = CONTINUES._replace(rewards=(1, 2, 0, 0, 4))
    for incarnation, per, expected in ((1, "env_step", 1 + 2 * 0.5 + 4 * 0.5**4), (2, "decision", 7.0)):
        config = configured(small_config, env={"reward": "environment"}, sac={"gamma": 0.5, "discount_per": per})
        lane, _ = play(memory, config, [given], incarnation)
        assert lane.ring.rows["reward"][1, lane.ring.head[1] - 2] == expected
        assert lane.episode_return == expected


def test_an_environment_without_rewards_of_its_own_gives_one_for_success() -> None:
    assert environment_reward(CONTINUES, 0.5) == 0
    assert environment_reward(SUCCEEDS, 0.5) == 0.5**2
    with pytest.raises(ValueError, match=r"^the environment's rewards must be finite numbers, not \[0\.0, nan\]$"):
        environment_reward(CONTINUES._replace(rewards=(0.0, float("nan"))), 1.0)


@pytest.mark.parametrize(("reward", "terminal"), [("success", False), ("environment", True)])
def test_an_episode_that_fails_for_good_is_no_success_and_ends_the_return_of_the_environment_only(
    memory: Arena, small_config: Config, reward: str, terminal: bool
) -> None:
    lane, _ = play(memory, configured(small_config, env={"reward": reward}), [CONTINUES, FAILS])
    assert lane.ring.rows["terminal"][1, 1] == terminal
    assert lane.ring.rows["complete"][1, :4].tolist() == [True, True, False, False]
    assert lane.counters.actor_episodes[1] == 1
    assert lane.counters.actor_successes[1] == 0


def test_what_a_success_is_worth_is_refused_beside_rewards_of_the_environment() -> None:
    for other in ({"use_step_penalty": False}, {"reward_rule": "first_step"}):
        with pytest.raises(ConfigError, match=r"^env: use_step_penalty and reward_rule .* or set reward to success$"):
            validate({"env": {"reward": "environment", **other}})


def test_episode_seeds_never_repeat_between_training_and_evaluation() -> None:
    keys = [
        (seed, purpose, lane, episode)
        for seed in range(3)
        for purpose in (TRAINING, EVALUATION)
        for lane in range(16)
        for episode in range(40)
    ]
    assert len({episode_seed(*key) for key in keys}) > len(keys) - 2  # 32-bit numbers may collide once in a while


def test_noise_depends_on_the_episode_and_not_on_the_process(memory: Arena, small_config: Config) -> None:
    first, _ = play(memory, small_config, [CONTINUES])
    noise = first.slots.standard_normal[1].copy()
    first.counters.actor_started_episodes[1] = 0
    second, _ = play(memory, small_config, [CONTINUES], incarnation=2)
    assert (second.slots.standard_normal[1] == noise).all()
    third, _ = play(memory, small_config, [CONTINUES], incarnation=3)
    assert (third.slots.standard_normal[1] != noise).all()
