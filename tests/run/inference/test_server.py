"""Batching and steering: whom the inference process answers, with what, and when it makes the workers wait."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dsrl_async.config.settings import Config
from dsrl_async.envs import EnvironmentSpec, environment_spec
from dsrl_async.pi0.checkpoint import load_policy
from dsrl_async.pi0.config import EMBEDDED_POLICY
from dsrl_async.pi0.files import find_policy
from dsrl_async.pi0.processing import scale_images
from dsrl_async.pi0.sampler import sample_actions
from dsrl_async.policies.pi0 import pi0_record
from dsrl_async.run.inference.policies import load_frozen_policy, load_policies
from dsrl_async.run.inference.server import InferenceServer
from dsrl_async.run.inference.steering import SteeredPolicy
from dsrl_async.run.weights import Weights
from dsrl_async.sac.networks import Actor, act
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters, NoiseMode

CPU = torch.device("cpu")


def make_server(config: Config, memory: Arena, mode: NoiseMode | None = None) -> InferenceServer:
    spec = environment_spec(config.env.model_dump())
    policies = load_policies(config, spec, CPU, pi0_record(find_policy(EMBEDDED_POLICY)), Counters(memory))
    return InferenceServer(config, memory, policies, lambda lanes: None, mode)


def ask(server: InferenceServer, lane: int, seed: int, count: int = 1) -> None:
    """Publish a random observation that depends on `seed` only."""
    rng, slots = np.random.default_rng(seed), server.slots
    slots.images[lane] = rng.integers(0, 256, slots.images[lane].shape)
    slots.sac_image[lane] = rng.integers(0, 256, slots.sac_image[lane].shape)
    slots.state[lane] = rng.normal(size=8)
    slots.standard_normal[lane] = rng.normal(size=slots.standard_normal[lane].shape)
    slots.request(lane, incarnation=1, count=count)


def test_answer_does_not_depend_on_the_batch(small_config: Config, memory: Arena) -> None:
    server = make_server(small_config, memory, NoiseMode.STOCHASTIC)
    ask(server, 0, seed=1)
    assert server.serve_ready(server.slots.ready()) == 1
    alone = server.slots.action_chunk[0].copy()
    ask(server, 0, seed=1, count=2)
    ask(server, 1, seed=2)
    assert server.serve_ready(server.slots.ready()) == 2
    assert np.abs(server.slots.action_chunk[0] - alone).max() < 1e-5
    assert np.abs(server.slots.action_chunk[1] - alone).max() > 1e-3
    assert server.counters.inference_rows[0] == 3
    assert server.counters.inference_padded_rows[0] == 3


def test_noise_and_actions_are_what_the_parts_compute(small_config: Config, memory: Arena) -> None:
    """The slot's answer against the actor and the frozen policy called by hand on the same observation."""
    server = make_server(small_config, memory, NoiseMode.STOCHASTIC)
    generator = torch.Generator().manual_seed(3)
    server.load_weights(
        Weights(42, torch.randn(server.policies.actor.flat.shape, generator=generator).mul_(0.1).numpy())
    )
    ask(server, 0, seed=5)
    server.serve_ready(server.slots.ready())
    slots = server.slots
    image, state = torch.from_numpy(slots.sac_image[:1]), torch.from_numpy(slots.state[:1])
    normal = torch.from_numpy(slots.standard_normal[:1, :32])
    noise = act(server.policies.actor, image, state, normal, torch.zeros(1, dtype=torch.bool))
    assert torch.allclose(noise[0], torch.from_numpy(slots.noise[0]), atol=1e-6)
    policy = load_policy(EMBEDDED_POLICY)
    tokens, token_mask = policy.tokenizer(environment_spec(small_config.env.model_dump()).prompts)
    actions = sample_actions(
        policy.model,
        scale_images(torch.from_numpy(slots.images[:1])),
        tokens,
        token_mask,
        policy.normaliser.state(state),
        noise[:, None].expand(-1, 10, -1),
        small_config.policy.denoise_steps,
    )
    expected = policy.normaliser.robot_actions(actions, state)
    assert np.abs(expected[0, :5].numpy() - slots.action_chunk[0]).max() < 1e-5
    assert slots.policy_version[0] == 42


