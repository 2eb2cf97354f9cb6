"""Demonstrations in an update, of both algorithms: which rows a batch has, all that it has of each, and who learns of
them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dsrl_async.config.load import validate
from dsrl_async.config.settings import Config
from dsrl_async.demonstrations import Demonstration
from dsrl_async.envs.shipped import TABLETOP
from dsrl_async.pi0.config import EMBEDDED_POLICY
from dsrl_async.pi0.files import find_policy
from dsrl_async.pi0.policy import Pi0Policy
from dsrl_async.policies import FrozenPolicy
from dsrl_async.policies.pi0 import pi0_record
from dsrl_async.run import checkpoints
from dsrl_async.run.instructions import Instructions
from dsrl_async.run.inversion import rows as inversion_rows
from dsrl_async.run.inversion.rows import Inverter, make_rows
from dsrl_async.run.learner.learner import Learner, make_agent
from dsrl_async.run.learner.na import NaUpdates, make_na_updates
from dsrl_async.run.learner.sampling import Demonstrated, InPlace, Mirror
from dsrl_async.run.learner.updates import Updates
from dsrl_async.run.preflight.policy import fit_agent
from dsrl_async.sac import IMITATION_METRIC_NAME, metric_names
from dsrl_async.sac.agent import Imitated
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters
from dsrl_async.shm.memory import create_memory
from dsrl_async.shm.replay import DEMONSTRATIONS, ReplayRing, Seen

CPU = torch.device("cpu")
PROMPTS = ("move the cube to the red plate", "the red plate", "put the block")
SPEC = TABLETOP._replace(prompts=PROMPTS)
TABLE = torch.tensor([[1.0, 7.0, 0.0], [2.0, 5.0, 0.0], [3.0, 6.0, 0.0]])
RECORD = pi0_record(find_policy(EMBEDDED_POLICY))
BATCH, SHOWN, ROWS, FIRST_SHOWN = 8, 3, 24, 100
"""Rows of a batch, how many of them are demonstrations, all rows that are, and the number that theirs begin with."""


def configure(algorithm: str, prefixes: str = "encode") -> Config:
    sac = {"algorithm": algorithm, "instruction": "task", "hidden_dims": [16], "num_q_heads": 2, "conv_channels": [4]}
    sac |= {"batch_size": BATCH, "train_actor_steps": 0, "noise_critic_steps": 1, "imitation_decay": 4}
    settings = {
        "actors": 2,
        "replay": {"capacity": 64, "warmup_decisions": 16, "demonstration_share": SHOWN / BATCH},
        "policy": {"denoise_steps": 1},
        "learner": {"policy_rows": 4, "policy_prefixes": prefixes},
        "sac": {**sac, "imitation_weight": 0.5, "imitation_updates": 2},
    }
    return fit_agent(validate(settings), RECORD.spec, SPEC)


@pytest.fixture(scope="module")
def policy() -> FrozenPolicy:
    return RECORD.load(configure("na").policy, CPU, PROMPTS, lambda: None)


def task_of(number: int) -> int:
    return number // 2 % 3


def near(number: int) -> bool:
    return number % 4 != 0


def outcome(number: int) -> tuple[float, int, bool]:
    """Reward, steps, and whether it is terminal."""
    return -float(number), 1 + number % 5, number % 7 == 3


def chosen(number: int, width: int) -> np.ndarray:
    return np.full(width, number / 1000, np.float32)


def write(ring: ReplayRing, lane: int, first: int, count: int) -> None:
    """Rows of which all that there is follows from a number, which is also their state."""

    def observation(number: int) -> tuple[np.ndarray, np.ndarray, Seen]:
        pictures = np.full((2, 64, 64, 3), number, np.uint8) if ring.of_actions else None
        image, state = np.full((64, 64, 3), number, np.uint8), np.full(8, number, np.float32)
        return image, state, Seen(pictures, task_of(number))

    width = ring.rows[ring.judged].shape[2]
    ring.begin_episode(lane, *observation(first))
    for number in range(first, first + count):
        ring.append(lane, chosen(number, width), *outcome(number), 0, *observation(number + 1))


def make_memory(config: Config) -> Arena:
    memory = create_memory(config, SPEC, 10, ROWS)
    for lane in range(2):
        write(ReplayRing(memory), lane, 40 * lane, 20)
    Counters(memory).actor_decisions[:] = 20
    shown = ReplayRing(memory, DEMONSTRATIONS)
    write(shown, 0, FIRST_SHOWN, ROWS - 1)
    for row in range(ROWS - 1):
        number = FIRST_SHOWN + row
        shown.rows["imitated"][0, row] = chosen(number, 32) + 0.1
        shown.rows["near"][0, row] = near(number)
        shown.rows["complete"][0, row] = shown.of_actions or near(number)
    return memory


def make_updates(
    config: Config, policy: FrozenPolicy, source: Callable[[ReplayRing], InPlace | Mirror] = InPlace
) -> Updates:
    memory = make_memory(config)
    ring = ReplayRing(memory)
    demonstrated = Demonstrated(
        ReplayRing(memory, DEMONSTRATIONS), CPU, config.replay.demonstration_share, BATCH, TABLE
    )
    if config.sac.algorithm == "na":
        return make_na_updates(config, policy, CPU, source(ring), torch.float32, TABLE, demonstrated)
    updates = Updates(make_agent(config, 10, CPU), source(ring), BATCH, TABLE, demonstrated)
    updates.refresh()
    return updates


def numbers_of(states: Tensor) -> list[int]:
    return [int(number) for number in states[:, 0]]


def check_observed(images: Tensor, states: Tensor, told: Tensor | None, numbers: list[int]) -> None:
    assert numbers_of(states) == numbers
    assert images[:, 0, 0, 0].tolist() == numbers
    assert told is not None
    assert torch.equal(told, TABLE[[task_of(number) for number in numbers]])


def check_seen(seen: tuple[Tensor, ...], numbers: list[int]) -> None:
    """What the policy is asked with."""
    images, task_index = seen
    assert images[:, 0, 0, 0, 0].tolist() == numbers
    assert task_index.tolist() == [task_of(number) for number in numbers]


@pytest.mark.parametrize("source", [InPlace, lambda ring: Mirror(ring, CPU)], ids=["in place", "mirror"])
@pytest.mark.parametrize("algorithm", ["sac", "na"])
def test_a_batch_has_its_share_and_all_of_each_row(
    algorithm: str, source: Callable[[ReplayRing], InPlace | Mirror], policy: FrozenPolicy
) -> None:
    config = configure(algorithm)
    updates = make_updates(config, policy, source)
    batch, of_shown = updates.batch, set[int]()
    for _ in range(4):
        assert updates.draw_batch()
        numbers = numbers_of(batch.states[:BATCH])
        assert [number >= FIRST_SHOWN for number in numbers] == [False] * (BATCH - SHOWN) + [True] * SHOWN
        check_observed(batch.images, batch.states, batch.instructions, numbers + [number + 1 for number in numbers])
        outcomes = [outcome(number) for number in numbers]
        assert batch.reward.tolist() == [reward for reward, _, _ in outcomes]
        discount = [0.0 if terminal else config.sac.gamma**steps for _, steps, terminal in outcomes]
        torch.testing.assert_close(batch.discount, torch.tensor(discount))
        width = batch.noise.shape[1]
        assert np.array_equal(batch.noise, [chosen(number, width) for number in numbers])
        assert updates.imitated is not None
        assert np.array_equal(updates.imitated.noise, [chosen(number, 32) + 0.1 for number in numbers[-SHOWN:]])
        assert updates.imitated.weight.tolist() == [float(near(number)) for number in numbers[-SHOWN:]]
        of_shown |= set(numbers[-SHOWN:])
        if isinstance(updates, NaUpdates):
            check_seen(updates.next_seen, [number + 1 for number in numbers])
            assert updates.draw_into(updates.distilling, updates.draw_observations)
            numbers = numbers_of(updates.observations.states)
            assert [number >= FIRST_SHOWN for number in numbers] == [False] * (BATCH - SHOWN) + [True] * SHOWN
            check_observed(*updates.observations, numbers)
            check_seen(updates.seen, numbers)
    known = all(near(number) for number in of_shown)
    assert known == (algorithm == "sac")  # which learns of no other; DSRL-NA's critic knows what was done


def test_an_update_with_kept_prefixes_is_that_from_pictures(policy: FrozenPolicy) -> None:
    """Of demonstrations, too, up to rounding."""
    both = [make_updates(configure("na", prefixes), policy) for prefixes in ("encode", "keep")]
    for _ in range(2):
        for updates in both:
            assert updates.draw_batch()
            updates.run()
        torch.testing.assert_close(both[0].metrics, both[1].metrics, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("algorithm", ["sac", "na"])
def test_imitation_reaches_the_actor_alone_and_falls_with_the_updates(algorithm: str, policy: FrozenPolicy) -> None:
    """Of noise that is not known nothing is learned, and of what is known the actor learns less each time."""

    def learned(updates: Updates, change: Callable[[Updates], object] | None = None) -> dict[str, Tensor]:
        assert updates.draw_batch()
        if change is not None:
            change(updates)
        updates.run()
        return updates.agent.state_tensors()

    def with_weights(*weights: float) -> Callable[[Updates], object]:
        def change(updates: Updates) -> None:
            assert updates.imitated is not None
            updates.imitated.weight.copy_(torch.tensor(weights))

        return change

    def with_other_noise(updates: Updates) -> None:
        with_weights(1, 0, 0)(updates)
        assert updates.imitated is not None
        updates.imitated.noise[1:] = -0.3

    config = configure(algorithm)
    some, other, none = (
        learned(make_updates(config, policy), change)
        for change in (with_weights(1, 0, 0), with_other_noise, with_weights(0, 0, 0))
    )
    differing = {name for name in some if not torch.equal(some[name], none[name])}
    assert differing == {"actor.flat", "actor.adam.exp_avg", "actor.adam.exp_avg_sq"}
    assert all(torch.equal(some[name], other[name]) for name in some)
    updates, weights = make_updates(config, policy), []
    for _ in range(6):
        learned(updates)
        weights.append(updates.agent.imitation_weight.item())
    assert weights == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    learned(updates, with_weights(0, 0, 0))
    metrics = dict(zip(metric_names(algorithm, True), updates.metrics.tolist(), strict=True))
    assert [name for name, value in metrics.items() if value == 0] == [IMITATION_METRIC_NAME]


def test_before_the_first_decision_only_noise_that_is_known_is_imitated(
    policy: FrozenPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates, asked = make_updates(configure("na"), policy), list[list[int]]()
    imitate = updates.agent.imitate

    def noted(images: Tensor, states: Tensor, told: Tensor | None, imitated: Imitated, numbers: Tensor) -> Tensor:
        asked.append(numbers_of(states))
        check_observed(images, states, told, asked[-1])
        assert np.array_equal(imitated.noise, [chosen(number, 32) + 0.1 for number in asked[-1]])
        return imitate(images, states, told, imitated, numbers)

    monkeypatch.setattr(updates.agent, "imitate", noted)
    updates.imitate(4)
    assert [len(numbers) for numbers in asked] == [BATCH] * 4
    assert all(near(number) for numbers in asked for number in numbers)
    assert len({number for numbers in asked for number in numbers}) > 8


def test_a_learner_goes_on_with_them_bit_for_bit_and_imitates_at_the_beginning_only(
    policy: FrozenPolicy, tmp_path: Path
) -> None:
    config, told = configure("na"), Instructions(PROMPTS, TABLE.numpy())

    def make(memory: Arena) -> Learner:
        return Learner(config, memory, 10, CPU, tmp_path, lambda frame: None, policy, told)

    learner = make(make_memory(config))
    assert learner.agent.optimisers["actor"].state["step"] == config.sac.imitation_updates
    for _ in range(2):
        assert learner.update()
    saved = learner.checkpoint()
    assert not [path for path in saved.rglob("*") if "demonstrations" in path.name]  # they are in the run's own file
    memory = create_memory(config, SPEC, 10, ROWS)
    checkpoints.restore_shared(saved, Counters(memory), ReplayRing(memory), len(PROMPTS))
    before = ReplayRing(make_memory(config), DEMONSTRATIONS).export_lane(0)
    ReplayRing(memory, DEMONSTRATIONS).import_rows(0, before)
    other = make(memory)
    assert other.agent.updates == 2
    for _ in range(2):
        assert learner.update()
        assert other.update()
    mine, theirs = (one.agent.state_tensors() for one in (learner, other))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert learner.agent.imitation_weight == other.agent.imitation_weight == 0.125


# --- from the demonstration to its rows -------------------------------------------------------------------


def demonstration(task: int, frames: int = 7) -> Demonstration:
    rng = np.random.default_rng(task)
    pictures = rng.integers(0, 256, (frames, 2, 64, 64, 3), np.uint8)
    state, action = (rng.uniform(-0.5, 0.5, (frames, width)).astype(np.float32) for width in (8, 7))
    return Demonstration("made up", state, action, frames - 1, task, lambda count: pictures[:count])


def test_rows_of_dsrl_na_have_the_actions_the_instruction_and_what_the_policy_sees(
    policy: FrozenPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are learned from though their noise is not known."""
    config, shown = configure("na"), demonstration(2)

    def fit(_: object, layout: object, noise: Tensor, wanted: Tensor, sample: object) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(noise), 32), (torch.arange(len(noise)) % 2).float()

    monkeypatch.setattr(inversion_rows, "fit", fit)
    monkeypatch.setattr(inversion_rows.demonstrations, "read_all", lambda *_: [shown])
    frames = [0, 5, -1, 1, 6, -1, 2, -1, 3, -1, 4, -1]  # of 7, by chunks of 5; -1: where a sequence ends
    rows = make_rows(config, SPEC, policy, len(frames), lambda words: None)
    assert rows["task_index"].tolist() == [2] * len(frames)
    assert isinstance(policy, Pi0Policy)
    for row, frame in enumerate(frames):
        assert rows["complete"][row] == (frame >= 0)
        if frame >= 0:
            assert rows["near"][row] == (frame % 4 % 2 == 0)  # four rows at a time
            actions = torch.from_numpy(rows["action"][row].reshape(1, 5, 7))
            made = policy.loaded.normaliser.robot_actions(actions, torch.from_numpy(shown.state[[frame]]))
            expected = np.concatenate([shown.action[frame:], np.repeat(shown.action[-1:], 9, 0)])[:5]
            np.testing.assert_allclose(made[0], expected, atol=1e-5)
            assert np.array_equal(rows["policy_images"][row], np.array([*shown.pictures(7)])[frame])


def test_the_policy_is_inverted_with_the_demonstration_s_instruction(policy: FrozenPolicy) -> None:
    inverter, shown = Inverter(policy, configure("sac")), demonstration(0)
    images, chunks = np.array([*shown.pictures(2)]), np.zeros((2, 10, 7), np.float32)
    found = [inverter(images, shown.state[:2], task, chunks).vectors for task in (0, 1, 1)]
    assert np.abs(found[0] - found[1]).max() > 1e-3
    assert np.array_equal(found[1], found[2])
