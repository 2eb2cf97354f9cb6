"""Losses, optimisation, checkpointing and capture-readiness of the SAC agent."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.sac_configs import SMALL
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from dsrl_async.config.settings import SacConfig
from dsrl_async.host.tracing import OperationTrace
from dsrl_async.sac import METRIC_NAMES
from dsrl_async.sac.agent import Batch, SacAgent, transition_discount
from dsrl_async.sac.networks import act, preprocess_image

HORIZON = 10


def with_settings(**changes: object) -> SacConfig:
    return SacConfig(**{**SMALL.model_dump(), **changes})


def make_batch(size: int = 6, seed: int = 0, **replacements: torch.Tensor) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    batch = Batch(
        images=torch.randint(0, 256, (2 * size, 64, 64, 3), dtype=torch.uint8, generator=generator),
        states=normal(2 * size, 8),
        noise=normal(size, SMALL.noise_dim),
        reward=normal(size),
        discount=torch.rand(size, generator=generator),
    )
    return batch._replace(**replacements)


def update(agent: SacAgent, batch: Batch, update_actor: bool) -> torch.Tensor:
    """An update with the agent's own random numbers."""
    random = agent.random_numbers(batch.reward.shape[0])
    random.draw_(agent.generator)
    metrics = agent.learn(batch, random, update_actor)
    agent.updates += 1
    return metrics


def metric(metrics: torch.Tensor, name: str) -> float:
    return metrics[METRIC_NAMES.index(name)].item()