def test_prompts_of_different_lengths_share_batches(small_config: Config, memory: Arena) -> None:
    """Each row of a mixed batch gets what its own prompt gives by itself, whatever was in the buffers before."""
    prompts = (
        "put the block on the red plate",
        "put",
        "put the block on the red plate near the green one",
        "the block",
    )
    known = environment_spec(small_config.env.model_dump())
    spec = known._replace(prompts=prompts)
    policies = load_policies(small_config, spec, CPU, pi0_record(find_policy(EMBEDDED_POLICY)), Counters(memory))
    server = InferenceServer(small_config, memory, policies, lambda lanes: None, NoiseMode.BASE)
    assert sorted({length for _, length in policies.steered_batches}) == [8, 12]
    policy, slots = load_policy(EMBEDDED_POLICY), server.slots
    for count, tasks in enumerate(((1, 3), (2, 1), (0, 2), (1, 1), (3, 0)), start=1):
        for lane, task in enumerate(tasks):
            slots.task_index[lane] = task
            ask(server, lane, seed=10 * count + lane, count=count)
        assert server.serve_ready(slots.ready()) == 2
        for lane, task in enumerate(tasks):
            tokens, token_mask = policy.tokenizer([prompts[task]])
            state = torch.from_numpy(slots.state[lane : lane + 1])
            actions = sample_actions(
                policy.model,
                scale_images(torch.from_numpy(slots.images[lane : lane + 1])),
                tokens,
                token_mask,
                policy.normaliser.state(state),
                torch.from_numpy(slots.standard_normal[lane]).view(1, -1, 32),
            )
            expected = policy.normaliser.robot_actions(actions, state)[0, :5].numpy()
            assert np.abs(expected - slots.action_chunk[lane]).max() < 1e-5


def test_modes(small_config: Config, memory: Arena) -> None:
    answers = {}
    modes = (NoiseMode.STOCHASTIC, NoiseMode.DETERMINISTIC, NoiseMode.BASE)
    for count, mode in enumerate(modes, start=1):
        server = make_server(small_config, memory, mode)
        ask(server, 0, seed=1, count=count)
        server.serve_ready(server.slots.ready())
        answers[mode.name.lower()] = server.slots.noise[0].copy()
    magnitude = small_config.sac.action_magnitude
    assert np.abs(answers["stochastic"]).max() <= magnitude
    assert np.abs(answers["deterministic"]).max() <= magnitude
    assert (answers["base"] == server.slots.standard_normal[0, :32]).all()
    assert (answers["stochastic"] != answers["deterministic"]).any()


def test_warm_up_uses_unsquashed_noise_for_exactly_so_many_decisions(small_config: Config, memory: Arena) -> None:
    server = make_server(small_config, memory)
    server.load_weights(Weights(0, np.zeros(server.policies.actor.flat.numel(), np.float32)))
    server.counters.learner_updates[0] = 1000  # the learner holds nobody up
    magnitude, gaussian = small_config.sac.action_magnitude, 0
    for decision in range(1, 15):
        for lane in (0, 1):
            ask(server, lane, seed=decision * 2 + lane, count=decision)
        while len(ready := server.slots.ready()):
            assert server.serve_ready(ready)
            for lane in ready:
                server.counters.actor_decisions[lane] += 1
                server.slots.request_id[lane] = 0  # the decision is completed, not being executed
                server.slots.response_id[lane] = 0
                is_normal = (server.slots.noise[lane] == server.slots.standard_normal[lane, :32]).all()
                assert is_normal or np.abs(server.slots.noise[lane]).max() <= magnitude
                gaussian += int(is_normal)
    assert gaussian == small_config.replay.warmup_decisions


def test_actors_wait_for_the_learner_and_all_go_on_together(small_config: Config, memory: Arena) -> None:
    server = make_server(small_config, memory)
    counters = server.counters
    counters.actor_decisions[0] = 60  # 16 are warm-up, 44 ask for an update each
    for lane in (0, 1):
        ask(server, lane, seed=lane)
    ready = server.slots.ready()
    assert server.serve_ready(ready) == 0  # no weights yet
    server.load_weights(Weights(0, np.zeros(server.policies.actor.flat.numel(), np.float32)))
    served = []
    for updates in range(30, 45):
        counters.learner_updates[0] = updates
        served.append(server.serve_ready(server.slots.ready()))
    assert 0 < served.index(2) < 14
    assert sorted(served) == [0] * 14 + [2]


