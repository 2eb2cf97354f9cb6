"""An agent that is told its task: what its networks make of it, and what it can learn by it."""

from __future__ import annotations

import pytest
import torch
from support.sac_configs import SMALL
from torch import Tensor

from dsrl_async.config.settings import SacConfig
from dsrl_async.sac.agent import Batch, SacAgent
from dsrl_async.sac.na import NaAgent, Observations
from dsrl_async.sac.networks import Actor, Critic, act, preprocess_image

HORIZON, TASKS, BATCH = 10, 2, 32
TABLE = torch.eye(TASKS) * TASKS**0.5


def told(width: int, **changes: object) -> SacConfig:
    instruction = "task" if width else "none"
    return SacConfig(**{**SMALL.model_dump(), "instruction": instruction, "instruction_dim": width, **changes})


def observations(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8, generator=generator)
    return images, torch.randn(count, 8, generator=generator)


@pytest.mark.parametrize("state_latent_dim", [8, 0])
def test_it_stands_beside_what_is_encoded_of_image_and_state(state_latent_dim: int) -> None:
    config = told(5, state_latent_dim=state_latent_dim)
    images, state = observations(3)
    pixels, instruction = preprocess_image(images, config), torch.randn(3, 5)
    for network in (Actor(config, HORIZON), Critic(config, HORIZON)):
        features = network.encoder(pixels, state, instruction)
        assert network.encoder.output_dim == features.shape[1] == 12 + (state_latent_dim or 8) + 5
        assert torch.equal(features[:, -5:], instruction)
        others = network.encoder(pixels, state, torch.zeros(3, 5))
        assert torch.equal(features[:, :-5], others[:, :-5])


def test_the_heads_learn_what_it_is_multiplied_with() -> None:
    torch.manual_seed(0)
    config, (images, state), instruction = told(5), observations(4), torch.randn(4, 5)
    critic, pixels = Critic(config, HORIZON, trainable=True), preprocess_image(images, config)
    noise, first = torch.randn(4, SMALL.noise_dim), critic.weights[0]
    of_instruction = slice(critic.encoder.output_dim - 5, critic.encoder.output_dim)

    def loss() -> Tensor:
        return (100 * critic(pixels, state, noise, instruction)).square().mean()

    critic.backward_(loss())
    parts = critic.flat_grad.split([parameter.numel() for parameter in critic.parameters()])
    named = dict(zip((name for name, _ in critic.named_parameters()), parts, strict=True))
    gradient = named["weights.0"].view_as(first)[:, of_instruction]
    direction = torch.randn_like(gradient)
    values = []
    with torch.no_grad():
        for step in (1e-4, -2e-4):
            first[:, of_instruction] += step * direction
            values.append(loss().item())
    assert (values[0] - values[1]) / 2e-4 == pytest.approx((gradient * direction).sum().item(), rel=2e-2)


@pytest.mark.parametrize("of_actions", [False, True], ids=["sac", "na"])
def test_without_one_nothing_is_another_agent(of_actions: bool) -> None:
    """`task` where there is one instruction: the same weights, and the same after an update, to the last bit."""
    agents = [make_agent(config, of_actions) for config in (told(0), told(0, instruction="task"))]
    tensors = []
    for agent in agents:
        learn(agent, make_batch(0, of_actions), of_actions, 3)
        tensors.append(agent.state_tensors())
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


# --- two tasks that contradict each other: the same pictures, and another noise is best


def make_agent(config: SacConfig, of_actions: bool) -> SacAgent:
    return NaAgent(config, HORIZON, 1, SMALL.noise_dim) if of_actions else SacAgent(config, HORIZON)


def bandit() -> SacConfig:
    quick = {"actor_lr": 3e-3, "critic_lr": 3e-3, "alpha_lr": 0.0, "initial_alpha": 1e-4, "train_actor_steps": 0}
    small = {"image_pool": 16, "hidden_dims": [64, 64], "action_magnitude": 1.0, "noise_critic_steps": 1.0}
    return told(0, **quick, **small)


def reward(noise: Tensor, task: Tensor) -> Tensor:
    """Best, 0, where all of the noise is 0.6 in task 0, and -0.6 in task 1."""
    best = torch.where(task == 0, 0.6, -0.6).unsqueeze(1)
    return -(noise - best).square().mean(1)


def make_batch(width: int, of_actions: bool, seed: int = 0) -> tuple[Batch, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    task = torch.randint(0, TASKS, (2 * BATCH,), generator=generator)
    noise = torch.randn(BATCH, SMALL.noise_dim, generator=generator).clamp(-1, 1)
    batch = Batch(
        images=torch.full((2 * BATCH, 64, 64, 3), 100, dtype=torch.uint8),
        states=torch.zeros(2 * BATCH, 8),
        noise=noise,  # and for DSRL-NA the actions: the policy is the identity
        reward=reward(noise, task[:BATCH]),
        discount=torch.zeros(BATCH),
        instructions=TABLE.index_select(0, task) if width else None,
    )
    return batch, task


def learn(agent: SacAgent, made: tuple[Batch, Tensor], of_actions: bool, updates: int = 1) -> None:
    batch, _ = made
    for _ in range(updates):
        random = agent.random_numbers(BATCH)
        random.draw_(agent.generator)
        agent.learn(batch, random, agent.actor_due)
        agent.updates += 1
        if of_actions:
            assert isinstance(agent, NaAgent)
            numbers = agent.distilling_numbers(BATCH)
            numbers.draw_(agent.generator)
            told_now = None if batch.instructions is None else batch.instructions[:BATCH]
            agent.distil(
                Observations(batch.images[:BATCH], batch.states[:BATCH], told_now), numbers, lambda noise: noise
            )


@pytest.mark.parametrize("of_actions", [False, True], ids=["sac", "na"])
def test_tasks_that_contradict_each_other_are_learned_by_who_knows_which_one_it_has(of_actions: bool) -> None:
    rewards = {}
    for width in (0, TASKS):
        config = bandit().model_copy(update={"instruction_dim": width, "instruction": "task" if width else "none"})
        agent = make_agent(config, of_actions)
        for seed in range(120):
            learn(agent, make_batch(width, of_actions, seed), of_actions)
        batch, task = make_batch(width, of_actions, seed=1000)
        rest = torch.zeros(2 * BATCH, SMALL.noise_dim), torch.zeros(2 * BATCH), True
        noise = act(agent.actor, batch.images, batch.states, *rest, instruction=batch.instructions)
        found = reward(noise, task)
        rewards[width] = min(found[task == number].mean().item() for number in range(TASKS))
    assert rewards[TASKS] > -0.06
    assert rewards[0] < -0.25  # at best -0.36 for both: what is right for one is as wrong as can be for the other