def scrambled_agent(config: SacConfig, seed: int = 0, scale: float = 0.3) -> SacAgent:
    """An agent whose weights, target included, are far from the initialisation and from each other."""
    agent = SacAgent(config, HORIZON, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for module in (agent.actor, agent.critic, agent.target_critic):
        module.flat.copy_(torch.randn(module.flat.shape, generator=generator) * scale)
    return agent


def draw(agent: SacAgent, batch: Batch) -> torch.Tensor:
    """The normal numbers [2, B, A] that the agent's next update will draw."""
    generator = torch.Generator()
    generator.set_state(agent.generator.get_state())
    random = agent.random_numbers(batch.reward.shape[0])
    random.draw_(generator)
    return random.normal


def policy_sample(
    agent: SacAgent, image: torch.Tensor, state: torch.Tensor, eps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and log-probability of the unscaled action, by torch.distributions in float64."""
    mean, log_std = agent.actor(preprocess_image(image, agent.config), state)
    mean, std = mean.double(), log_std.double().exp()
    u = mean + std * eps.double()
    distribution = TransformedDistribution(Independent(Normal(mean, std), 1), TanhTransform(cache_size=1))
    action = distribution.transforms[0](u)
    return (action * agent.config.action_magnitude).float(), distribution.log_prob(action)


# --- discount ---------------------------------------------------------------------------------------------


def test_discount_counts_the_executed_steps_and_stops_at_success_only() -> None:
    steps = torch.tensor([5, 2, 5, 1])
    terminal = torch.tensor([False, False, True, True])  # the second: cut short by the time limit
    per_step = transition_discount(with_settings(gamma=0.9, discount_per="env_step"), steps, terminal)
    assert per_step.dtype == torch.float32
    assert per_step.tolist() == pytest.approx([0.59049, 0.81, 0.0, 0.0])
    decision = with_settings(gamma=0.9, discount_per="decision")
    assert transition_discount(decision, steps, terminal).tolist() == pytest.approx([0.9, 0.9, 0.0, 0.0])
    as_bytes = transition_discount(decision, steps.to(torch.uint8), terminal.to(torch.uint8))
    assert as_bytes.tolist() == pytest.approx([0.9, 0.9, 0.0, 0.0])


def test_nothing_after_a_terminal_transition_matters() -> None:
    batch = make_batch(discount=torch.zeros(6))
    other = batch._replace(images=batch.images.clone(), states=batch.states.clone())
    other.images[6:] ^= 255
    other.states[6:] += 3
    first, second = (scrambled_agent(with_settings(entropy_backup=True)) for _ in range(2))
    torch.testing.assert_close(update(first, batch, True), update(second, other, True), rtol=0, atol=0)
    assert torch.equal(first.critic.flat, second.critic.flat)


# --- losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["mean", "min"])
@pytest.mark.parametrize("entropy_backup", [False, True])
def test_losses_and_target_by_hand(aggregation: str, entropy_backup: bool) -> None:
    config = with_settings(
        q_aggregation=aggregation, entropy_backup=entropy_backup, initial_alpha=0.7, action_magnitude=0.6
    )
    agent, batch = scrambled_agent(config), make_batch()
    eps = draw(agent, batch)
    combine: Callable[[torch.Tensor], torch.Tensor] = (
        (lambda q: q.mean(0)) if aggregation == "mean" else (lambda q: q.min(0).values)
    )
    pixels, next_pixels = (preprocess_image(image, config) for image in batch.images.chunk(2))
    with torch.no_grad():
        next_noise, next_log_prob = policy_sample(agent, batch.images[6:], batch.states[6:], eps[0])
        value = combine(agent.target_critic(next_pixels, batch.states[6:], next_noise)).double()
        if entropy_backup:
            value = value - 0.7 * next_log_prob
        target = batch.reward + batch.discount * value
        q = agent.critic(pixels, batch.states[:6], batch.noise).double()
        new_noise, new_log_prob = policy_sample(agent, batch.images[:6], batch.states[:6], eps[1])
        new_q = combine(agent.critic(pixels, batch.states[:6], new_noise)).double()
    expected = {
        "train/sac/critic_loss": (q - target).square().mean(),
        "train/sac/actor_loss": (0.7 * new_log_prob - new_q).mean(),
        "train/actor/entropy": -new_log_prob.mean(),
        "train/sac/alpha_loss": 0.7 * (-new_log_prob - config.target_entropy).mean(),
        "train/sac/alpha": torch.tensor(0.7),
        "train/sac/q_mean": q.mean(),
        "train/sac/target_q_mean": target.mean(),
    }
    metrics = update(agent, batch, True)
    assert metrics.dtype == torch.float32
    assert metrics.shape == (9,)
    for name, value in expected.items():
        assert metric(metrics, name) == pytest.approx(value.item(), rel=2e-5, abs=2e-5), name


def test_the_log_volume_of_the_magnitude_is_not_in_the_entropy() -> None:
    entropies = []
    for magnitude in (0.1, 1.0):
        agent = scrambled_agent(with_settings(action_magnitude=magnitude))
        entropies.append(metric(update(agent, make_batch(), True), "train/actor/entropy"))
    assert entropies[0] == entropies[1]


def test_the_critic_sees_the_stored_noise_even_beyond_the_magnitude() -> None:
    agent = scrambled_agent(with_settings(action_magnitude=0.5))
    small, large = torch.full((6, 4), 0.5), torch.full((6, 4), 2.0)
    first, second = (update(agent, make_batch(noise=noise), False) for noise in (small, large))
    assert abs(metric(first, "train/sac/q_mean") - metric(second, "train/sac/q_mean")) > 1e-2


# --- optimisation -----------------------------------------------------------------------------------------


def test_critic_and_actor_take_one_adam_step_along_their_own_gradient() -> None:
    config = with_settings(
        actor_lr=1e-3, critic_lr=5e-4, actor_betas=(0.8, 0.9), actor_grad_clip=None, critic_grad_clip=None
    )
    agent, batch = scrambled_agent(config), make_batch()
    eps = draw(agent, batch)
    pixels = preprocess_image(batch.images[:6], config)
    with torch.no_grad():
        next_noise, _ = policy_sample(agent, batch.images[6:], batch.states[6:], eps[0])
        next_pixels = preprocess_image(batch.images[6:], config)
        value = agent.target_critic(next_pixels, batch.states[6:], next_noise).mean(0)
        target = batch.reward + batch.discount * value
    critic_loss = (agent.critic(pixels, batch.states[:6], batch.noise) - target).square().mean()
    noise, log_prob = policy_sample(agent, batch.images[:6], batch.states[:6], eps[1])
    actor_loss = (config.initial_alpha * log_prob - agent.critic(pixels, batch.states[:6], noise).mean(0)).mean()
    for name, loss, lr in (("critic", critic_loss, 5e-4), ("actor", actor_loss, 1e-3)):
        module = getattr(agent, name)
        gradients = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
        gradient = torch.cat([gradient.reshape(-1) for gradient in gradients])
        copy = scrambled_agent(config)
        before = module.flat.clone()
        metrics = update(copy, batch, True)
        moved = getattr(copy, name).flat - before
        # The bias-corrected first step of Adam does not depend on the betas: -lr * g / (|g| + eps).
        expected = -lr * gradient / (gradient.abs() + 1e-8)
        certain = gradient.abs() > 1e-4
        torch.testing.assert_close(moved[certain], expected[certain], rtol=1e-2, atol=1e-7)
        assert certain.float().mean() > 0.3
        assert metric(metrics, f"train/{name}/grad_norm") == pytest.approx(gradient.norm().item(), rel=1e-3)
        beta = {"critic": 0.9, "actor": 0.8}[name]
        moment = copy.state_tensors()[f"{name}.adam.exp_avg"]
        torch.testing.assert_close(moment, (1 - beta) * gradient, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_the_actors_loss_asks_the_critic_from_before_or_after_its_step(moment: str) -> None:
    """A reference that makes the steps one by one, with torch's own Adam and clipping."""
    config = with_settings(critic_in_actor_loss=moment, critic_lr=0.02, critic_grad_clip=0.5, actor_grad_clip=None)
    agent, stepped, batch = scrambled_agent(config), scrambled_agent(config), make_batch()
    eps = draw(agent, batch)
    pixels, next_pixels = (preprocess_image(image, config) for image in batch.images.chunk(2))
    with torch.no_grad():
        next_noise, _ = policy_sample(stepped, batch.images[6:], batch.states[6:], eps[0])
        value = stepped.target_critic(next_pixels, batch.states[6:], next_noise).mean(0)
    q = stepped.critic(pixels, batch.states[:6], batch.noise)
    optimiser = torch.optim.Adam(stepped.critic.parameters(), 0.02)
    (q - (batch.reward + batch.discount * value)).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(stepped.critic.parameters(), 0.5)
    optimiser.step()
    asked = stepped.critic if moment == "after" else scrambled_agent(config).critic
    noise, log_prob = policy_sample(stepped, batch.images[:6], batch.states[:6], eps[1])
    loss = (config.initial_alpha * log_prob - asked(pixels, batch.states[:6], noise).mean(0)).mean()
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(stepped.actor.parameters()))])

    metrics = update(agent, batch, True)
    torch.testing.assert_close(agent.critic.flat, stepped.critic.flat, rtol=1e-4, atol=1e-5)
    assert metric(metrics, "train/sac/actor_loss") == pytest.approx(loss.item(), rel=1e-4)
    assert (agent.actor.flat_grad - gradient).norm() < 1e-4 * gradient.norm()
    other = scrambled_agent(with_settings(critic_lr=0.02, critic_grad_clip=0.5, actor_grad_clip=None))
    update(other, batch, True)
    same = (other.actor.flat_grad - gradient).norm() < 1e-4 * gradient.norm()
    assert same == (moment == "before")  # and the two moments differ by far more than rounding
    torch.testing.assert_close(other.critic.flat, agent.critic.flat, rtol=0, atol=0)