def test_a_run_hands_out_exactly_its_decisions(small_config: Config, memory: Arena) -> None:
    server = make_server(small_config.model_copy(update={"max_decisions": 5}), memory)
    server.counters.actor_decisions[0] = 4
    for lane in (0, 1):
        ask(server, lane, seed=lane)
    assert server.serve_ready(server.slots.ready()) == 1
    assert server.serve_ready(server.slots.ready()) == 0


def test_a_group_keeps_to_what_it_is_granted_and_warms_up_for_its_share(small_config: Config, memory: Arena) -> None:
    server = make_server(small_config, memory)
    counters = server.counters
    counters.control_granted[0] = -1  # nothing is granted yet, though the warm-up is not over
    assert server.allowed(2, handed_out=0) == 0
    counters.control_warmup[0], counters.control_granted[0] = 3, 10
    assert server.warmup() == 3
    assert server.allowed(2, handed_out=0) == 2
    assert server.allowed(2, handed_out=2) == 1  # a batch ends where the warm-up does
    assert server.allowed(2, handed_out=3) == 0  # without weights
    server.load_weights(Weights(0, np.zeros(server.policies.actor.flat.shape, np.float32)))
    assert server.allowed(2, handed_out=3) == 2
    assert server.allowed(2, handed_out=8) == 2  # the replay ratio is kept elsewhere: there were no updates yet
    assert server.allowed(2, handed_out=9) == 0  # all wait until all may go on
    assert server.allowed(1, handed_out=9) == 1
    counters.control_warmup[0] = 20  # others have died in it
    assert server.allowed(2, handed_out=9) == 0
    counters.control_granted[0] = 0
    assert server.warmup() == small_config.replay.warmup_decisions


def test_odd_batches_are_padded_to_the_next_bucket(small_config: Config, memory: Arena) -> None:
    inference = small_config.inference.model_copy(update={"buckets": [4, 8]})
    server = make_server(small_config.model_copy(update={"inference": inference}), memory, NoiseMode.STOCHASTIC)
    ask(server, 0, seed=1)
    server.serve_ready(server.slots.ready())
    assert server.counters.inference_padded_rows[0] == 4
    assert server.sizes == [4]


def test_rows_of_every_mode_share_a_batch(spec: EnvironmentSpec, small_config: Config) -> None:
    """Each row gets what its mode gives in a batch of that mode alone, by the newest actor or by the snapshot."""
    config = small_config.model_copy(update={"actors": len(NoiseMode)})
    steered = load_steered(config, spec)
    generator = torch.Generator().manual_seed(1)
    assert steered.snapshot is not None
    steered.snapshot.load_flat_(torch.randn(steered.snapshot.flat.shape, generator=generator).mul_(0.1))
    rows = len(NoiseMode)
    for buffer in steered.inputs.values():
        filled = torch.randn(buffer.shape, generator=generator)
        buffer.copy_(filled if buffer.is_floating_point() else filled.abs() * 50)
    steered.fill_prompts(np.zeros(rows, np.int64))
    alone = {}
    for mode in NoiseMode:
        steered.fill_modes(np.full(rows, mode, np.uint8))
        steered.run()
        alone[mode] = steered.noise.clone(), steered.policy.noise.clone()
    for shift in range(rows):
        modes = np.roll(np.array(list(NoiseMode), np.uint8), shift)
        steered.fill_modes(modes)
        steered.run()
        for row, mode in enumerate(modes.tolist()):
            for got, expected in zip((steered.noise, steered.policy.noise), alone[NoiseMode(mode)], strict=True):
                assert torch.equal(got[row], expected[row])
    distinct = [noise for _, noise in alone.values()]
    assert all((one != other).any() for one, other in itertools.combinations(distinct, 2))
    normal = steered.standard_normal.view_as(steered.policy.noise)
    assert torch.equal(alone[NoiseMode.BASE][1], normal)
    assert torch.equal(alone[NoiseMode.WARM_UP][1], normal[:, :1].expand_as(normal))
    assert torch.equal(alone[NoiseMode.SNAPSHOT_STOCHASTIC][0], by_hand(steered, steered.snapshot, deterministic=False))
    assert torch.equal(alone[NoiseMode.DETERMINISTIC][0], by_hand(steered, steered.actor, deterministic=True))


