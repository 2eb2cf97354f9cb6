"""DSRL-NA against a reference of its own, which is written from the paper's algorithm, and what each loss must not do.

The reference shares no code with the agent: networks are evaluated from their named weights, head by head and in
float64, distributions, Adam and clipping are torch's.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support.sac_configs import SMALL
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from dsrl_async.config.settings import SacConfig
from dsrl_async.host.tracing import OperationTrace
from dsrl_async.sac import IMITATION_METRIC_NAME, METRIC_NAMES, NOISE_CRITIC_METRIC_NAMES, metric_names
from dsrl_async.sac.agent import Batch, RandomNumbers, SacAgent
from dsrl_async.sac.na import NaAgent, Observations

HORIZON, CHUNK, ACTION_DIM = 5, 3, 2
WIDTH = CHUNK * ACTION_DIM


def with_settings(**changes: object) -> SacConfig:
    return SacConfig(**{**SMALL.model_dump(), "algorithm": "na", **changes})


def make_agent(config: SacConfig, seed: int = 0) -> NaAgent:
    return NaAgent(config, HORIZON, CHUNK, ACTION_DIM, seed=seed)


def scrambled_agent(config: SacConfig) -> NaAgent:
    """An agent whose weights, target included, are far from the initialisation and from each other."""
    agent, generator = make_agent(config), torch.Generator().manual_seed(1)
    for module in (agent.actor, agent.critic, agent.target_critic, agent.noise_critic):
        module.flat.copy_(torch.randn(module.flat.shape, generator=generator) * 0.3)
    return agent


def make_batch(seed: int, size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        images=torch.randint(0, 256, (2 * size, 64, 64, 3), dtype=torch.uint8, generator=generator),
        states=torch.randn(2 * size, 8, generator=generator),
        noise=torch.randn(size, WIDTH, generator=generator),
        reward=torch.randn(size, generator=generator),
        discount=torch.rand(size, generator=generator),
    )


def observations(batch: Batch) -> Observations:
    size = len(batch.reward)
    return Observations(batch.images[:size], batch.states[:size])


def drawn(numbers: RandomNumbers, agent: NaAgent) -> RandomNumbers:
    numbers.draw_(agent.generator)
    return numbers


def at(flow: Callable[[Tensor, Tensor], Tensor], states: Tensor) -> Callable[[Tensor], Tensor]:
    """The flow at these states."""
    return lambda noise: flow(states, noise)


def make_flow(width: int, seed: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    """A policy: actions [B, WIDTH] from states [B, 8] and noise [B, width], in the dtype of the noise."""
    generator = torch.Generator().manual_seed(seed)
    of_noise, of_state = (torch.randn(size, WIDTH, generator=generator) for size in (width, 8))
    return lambda state, noise: torch.sin(
        noise @ of_noise.to(noise.dtype) + state.to(noise.dtype) @ of_state.to(noise.dtype)
    )


# --- the reference ----------------------------------------------------------------------------------------


class Network:
    """The weights of a network by name, float64, trained by torch's Adam."""

    def __init__(self, module: nn.Module, config: SacConfig, lr: float | None) -> None:
        self.config = config
        self.weights = {
            name: parameter.detach().double().requires_grad_(lr is not None)
            for name, parameter in module.named_parameters()
        }
        self.optimiser = None if lr is None else torch.optim.Adam(self.weights.values(), lr)

    def step(self, loss: Tensor, limit: float | None) -> Tensor:
        """Steps along the clipped gradient; returns the gradient from before clipping."""
        assert self.optimiser is not None
        assert limit is not None
        gradients = torch.autograd.grad(loss, list(self.weights.values()))
        for weight, gradient in zip(self.weights.values(), gradients, strict=True):
            weight.grad = gradient.clone()
        nn.utils.clip_grad_norm_(self.weights.values(), limit)
        self.optimiser.step()
        return torch.cat([gradient.flatten() for gradient in gradients])

    def flat(self) -> Tensor:
        return torch.cat([weight.detach().flatten() for weight in self.weights.values()])

    def encode(self, image: Tensor, state: Tensor) -> Tensor:
        config, w = self.config, self.weights
        x = F.avg_pool2d(image.double().permute(0, 3, 1, 2) / 255, config.image_pool)
        x = F.conv2d(x, w["encoder.convolutions.0.weight"], w["encoder.convolutions.0.bias"], config.conv_strides[0])
        x = x.relu().permute(0, 2, 3, 1).flatten(1)
        parts = []
        for name, value in (("image", x), ("state", state.double())):
            weight, bias = w[f"encoder.{name}_projection.weight"], w[f"encoder.{name}_projection.bias"]
            scale, shift = w[f"encoder.{name}_norm.weight"], w[f"encoder.{name}_norm.bias"]
            parts.append(torch.tanh(F.layer_norm(F.linear(value, weight, bias), scale.shape, scale, shift)))
        return torch.cat(parts, 1)

    def distribution(self, image: Tensor, state: Tensor) -> TransformedDistribution:
        w, x = self.weights, self.encode(image, state)
        for layer in range(len(self.config.hidden_dims)):
            x = F.linear(x, w[f"hidden.{layer}.weight"], w[f"hidden.{layer}.bias"]).relu()
        mean, log_std = F.linear(x, w["output.weight"], w["output.bias"]).chunk(2, 1)
        std = log_std.clamp(self.config.log_std_min, self.config.log_std_max).exp()
        return TransformedDistribution(Independent(Normal(mean, std), 1), TanhTransform(cache_size=1))

    def q(self, image: Tensor, state: Tensor, judged: Tensor) -> list[Tensor]:
        """One Q value for each observation, of each head."""
        features, heads, w = self.encode(image, state), [], self.weights
        last = len(self.config.hidden_dims)
        for head in range(self.config.num_q_heads):
            x = torch.cat([features, judged], 1)
            for layer in range(last):
                x = x @ w[f"weights.{layer}"][head] + w[f"biases.{layer}"][head]
                scale, shift = w[f"norm_scales.{layer}"][head, 0], w[f"norm_shifts.{layer}"][head, 0]
                x = F.layer_norm(x, scale.shape, scale, shift).relu()
            heads.append((x @ w[f"weights.{last}"][head] + w[f"biases.{last}"][head]).squeeze(1))
        return heads


