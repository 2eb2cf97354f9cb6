"""The updates of DSRL-NA: what the policy makes of noise at replayed observations, and from where it gets them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dsrl_async.config.load import validate
from dsrl_async.config.settings import Config
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.envs.shipped import TABLETOP
from dsrl_async.host.graphs import Captured
from dsrl_async.host.tracing import OperationTrace
from dsrl_async.pi0.policy import Pi0Policy
from dsrl_async.pi0.processing import scale_images
from dsrl_async.pi0.sampler import Sampler
from dsrl_async.policies.find import policy_record
from dsrl_async.run import checkpoints
from dsrl_async.run.learner.learner import Learner
from dsrl_async.run.learner.na import NaUpdates, PolicyFlow, make_na_updates
from dsrl_async.run.learner.sampling import InPlace, Mirror, SeenColumns, Source
from dsrl_async.sac.layout import NoiseLayout
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters
from dsrl_async.shm.memory import create_memory
from dsrl_async.shm.replay import ReplayRing, Seen

CPU = torch.device("cpu")
PROMPTS = ("move the cube to the red plate", "the red plate")


def keeping(**changes: object) -> Config:
    """As `configure`; prefixes are kept."""
    config = configure(**changes)
    return config.model_copy(update={"learner": config.learner.model_copy(update={"policy_prefixes": "keep"})})


def configure(**changes: object) -> Config:
    sac = {"algorithm": "na", "batch_size": 5, "hidden_dims": [16, 16], "num_q_heads": 2, "conv_channels": [4]}
    sac |= {"train_actor_steps": 0, **changes}
    return validate(
        {
            "actors": 2,
            "replay": {"capacity": 200, "warmup_decisions": 16},
            "policy": {"denoise_steps": 2},
            "learner": {"policy_rows": 4},
            "sac": sac,
        }
    )


@pytest.fixture(scope="module")
def policy() -> Pi0Policy:
    """The tabletop's, with two prompts."""
    config = configure()
    loaded = policy_record(config.policy).load(config.policy, CPU, PROMPTS, lambda: None)
    assert isinstance(loaded, Pi0Policy)
    return loaded


def fill(memory: Arena, decisions: int, seed: int = 0) -> None:
    """Random rows in both lanes, in episodes of five, counted as a worker counts them."""
    rng, ring, counters = np.random.default_rng(seed), ReplayRing(memory), Counters(memory)

    def observation() -> tuple[np.ndarray, np.ndarray, Seen]:
        pictures = rng.integers(0, 256, (TABLETOP.cameras, TABLETOP.image_size, TABLETOP.image_size, 3), np.uint8)
        image, state = rng.integers(0, 256, (64, 64, 3), np.uint8), rng.normal(size=8).astype(np.float32)
        return image, state, Seen(pictures, int(rng.integers(2)))

    for lane in range(ring.lanes):
        for number in range(decisions // 2):
            if number % 5 == 0:
                ring.begin_episode(lane, *observation())
            actions = rng.normal(size=(5, 7)).astype(np.float32)
            ring.append(lane, actions, -1.0, 5, number % 5 == 4, 0, *observation())
            counters.actor_decisions[lane] += 1
            counters.actor_env_steps[lane] += 5


def make_memory(config: Config, decisions: int = 40) -> Arena:
    memory = create_memory(config, TABLETOP, 10)
    fill(memory, decisions)
    return memory


def make_updates(
    config: Config, policy: Pi0Policy, memory: Arena, source: Callable[[ReplayRing], Source] = InPlace
) -> NaUpdates:
    updates = make_na_updates(config, policy, CPU, source(ReplayRing(memory)), torch.float32)
    updates.refresh()
    return updates


def states_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- the flow ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["repeat", "per_slot", "knots", "shift"])
def test_actions_are_those_of_the_policys_own_sampler(policy: Pi0Policy, layout: str) -> None:
    """Seven rows through buffers of four equal one `Sampler` of seven, for either prompt: the normalised actions of the
    slots that are executed."""
    config = configure(noise_layout=layout)
    generator = torch.Generator().manual_seed(0)
    size = policy.spec.image_size
    pictures = torch.randint(0, 256, (7, 2, size, size, 3), dtype=torch.uint8, generator=generator)
    states, tasks = torch.randn(7, 8, generator=generator), torch.tensor([0, 1, 1, 0, 0, 1, 0])
    noise = torch.randn(7, config.sac.noise_width(10), generator=generator)
    of_slots = torch.randn(7, 10, 32, generator=generator) if layout == "shift" else None
    found = PolicyFlow(policy, config)(SeenColumns(pictures, tasks), states, noise, of_slots)

    sampler = Sampler(policy.loaded.model, 7, int(policy.prompt_lengths.max()), 2)
    scale_images(pictures, out=sampler.images)
    tokens, mask = policy.loaded.tokenizer([PROMPTS[task] for task in tasks])
    sampler.tokens.copy_(tokens[:, : sampler.language_length])
    sampler.token_mask.copy_(mask[:, : sampler.language_length])
    sampler.state.copy_(policy.loaded.normaliser.state(states))
    sampler.noise.copy_(NoiseLayout(config.sac, 10).expand(noise, of_slots))
    sampler.run()
    assert found.shape == (7, 5 * 7)
    torch.testing.assert_close(found, sampler.actions[:, :5, :7].flatten(1), rtol=1e-5, atol=1e-5)
    other = PolicyFlow(policy, config)(SeenColumns(pictures, 1 - tasks), states, noise, of_slots)
    assert (other - found).abs().max() > 1e-3  # the prompt matters