def test_target_moves_by_tau_towards_the_updated_critic() -> None:
    agent = scrambled_agent(with_settings(tau=0.1))
    before = agent.target_critic.flat.clone()
    update(agent, make_batch(), False)
    expected = 0.9 * before.double() + 0.1 * agent.critic.flat.double()
    torch.testing.assert_close(agent.target_critic.flat.double(), expected, rtol=1e-6, atol=1e-7)
    fresh = SacAgent(SMALL, HORIZON)
    assert torch.equal(fresh.target_critic.flat, fresh.critic.flat)


@pytest.mark.parametrize("alpha_type", ["softplus", "exp"])
@pytest.mark.parametrize("alpha", [0.005, 1.0, 30.0])
def test_initial_temperature_is_honoured(alpha_type: str, alpha: float) -> None:
    agent = SacAgent(with_settings(alpha_type=alpha_type, initial_alpha=alpha), HORIZON)
    metrics = update(agent, make_batch(), False)
    assert metric(metrics, "train/sac/alpha") == pytest.approx(alpha, rel=2e-6)


@pytest.mark.parametrize("alpha_type", ["softplus", "exp"])
@pytest.mark.parametrize("target_entropy", [-3.0, 4.0])
def test_temperature_step_by_hand(alpha_type: str, target_entropy: float) -> None:
    config = with_settings(
        alpha_type=alpha_type,
        initial_alpha=0.5,
        target_entropy=target_entropy,
        alpha_lr=0.01,
        alpha_grad_clip=1.5,
    )
    agent = SacAgent(config, HORIZON)  # entropy near that of tanh(N(0, I)), about 0.6 per dimension
    raw = math.log(0.5) if alpha_type == "exp" else math.log(math.exp(0.5) - 1)
    assert agent.raw_alpha.item() == pytest.approx(raw)
    metrics = update(agent, make_batch(), True)
    excess = metric(metrics, "train/actor/entropy") - target_entropy
    assert metric(metrics, "train/sac/alpha_loss") == pytest.approx(0.5 * excess, rel=1e-5)
    slope = 0.5 if alpha_type == "exp" else 1 / (1 + math.exp(-raw))
    gradient = max(-1.5, min(1.5, slope * excess))
    # Too much entropy lowers the temperature, too little raises it.
    assert agent.raw_alpha.item() == pytest.approx(raw - 0.01 * math.copysign(1.0, excess), abs=1e-6)
    state = agent.state_tensors()
    assert state["alpha.adam.exp_avg"].item() == pytest.approx(0.1 * gradient, rel=1e-5)
    assert state["alpha.adam.exp_avg_sq"].item() == pytest.approx(0.001 * gradient**2, rel=1e-5)