class Reference:
    """DSRL-NA's block: an update of Q^A, actor, temperature and target, then steps of Q^W."""

    def __init__(self, agent: NaAgent) -> None:
        config = self.config = agent.config
        self.actor = Network(agent.actor, config, config.actor_lr)
        self.critic = Network(agent.critic, config, config.critic_lr)
        self.target = Network(agent.target_critic, config, None)
        self.noise_critic = Network(agent.noise_critic, config, config.critic_lr)
        self.raw_alpha = agent.raw_alpha.double().clone().requires_grad_()
        self.alpha_optimiser = torch.optim.Adam([self.raw_alpha], config.alpha_lr)
        self.flow = make_flow(agent.action_dim)

    def aggregate(self, heads: list[Tensor]) -> Tensor:
        together = torch.stack(heads)
        return together.min(0).values if self.config.q_aggregation == "min" else together.mean(0)

    def sample(self, image: Tensor, state: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """The noise that the policy is given, and the log-probability of the action that it is a multiple of."""
        distribution = self.actor.distribution(image, state)
        assert isinstance(distribution.base_dist, Independent)
        base, tanh = distribution.base_dist.base_dist, distribution.transforms[0]
        assert isinstance(base, Normal)
        action = tanh(base.loc + base.scale * eps.double())
        return action * self.config.action_magnitude, distribution.log_prob(action)

    def update(self, batch: Batch, eps: Tensor) -> dict[str, Tensor]:
        config, size = self.config, len(batch.reward)
        image, next_image = batch.images[:size], batch.images[size:]
        state, next_state = batch.states[:size], batch.states[size:]
        alpha = F.softplus(self.raw_alpha)
        # y = r + gamma^n (1 - d) [agg Q^A_target(s', F(s', w')) - alpha log pi(w'|s')]
        with torch.no_grad():
            next_noise, next_log_prob = self.sample(next_image, next_state, eps[0])
            value = self.aggregate(self.target.q(next_image, next_state, self.flow(next_state, next_noise)))
            if config.entropy_backup:
                value = value - alpha * next_log_prob
            y = batch.reward.double() + batch.discount.double() * value
        # L_A = mean over heads of (Q^A_i(s, a) - y)^2, with the executed action
        q = self.critic.q(image, state, batch.noise.double())
        critic_loss = torch.stack([F.mse_loss(head, y) for head in q]).mean()
        # L_pi = alpha log pi(w|s) - agg Q^W(s, w)
        noise, log_prob = self.sample(image, state, eps[1])
        actor_loss = (alpha.detach() * log_prob - self.aggregate(self.noise_critic.q(image, state, noise))).mean()
        # the temperature's loss steers the entropy
        alpha_loss = -(alpha * (log_prob.detach() + config.target_entropy)).mean()
        (self.raw_alpha.grad,) = torch.autograd.grad(alpha_loss, [self.raw_alpha])
        gradients = {
            "critic": self.critic.step(critic_loss, config.critic_grad_clip),
            "actor": self.actor.step(actor_loss, config.actor_grad_clip),
        }
        assert config.alpha_grad_clip is not None
        nn.utils.clip_grad_norm_([self.raw_alpha], config.alpha_grad_clip)
        self.alpha_optimiser.step()
        for name, weight in self.target.weights.items():
            weight.mul_(1 - config.tau).add_(config.tau * self.critic.weights[name].detach())
        losses = {"critic_loss": critic_loss, "actor_loss": actor_loss, "alpha_loss": alpha_loss, "alpha": alpha}
        return {**losses, **gradients, "target_q_mean": y.mean(), "entropy": -log_prob.mean()}

    def distil(self, image: Tensor, state: Tensor, noise: Tensor) -> dict[str, Tensor]:
        # L_W = mean over heads of (Q^W_i(s, w) - Q^A_i(s, F(s, w)))^2, w ~ N(0, I)
        noise = noise.double()
        if self.config.noise_critic_noise == "squashed":
            noise = self.config.action_magnitude * torch.tanh(noise)
        with torch.no_grad():
            judged = self.critic.q(image, state, self.flow(state, noise))
        pairs = zip(self.noise_critic.q(image, state, noise), judged, strict=True)
        loss = torch.stack([F.mse_loss(own, of_action) for own, of_action in pairs]).mean()
        return {"noise_critic_loss": loss, "noise_critic": self.noise_critic.step(loss, self.config.critic_grad_clip)}


SETTINGS = [
    {},
    {"q_aggregation": "min", "entropy_backup": True, "initial_alpha": 0.7, "action_magnitude": 1.5},
    {"noise_critic_noise": "squashed", "action_magnitude": 0.3},
    {"noise_layout": "per_slot", "critic_grad_clip": 0.05, "actor_grad_clip": 0.02, "alpha_grad_clip": 0.1},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_three_blocks_equal_the_reference(settings: dict[str, object]) -> None:
    agent = scrambled_agent(with_settings(noise_critic_steps=2, **settings))
    reference, flow = Reference(agent), make_flow(agent.action_dim)
    random, distilling = agent.random_numbers(6), agent.distilling_numbers(6)
    assert distilling.normal.shape == (6, 4 * (HORIZON if settings.get("noise_layout") == "per_slot" else 1))

    def check(ours: Tensor, names: tuple[str, ...], theirs: dict[str, Tensor]) -> None:
        for name, value in zip(names, ours.tolist(), strict=True):
            if (short := name.rpartition("/")[2]) in theirs:
                assert value == pytest.approx(theirs[short].item(), rel=1e-4, abs=1e-5), name

    def close(ours: Tensor, theirs: Tensor, rel: float) -> bool:
        return bool((ours.double() - theirs).norm() < rel * theirs.norm())

    def clipped(gradient: Tensor, limit: float | None) -> Tensor:
        assert limit is not None
        return gradient * min(1.0, limit / float(gradient.norm()))

    critic_clip, actor_clip = agent.config.critic_grad_clip, agent.config.actor_grad_clip
    for block in range(3):
        batch = make_batch(block)
        random.draw_(agent.generator)
        metrics = agent.learn(batch, random, True, at(flow, batch.states[6:]))
        theirs = reference.update(batch, random.normal)
        check(metrics, METRIC_NAMES, theirs)
        for name, limit in (("critic", critic_clip), ("actor", actor_clip)):
            assert close(getattr(agent, name).flat_grad, clipped(theirs[name], limit), 1e-4), name
        for step in range(2):
            fresh = observations(make_batch(100 * block + step + 10))
            distilling.draw_(agent.generator)
            metrics = agent.distil(fresh, distilling, at(flow, fresh.states))
            theirs = reference.distil(fresh.images, fresh.states, distilling.normal)
            check(metrics, NOISE_CRITIC_METRIC_NAMES, theirs)
            assert close(agent.noise_critic.flat_grad, clipped(theirs["noise_critic"], critic_clip), 1e-4)
        assert agent.raw_alpha.item() == pytest.approx(reference.raw_alpha.item(), rel=1e-5)
    for name, network in (
        ("actor", reference.actor),
        ("critic", reference.critic),
        ("target_critic", reference.target),
        ("noise_critic", reference.noise_critic),
    ):
        assert close(getattr(agent, name).flat, network.flat(), 1e-4), name


# --- what each loss must not do ---------------------------------------------------------------------------


def test_the_noise_critic_learns_what_a_known_critic_says_of_a_linear_flow() -> None:
    """The loss goes to 0: noise is worth what the critic, which does not change, says of the actions."""
    agent = scrambled_agent(with_settings(critic_lr=3e-3))
    before = {name: tensor.clone() for name, tensor in agent._tensors().items() if not name.startswith("noise_critic")}
    matrix = torch.randn(agent.action_dim, WIDTH, generator=torch.Generator().manual_seed(2)) * 0.2
    batch, numbers = make_batch(0, 64), agent.distilling_numbers(64)
    losses = []
    for _ in range(300):
        losses.append(agent.distil(observations(batch), drawn(numbers, agent), lambda noise: noise @ matrix)[0].item())
    assert losses[0] > 0.2
    assert sum(losses[-10:]) / 10 < 0.02 * losses[0]
    for name, tensor in before.items():
        assert torch.equal(tensor, agent._tensors()[name]), name


def test_nothing_but_the_noise_critic_is_asked_what_noise_is_worth() -> None:
    """The actor's step depends on the noise critic, and on the critic in no way."""
    batch = make_batch(0)

    def actor_after(change: str | None) -> Tensor:
        agent = scrambled_agent(with_settings())
        if change is not None:
            getattr(agent, change).flat.mul_(-1.7)
        random = drawn(agent.random_numbers(6), agent)
        agent.learn(batch, random, True, lambda noise: torch.zeros(6, WIDTH))
        return agent.actor.flat.clone()

    assert torch.equal(actor_after(None), actor_after("critic"))
    assert torch.equal(actor_after(None), actor_after("target_critic"))
    assert not torch.equal(actor_after(None), actor_after("noise_critic"))


def test_no_gradient_goes_through_the_policy() -> None:
    agent = scrambled_agent(with_settings())
    asked: list[Tensor] = []

    def flow(noise: Tensor) -> Tensor:
        asked.append(noise)
        assert not noise.requires_grad
        assert not torch.is_grad_enabled()
        return noise[:, :1].expand(-1, WIDTH)

    agent.learn(make_batch(0), drawn(agent.random_numbers(6), agent), True, flow)
    agent.distil(observations(make_batch(0)), drawn(agent.distilling_numbers(6), agent), flow)
    assert len(asked) == 2
    # the actor's noise is bounded, and the noise to learn from is the policy's own
    assert asked[0].abs().max() <= agent.config.action_magnitude < asked[1].abs().max()


# --- bookkeeping ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "counts"), [(0.5, [0, 1, 0, 1, 0, 1]), (2.0, [2] * 6), (0.25, [0, 0, 0, 1, 0, 0])])
def test_steps_of_the_noise_critic_are_spread_over_the_updates(steps: float, counts: list[int]) -> None:
    agent = make_agent(with_settings(noise_critic_steps=steps))
    assert [agent.distilling_steps(update) for update in range(6)] == counts


def test_sizes_of_the_networks_and_names_of_the_metrics() -> None:
    agent, plain = make_agent(with_settings()), SacAgent(SMALL, HORIZON)
    assert torch.equal(agent.actor.flat, plain.actor.flat)
    assert agent.critic.weights[0].shape[1] == plain.critic.weights[0].shape[1] + WIDTH - 4
    assert agent.noise_critic.weights[0].shape == plain.critic.weights[0].shape
    assert not torch.equal(agent.noise_critic.flat, plain.critic.flat)  # weights of its own
    assert torch.equal(agent.critic.flat, agent.target_critic.flat)
    assert metric_names("sac", False) == METRIC_NAMES
    assert metric_names("na", False) == (*METRIC_NAMES, *NOISE_CRITIC_METRIC_NAMES)
    assert metric_names("sac", True) == (*METRIC_NAMES, IMITATION_METRIC_NAME)
    assert metric_names("na", True) == (*METRIC_NAMES, IMITATION_METRIC_NAME, *NOISE_CRITIC_METRIC_NAMES)


def steps_of(agent: NaAgent, first: int, last: int) -> Iterator[Tensor]:
    """Metrics of updates and of distilling steps, in turns."""
    flow = make_flow(agent.action_dim)
    for step in range(first, last):
        batch = make_batch(step)
        random = drawn(agent.random_numbers(6), agent)
        yield agent.learn(batch, random, True, at(flow, batch.states[6:]))
        fresh = observations(make_batch(step + 50))
        numbers = drawn(agent.distilling_numbers(6), agent)
        yield agent.distil(fresh, numbers, at(flow, fresh.states))
        agent.updates += 1


def test_a_loaded_agent_continues_bit_for_bit(tmp_path: Path) -> None:
    config = with_settings(augmentation="crop")
    agent, other = make_agent(config, 1), make_agent(config, 2)
    list(steps_of(agent, 0, 3))
    save_file(agent.state_tensors(), tmp_path / "agent.safetensors")
    other.load_state_tensors(load_file(tmp_path / "agent.safetensors"))
    for first, second in zip(steps_of(agent, 3, 5), steps_of(other, 3, 5), strict=True):
        assert torch.equal(first, second)
    for name, tensor in agent.state_tensors().items():
        assert torch.equal(tensor, other.state_tensors()[name]), name


def test_an_agent_of_the_other_algorithm_is_refused() -> None:
    agent, plain = make_agent(with_settings()), SacAgent(SMALL, HORIZON)
    with pytest.raises(ValueError, match="critic"):
        agent.load_state_tensors(plain.state_tensors())
    with pytest.raises(ValueError, match="critic"):
        plain.load_state_tensors(agent.state_tensors())


def test_both_steps_can_be_captured() -> None:
    """No operation waits for the device or makes a tensor from Python data."""
    agent = make_agent(with_settings(augmentation="crop_colour"))
    flow = make_flow(agent.action_dim)
    batch = make_batch(0)
    random, numbers = agent.random_numbers(6), agent.distilling_numbers(6)
    with OperationTrace(guarded=True) as trace:
        agent.learn(batch, random, True, at(flow, batch.states[6:]))
        agent.distil(observations(batch), numbers, at(flow, batch.states[:6]))
    assert trace.host_syncs == 0
    assert math.isfinite(trace.kernels)