def test_the_slots_own_noise_is_drawn_for_each_sampling_and_follows_from_the_seed(
    policy: Pi0Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `shift`, in an update and in a step of the noise critic, other numbers each time."""
    memory, seen = make_memory(config := configure(noise_layout="shift", noise_critic_steps=1.0)), list[Tensor]()
    expand = NoiseLayout.expand

    def noted(layout: NoiseLayout, noise: Tensor, of_slots: Tensor | None = None) -> Tensor:
        assert of_slots is not None
        seen.append(of_slots.clone())
        return expand(layout, noise, of_slots)

    monkeypatch.setattr(NoiseLayout, "expand", noted)
    states = []
    for _ in range(2):
        updates = make_updates(config, policy, memory)
        for _ in range(2):
            assert updates.draw_batch()
            updates.run()
        states.append(updates.agent.state_tensors())
    assert states_equal(*states)
    drawn = seen[: len(seen) // 2]
    assert len(drawn) == 8  # two parts of the five rows, for the target and the noise critic, twice
    assert torch.cat(drawn).flatten(1).unique(dim=0).shape == (4 * 5, 320)
    assert all(torch.equal(first, second) for first, second in zip(drawn, seen[len(drawn) :], strict=True))


def test_batches_hold_the_actions_and_what_the_policy_sees_of_the_right_observations(policy: Pi0Policy) -> None:
    """Next observations in an update, and in a step of the noise critic those of the decisions themselves."""
    memory = make_memory(config := configure())
    updates, ring = make_updates(config, policy, memory), ReplayRing(memory)
    flat = {name: rows.reshape(-1, *rows.shape[2:]) for name, rows in ring.rows.items()}
    assert updates.draw_batch()
    rows = updates.source.table.rows(updates.positions).numpy()
    assert np.array_equal(updates.batch.noise.numpy(), flat["action"][rows])
    assert np.array_equal(updates.next_seen[0].numpy(), flat["policy_images"][rows + 1])
    assert np.array_equal(updates.next_seen[1].numpy(), flat["task_index"][rows + 1])
    assert np.array_equal(updates.batch.images[5:].numpy(), flat["image"][rows + 1])
    assert updates.draw_into(updates.distilling, updates.draw_observations)
    rows = updates.source.table.rows(updates.positions).numpy()
    assert np.array_equal(updates.seen[0].numpy(), flat["policy_images"][rows])
    assert np.array_equal(updates.seen[1].numpy(), flat["task_index"][rows])
    assert np.array_equal(updates.observations.images.numpy(), flat["image"][rows])
    assert np.array_equal(updates.observations.states.numpy(), flat["state"][rows])


# --- prefixes that are kept -------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [InPlace, lambda ring: Mirror(ring, CPU)], ids=["in place", "mirror"])
def test_kept_prefixes_follow_the_ring(policy: Pi0Policy, source: Callable[[ReplayRing], Source]) -> None:
    """Also when it goes round: what would be drawn, and what comes after it, is what encoding it now gives."""
    config, memory = keeping(), make_memory(keeping(), 30)
    updates, ring = make_updates(config, policy, memory, source), ReplayRing(memory)
    encoded = 0
    encode = updates.flow._encode

    def counted(seen: SeenColumns, states: Tensor) -> None:
        nonlocal encoded
        encoded += len(states)
        encode(seen, states)

    updates.flow._encode = counted  # type: ignore[method-assign]
    for decisions in (10, 2, 100, 160):
        before = ring.head.copy()
        fill(memory, decisions, seed=decisions)
        encoded = 0
        size = updates.refresh()
        assert encoded == np.minimum(ring.head - before, ring.rows_per_lane).sum()
        rows = updates.source.table.rows(torch.arange(size))
        seen = updates.source.seen
        assert seen is not None
        assert updates.prefixes is not None
        for places in (rows, updates.source.following[rows]):
            states = updates.source.columns.state[places]
            now = updates.flow.prefixes(SeenColumns(*(column[places] for column in seen)), states)
            for part, prefix in now:
                for column, fresh in zip(updates.prefixes.columns, prefix, strict=True):
                    torch.testing.assert_close(column[places][part], fresh, rtol=1e-5, atol=1e-5)
    assert int(ring.head.max()) > ring.rows_per_lane


def test_an_update_from_kept_prefixes_is_that_from_pictures(policy: Pi0Policy) -> None:
    """Up to rounding: rows are encoded beside others."""
    both = [make_updates(config, policy, make_memory(config)) for config in (configure(), keeping())]
    for _ in range(4):
        for updates in both:
            assert updates.draw_batch()
            updates.run()
        torch.testing.assert_close(both[0].metrics, both[1].metrics, rtol=1e-3, atol=1e-4, equal_nan=True)
    assert both[1].seen[0].shape == (5, 3, 2, 1, 45, 32)
    wrong = make_updates(keeping(), policy, make_memory(keeping()))
    assert wrong.prefixes is not None
    wrong.prefixes.columns[0].zero_()
    assert wrong.draw_batch()
    wrong.run()
    other = make_updates(configure(), policy, make_memory(configure()))
    assert other.draw_batch()
    other.run()
    assert not torch.allclose(wrong.metrics[:3], other.metrics[:3], rtol=1e-3, atol=1e-4)


# --- updates ----------------------------------------------------------------------------------------------


def test_a_mirror_gives_what_the_ring_gives(policy: Pi0Policy) -> None:
    memory = make_memory(config := configure(noise_critic_steps=1))
    sources: list[Callable[[ReplayRing], Source]] = [InPlace, lambda ring: Mirror(ring, CPU)]
    both = [make_updates(config, policy, memory, source) for source in sources]
    for _ in range(3):
        for updates in both:
            assert updates.draw_batch()
            updates.run()
        assert torch.equal(both[0].metrics, both[1].metrics)
        fill(memory, 10, seed=7)
        for updates in both:
            updates.refresh()
    assert states_equal(both[0].agent.state_tensors(), both[1].agent.state_tensors())


def test_steps_of_the_noise_critic_come_behind_every_second_update(policy: Pi0Policy) -> None:
    updates = make_updates(configure(), policy, make_memory(configure()))
    changed = []
    for _ in range(4):
        before = updates.agent.noise_critic.flat.clone()
        assert updates.draw_batch()
        updates.run()
        changed.append(not torch.equal(updates.agent.noise_critic.flat, before))
        assert updates.metrics[:9].isfinite().all()
        assert updates.metrics[9:].isfinite().all() == any(changed)
    assert changed == [False, True, False, True]


@pytest.mark.parametrize("make", [configure, keeping])
def test_what_is_captured_leaves_the_agent_alone_and_computes_the_same(
    policy: Pi0Policy, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Config]
) -> None:
    """Three functions, of which none waits for the device; replayed, they do what an update does."""
    config = make(noise_critic_steps=2)
    plain, rehearsed = (make_updates(config, policy, make_memory(config)) for _ in range(2))
    before = rehearsed.agent.state_tensors()
    waits = []

    def rehearse(functions: list[Callable[[], None]], *rest: object) -> Captured:
        for function in functions:
            with OperationTrace(guarded=True) as trace:
                function()
            waits.append(trace.host_syncs)
        return Captured(list(functions), None)

    monkeypatch.setattr("dsrl_async.run.learner.updates.capture", rehearse)
    rehearsed.capture()
    assert waits == [0, 0, 0]
    assert states_equal(rehearsed.agent.state_tensors(), before)
    for updates in (plain, rehearsed):
        assert updates.draw_batch()
        updates.run()
    assert states_equal(plain.agent.state_tensors(), rehearsed.agent.state_tensors())
    assert torch.equal(plain.metrics, rehearsed.metrics)


def test_a_learner_goes_on_from_its_checkpoint_bit_for_bit(policy: Pi0Policy, tmp_path: Path) -> None:
    """The agent with its noise critic, and rows with actions and pictures, which a fresh memory gets back."""
    config = configure()
    memory = make_memory(config)
    frames: list[bytes] = []
    learner = Learner(config, memory, 10, CPU, tmp_path, frames.append, policy)
    while learner.due() > 10:
        assert learner.update()
    saved = learner.checkpoint()
    rows = load_file(saved / "replay" / "lane-0000.safetensors")
    assert rows["policy_images"].shape[1:] == (2, 64, 64, 3)
    assert rows["action"].shape[1:] == (35,)
    assert "noise" not in rows
    fresh = create_memory(config, TABLETOP, 10)
    checkpoints.restore_shared(saved, Counters(fresh), ReplayRing(fresh), tasks=2)
    other = Learner(config, fresh, 10, CPU, tmp_path, frames.append, policy)
    for _ in range(3):
        assert learner.update()
        assert other.update()
    assert states_equal(learner.agent.state_tensors(), other.agent.state_tensors())


def test_rows_of_the_other_algorithm_are_refused(policy: Pi0Policy, tmp_path: Path) -> None:
    config = configure()
    learner = Learner(config, make_memory(config), 10, CPU, tmp_path, lambda frame: None, policy)
    saved = learner.checkpoint()
    fresh = create_memory(configure(algorithm="sac"), TABLETOP, 10)
    with pytest.raises(ValueError, match="'noise' do not fit"):
        checkpoints.restore_shared(saved, Counters(fresh), ReplayRing(fresh), tasks=2)


def test_rows_of_instructions_that_there_are_not_are_refused(policy: Pi0Policy, tmp_path: Path) -> None:
    config = configure()
    saved = Learner(config, make_memory(config), 10, CPU, tmp_path, lambda frame: None, policy).checkpoint()
    fresh = create_memory(config, TABLETOP, 10)
    with pytest.raises(
        ValueError, match=r"lane-0000.*'task_index' holds numbers that are none of the environment's 1 "
    ):
        checkpoints.restore_shared(saved, Counters(fresh), ReplayRing(fresh), tasks=1)


def test_a_noise_critic_that_diverges_is_named(policy: Pi0Policy, tmp_path: Path) -> None:
    config = configure()
    learner = Learner(config, make_memory(config), 10, CPU, tmp_path, lambda frame: None, policy)
    assert isinstance(learner.updates, NaUpdates)
    learner.updates.agent.noise_critic.flat.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"the agent's noise critic is not finite.*lower sac\.critic_lr"):
        learner.checkpoint()


def test_the_ring_of_dsrl_sac_is_what_it_was(spec: EnvironmentSpec) -> None:
    config = configure(algorithm="sac")
    names = {name for name in create_memory(config, spec, 10).fields if name.startswith(("replay/", "slot/norm"))}
    rows = ("image", "state", "noise", "reward", "steps", "terminal", "policy_version", "complete", "head")
    assert names == {f"replay/{name}" for name in rows}