def test_gradients_are_clipped_per_network() -> None:
    config = with_settings(actor_grad_clip=0.05, critic_grad_clip=2.0)
    calm, wild = scrambled_agent(config), scrambled_agent(config)
    batch = make_batch()
    huge = batch._replace(reward=batch.reward * 1e6)
    calm_metrics, wild_metrics = update(calm, batch, True), update(wild, huge, True)
    assert metric(wild_metrics, "train/critic/grad_norm") > 1e4
    assert wild.critic.flat_grad.norm().item() == pytest.approx(2.0, rel=1e-4)
    # The actor's gradient does not depend on the rewards, and neither does its clipping.
    assert metric(wild_metrics, "train/actor/grad_norm") == metric(calm_metrics, "train/actor/grad_norm") > 0.05
    assert torch.equal(wild.actor.flat, calm.actor.flat)
    assert calm.actor.flat_grad.norm().item() == pytest.approx(0.05, rel=1e-4)
    off = scrambled_agent(with_settings(critic_grad_clip=None))
    update(off, huge, False)
    assert off.critic.flat_grad.norm() > 1e4


def test_actor_and_temperature_wait_for_the_critic() -> None:
    agent, batch = SacAgent(with_settings(train_actor_steps=3), HORIZON), make_batch()
    actor, raw_alpha = agent.actor.flat.clone(), agent.raw_alpha.item()
    due = []
    for _ in range(3):
        critic = agent.critic.flat.clone()
        due.append(agent.actor_due)
        metrics = update(agent, batch, agent.actor_due)
        assert not torch.equal(agent.critic.flat, critic)
        for name in ("sac/actor_loss", "actor/entropy", "actor/grad_norm", "sac/alpha_loss"):
            assert math.isnan(metric(metrics, f"train/{name}"))
    assert torch.equal(agent.actor.flat, actor)
    assert agent.raw_alpha.item() == raw_alpha
    due.append(agent.actor_due)
    metrics = update(agent, batch, agent.actor_due)
    assert due == [False, False, False, True]
    assert agent.updates == 4
    assert metrics.isfinite().all()
    assert not torch.equal(agent.actor.flat, actor)
    assert agent.raw_alpha.item() != raw_alpha


def test_augmentation_is_drawn_for_each_image_and_side() -> None:
    batch = make_batch(size=8)
    images = batch.images[:1].expand(16, -1, -1, -1)
    plain, shifted, jittered = (
        SacAgent(with_settings(augmentation=augmentation, image_pool=1, augmentation_pad=2), HORIZON)
        for augmentation in ("none", "crop", "crop_colour")
    )
    random = jittered.random_numbers(8)
    random.draw_(jittered.generator)
    original, _ = plain._pixels(images, random.augmentation)
    pixels, next_pixels = shifted._pixels(images, random.augmentation)
    inner = original[:, :, 8:-8, 8:-8]
    offsets = []
    for image in torch.cat([pixels, next_pixels]):
        found = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(image[:, 8 - dy : 56 - dy, 8 - dx : 56 - dx], inner[0])
        ]
        assert len(found) == 1
        offsets += found
    assert len(set(offsets)) > 4
    assert offsets[:8] != offsets[8:]
    colours, _ = jittered._pixels(images, random.augmentation)
    assert (colours - pixels).abs().max() > 0.02
    assert colours.min() >= 0
    assert colours.max() <= 1
    assert update(jittered, batch, True).isfinite().all()


# --- checkpoints and determinism --------------------------------------------------------------------------