@pytest.mark.parametrize("layout", ["knots", "shift"])
def test_layouts_of_the_noise(spec: EnvironmentSpec, small_config: Config, layout: str) -> None:
    """What the policy starts from is laid out from what the ring gets; a shift has numbers of its own beside them."""
    rows = len(NoiseMode)
    sac = small_config.sac.model_copy(update={"noise_layout": layout, "noise_knots": 3, "noise_shift": 0.6})
    steered = load_steered(small_config.model_copy(update={"actors": rows, "sac": sac}), spec)
    generator = torch.Generator().manual_seed(1)
    for buffer in steered.inputs.values():
        filled = torch.randn(buffer.shape, generator=generator)
        buffer.copy_(filled if buffer.is_floating_point() else filled.abs() * 50)
    steered.fill_prompts(np.zeros(rows, np.int64))
    steered.fill_modes(np.array(list(NoiseMode), np.uint8))
    steered.run()
    normal, got, noise = steered.standard_normal, steered.policy.noise, steered.noise
    assert normal.shape == (rows, 352 if layout == "shift" else 320)
    of_slots = normal[:, :320].view(rows, 10, 32)
    steered_rows = torch.tensor([mode != NoiseMode.BASE for mode in NoiseMode])
    assert torch.equal(got[NoiseMode.BASE], of_slots[NoiseMode.BASE])
    if layout == "shift":
        own = (got - 0.6 * noise[:, None])[steered_rows]  # the same in all modes
        torch.testing.assert_close(own, 0.8 * of_slots[steered_rows], rtol=1e-5, atol=1e-6)
        assert torch.equal(noise[NoiseMode.WARM_UP], normal[NoiseMode.WARM_UP, 320:])
        assert (noise[NoiseMode.BASE] == 0).all()
    else:
        knots = noise.view(rows, 3, 32)[steered_rows]
        assert torch.equal(got[steered_rows][:, 0], knots[:, 0])
        assert torch.equal(got[steered_rows][:, 9], knots[:, 2])
        assert torch.equal(noise[NoiseMode.WARM_UP], normal[NoiseMode.WARM_UP, :96])
    magnitude = small_config.sac.action_magnitude
    assert (noise[[NoiseMode.STOCHASTIC, NoiseMode.DETERMINISTIC]].abs() <= magnitude).all()
    before = noise.clone()
    normal[:, -noise.shape[1] :].add_(1) if layout == "shift" else normal.add_(1)
    steered.run()
    assert torch.equal(noise[NoiseMode.DETERMINISTIC], before[NoiseMode.DETERMINISTIC])
    assert not torch.equal(noise[NoiseMode.STOCHASTIC], before[NoiseMode.STOCHASTIC])


def load_steered(config: Config, spec: EnvironmentSpec) -> SteeredPolicy:
    """A policy for one batch of as many rows as there are actors, with a second actor."""
    files = pi0_record(find_policy(EMBEDDED_POLICY))
    frozen = load_frozen_policy(config, files, CPU, spec.prompts, lambda: None)
    actors = [Actor(config.sac, 10, CPU, seed) for seed in (0, 1)]
    batch = frozen.batch(config.actors, int(frozen.prompt_lengths.max()))
    return SteeredPolicy(batch, actors[0], config.sac, actors[1])


def by_hand(steered: SteeredPolicy, actor: Actor, deterministic: bool) -> torch.Tensor:
    normal = steered.standard_normal[:, : steered.noise.shape[1]]
    nobody = torch.zeros(len(normal), dtype=torch.bool)
    return act(actor, steered.sac_image, steered.policy.state, normal, nobody, deterministic)