def test_a_loaded_agent_continues_bit_for_bit(tmp_path: Path) -> None:
    config = with_settings(augmentation="crop", train_actor_steps=2)
    agent = SacAgent(config, HORIZON, seed=1)
    for step in range(5):
        update(agent, make_batch(seed=step), agent.actor_due)
    save_file(agent.state_tensors(), tmp_path / "agent.safetensors")
    other = SacAgent(config, HORIZON, seed=2)
    address = other.critic.weights[0].data_ptr()
    other.load_state_tensors(load_file(tmp_path / "agent.safetensors"))
    assert other.critic.weights[0].data_ptr() == address
    assert other.updates == 5
    for step in range(5, 8):
        first, second = (update(a, make_batch(seed=step), a.actor_due) for a in (agent, other))
        assert torch.equal(first, second)
    for name, tensor in agent.state_tensors().items():
        assert torch.equal(tensor, other.state_tensors()[name]), name


def test_saved_tensors_do_not_change_with_the_agent() -> None:
    agent = SacAgent(SMALL, HORIZON)
    state = agent.state_tensors()
    copies = {name: tensor.clone() for name, tensor in state.items()}
    update(agent, make_batch(), True)
    assert all(torch.equal(state[name], copies[name]) for name in state)


def test_unfit_checkpoints_are_refused_and_change_nothing() -> None:
    agent = SacAgent(SMALL, HORIZON)
    before = agent.state_tensors()
    good = SacAgent(SMALL, HORIZON, seed=5).state_tensors()
    missing = {name: tensor for name, tensor in good.items() if name != "actor.adam.exp_avg"}
    with pytest.raises(ValueError, match=r"no tensor 'actor\.adam\.exp_avg'"):
        agent.load_state_tensors(missing)
    with pytest.raises(ValueError, match=r"'target_critic\.flat'.*shape \(3,\)"):
        agent.load_state_tensors({**good, "target_critic.flat": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"'alpha\.raw'.*float64"):
        agent.load_state_tensors({**good, "alpha.raw": torch.zeros((), dtype=torch.float64)})
    other = SacAgent(with_settings(conv_channels=[9]), HORIZON).state_tensors()
    with pytest.raises(ValueError, match="laid out differently"):  # as if the lengths were equal by chance
        agent.load_state_tensors({**good, "layout": other["layout"]})
    assert all(torch.equal(tensor, before[name]) for name, tensor in agent.state_tensors().items())


def test_updates_are_reproducible_by_seed() -> None:
    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(int(torch.randint(1 << 30, ())))  # the global random state must not matter
        agent = SacAgent(with_settings(augmentation="crop_colour"), HORIZON, seed=seed)
        for step in range(3):
            update(agent, make_batch(seed=step), True)
        return agent.actor.flat.clone()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


# --- acting -----------------------------------------------------------------------------------------------


def test_act_never_synchronises_and_needs_few_kernels() -> None:
    agent, batch = SacAgent(SMALL, HORIZON), make_batch()
    for deterministic in (False, True):
        with OperationTrace(guarded=True) as trace:
            act(agent.actor, batch.images[:6], batch.states[:6], batch.noise, torch.zeros(6), deterministic)
        assert 10 < trace.kernels < 40


# --- learning ---------------------------------------------------------------------------------------------


def test_learns_a_bandit_whose_best_noise_depends_on_the_image() -> None:
    config = with_settings(
        action_magnitude=1.0,
        actor_lr=3e-3,
        critic_lr=3e-3,
        initial_alpha=0.01,
        alpha_lr=1e-3,
        target_entropy=-4.0,
    )
    agent = SacAgent(config, HORIZON, seed=0)
    generator = torch.Generator().manual_seed(0)
    size = 64

    def observe() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        red = torch.rand(size, generator=generator) < 0.5
        colour = torch.where(red[:, None], torch.tensor([200, 30, 30]), torch.tensor([30, 30, 200]))
        texture = torch.randint(0, 50, (size, 64, 64, 3), generator=generator)
        image = (colour[:, None, None] + texture).to(torch.uint8)
        return image, torch.randn(size, 8, generator=generator) * 0.1, torch.where(red, 0.6, -0.6)

    def error(deterministic: bool = True) -> float:
        image, state, best = observe()
        noise = act(agent.actor, image, state, torch.zeros(size, 4), torch.zeros(size), deterministic)
        return (noise[:, 0] - best).abs().mean().item()

    before = error()
    for _ in range(300):
        image, state, best = observe()
        eps = torch.randn(size, 4, generator=generator)
        noise = act(agent.actor, image, state, eps, torch.full((size,), float(agent.updates < 60)))
        reward = -(noise[:, 0] - best).square()
        batch = Batch(torch.cat([image, image]), torch.cat([state, state]), noise, reward, torch.zeros(size))
        update(agent, batch, agent.actor_due)
    assert before > 0.5
    assert error() < 0.3  # 0.06 to 0.25 over six seeds; a policy that ignores the image is at 0.6
