"""Actor, critic, squashed normal, flat buffers and augmentation of the SAC agent."""

import colorsys
import itertools
import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import CONFIGS
from support.sac_configs import SMALL
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from dsrl_async.config.command_line import load_config
from dsrl_async.config.settings import SacConfig
from dsrl_async.sac.augmentation import colour_jitter, random_shift
from dsrl_async.sac.flat import clip_gradient_, layout_hash
from dsrl_async.sac.layout import NoiseLayout
from dsrl_async.sac.networks import Actor, Critic, act, aggregate_heads, log_prob, preprocess_image


def with_settings(**changes: object) -> SacConfig:
    return SacConfig(**{**SMALL.model_dump(), **changes})


def observations(batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (batch, 64, 64, 3), dtype=torch.uint8, generator=generator)
    return image, torch.randn(batch, 8, generator=generator)


def scramble(module: Actor | Critic, seed: int = 0, scale: float = 0.3) -> None:
    """Weights far from the initialisation, so that no term is zero or one by accident."""
    module.flat.copy_(torch.randn(module.flat.shape, generator=torch.Generator().manual_seed(seed)) * scale)


# --- squashed normal --------------------------------------------------------------------------------------


def test_log_prob_is_that_of_the_tanh_transformed_normal() -> None:
    generator = torch.Generator().manual_seed(1)
    mean, log_std, eps = (torch.randn(64, 5, dtype=torch.float64, generator=generator) for _ in range(3))
    u = mean + log_std.exp() * eps
    keep = u.abs().amax(1) < 8  # beyond, the reference loses digits itself
    reference = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), TanhTransform())
    expected = reference.log_prob(u.tanh())
    assert keep.sum() > 50
    torch.testing.assert_close(log_prob(u, log_std, eps)[keep], expected[keep], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("u", [-40.0, -12.0, -3.0, 0.0, 0.5, 12.0, 40.0])
def test_log_prob_keeps_its_digits_where_tanh_saturates(u: float) -> None:
    with localcontext() as context:
        context.prec = 80
        e = (Decimal(2) * Decimal(u)).exp()
        jacobian = (1 - ((e - 1) / (e + 1)) ** 2).ln()
        log_std = Decimal(2)
        eps = Decimal(u) / log_std.exp()
        pi = Decimal(math.pi)
        expected = -eps * eps / 2 - log_std - (2 * pi).ln() / 2 - jacobian
    value = log_prob(torch.tensor([[u]]), torch.tensor([[2.0]]), torch.tensor([[float(eps)]]))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(float(expected), rel=1e-6, abs=1e-5)


def test_log_prob_has_finite_gradients_at_saturation() -> None:
    u = torch.tensor([[12.0, -12.0, 60.0, -60.0]], requires_grad=True)
    log_prob(u, torch.full_like(u, 2.0), torch.zeros_like(u)).sum().backward()
    # d/du of -log(1 - tanh(u)^2) is 2 tanh(u).
    torch.testing.assert_close(u.grad, torch.tensor([[2.0, -2.0, 2.0, -2.0]]))


# --- image ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [1, 2, 4])
@pytest.mark.parametrize("image_range", ["zero_one", "minus_one_one"])
def test_preprocessing_is_average_pooling_and_scaling(pool: int, image_range: str) -> None:
    image, _ = observations(3)
    image[0] = 255
    pixels = preprocess_image(image, with_settings(image_pool=pool, image_range=image_range))
    unit = F.avg_pool2d(image.permute(0, 3, 1, 2).double() / 255, pool)
    expected = unit if image_range == "zero_one" else unit * 2 - 1
    assert pixels.shape == (3, 3, 64 // pool, 64 // pool)
    torch.testing.assert_close(pixels.double(), expected, rtol=0, atol=3e-7)
    assert pixels[0].min() == pytest.approx(1.0, abs=3e-7)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("jittered", [False, True])
def test_each_camera_is_prepared_as_if_it_were_alone(pool: int, jittered: bool) -> None:
    cameras = [observations(3, seed)[0] for seed in (0, 1)]
    jitter = torch.rand(3, 5, generator=torch.Generator().manual_seed(2)) * 0.8 if jittered else None
    config = with_settings(image_pool=pool, cameras=[1, 0])
    together = preprocess_image(torch.cat(cameras, dim=3), config, jitter)
    alone = torch.cat([preprocess_image(image, with_settings(image_pool=pool), jitter) for image in cameras], dim=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    mean, _ = Actor(config, 10)(together, torch.zeros(3, 8))
    assert mean.shape == (3, 4)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), pad=st.integers(1, 6), edge=st.booleans())
def test_random_shift_is_edge_padding_and_cropping(seed: int, pad: int, edge: bool) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (3, 12, 12, 3), dtype=np.uint8)
    uniform = rng.integers(0, 2, (3, 2)).astype(np.float32) if edge else rng.random((3, 2), dtype=np.float32)
    shifted = random_shift(torch.from_numpy(image), torch.from_numpy(uniform), pad).numpy()
    assert shifted.dtype == np.uint8
    for before, after, (row, column) in zip(image, shifted, uniform, strict=True):
        padded = np.pad(before, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
        y, x = (min(int(value * (2 * pad + 1)), 2 * pad) for value in (row, column))
        np.testing.assert_array_equal(after, padded[y : y + 12, x : x + 12])
        colours = {tuple(colour) for colour in before.reshape(-1, 3)}
        assert {tuple(colour) for colour in after.reshape(-1, 3)} <= colours


def test_random_shift_reaches_all_offsets_and_no_others() -> None:
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 64, 1).expand(4000, 64, 64, 3)
    uniform = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    middle = random_shift(image, uniform, 4)[:, 32, 32, 0].int() - 32
    values, counts = middle.unique(return_counts=True)
    assert values.tolist() == list(range(-4, 5))
    assert counts.min() > 350  # 444 expected


def jitter_numbers(*changes: list[float], hue: float = 0.5, applied: float = 0.0) -> torch.Tensor:
    """Of two images: brightness, contrast and saturation, with a hue that stays as it is."""
    return torch.tensor([[*change, hue, applied] for change in (changes * 2)[:2]])


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10_000), extreme=st.booleans(), grey=st.booleans(), cameras=st.integers(1, 3), on=st.booleans()
)
def test_colour_jitter_is_that_of_pythons_hsv(seed: int, extreme: bool, grey: bool, cameras: int, on: bool) -> None:
    """Pixel by pixel, by `colorsys`, in the same order; all cameras of an image alike."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 4, (2, 3 * cameras, 4, 4)) / 3 if extreme else rng.random((2, 3 * cameras, 4, 4))
    if grey:
        levels[:, :, :2] = levels[:, :1, :2]
    numbers = rng.integers(0, 2, (2, 5)).astype(np.float64) if extreme else rng.random((2, 5))
    numbers[:, 4] = 0.79 if on else 0.81
    pixels = torch.from_numpy(levels).float().contiguous(memory_format=torch.channels_last)
    found = colour_jitter(pixels, torch.from_numpy(numbers).float())
    assert found.is_contiguous(memory_format=torch.channels_last)
    if not on:
        torch.testing.assert_close(found, pixels, rtol=0, atol=0)
        return
    for image, jittered, (brightness, contrast, saturation, hue, _) in zip(levels, found, 2 * numbers - 1, strict=True):
        expected = np.clip(image + 0.2 * brightness, 0, 1)
        means = expected.mean((1, 2), keepdims=True)
        expected = np.clip((1 + 0.1 * contrast) * (expected - means) + means, 0, 1)
        for camera, row, column in itertools.product(range(cameras), range(4), range(4)):
            place = (slice(3 * camera, 3 * camera + 3), row, column)
            h, s, v = colorsys.rgb_to_hsv(*expected[place])
            expected[place] = colorsys.hsv_to_rgb((h + 0.03 * hue) % 1, min(1, (1 + 0.1 * saturation) * s), v)
        np.testing.assert_allclose(jittered.numpy(), expected, rtol=0, atol=2e-5)


def test_the_colours_of_four_images_in_five_change() -> None:
    uniform = torch.rand(4000, 5, generator=torch.Generator().manual_seed(0))
    pixels = torch.rand(4000, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    changed = (colour_jitter(pixels, uniform) != pixels).flatten(1).any(1)
    assert changed.float().mean() == pytest.approx(0.8, abs=0.02)


def test_colour_jitter_neutral_and_extreme_values() -> None:
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(colour_jitter(pixels, jitter_numbers([0.5] * 3)), pixels, rtol=0, atol=1e-6)
    brighter = colour_jitter(pixels, jitter_numbers([1.0, 0.5, 0.5], [0.0, 0.5, 0.5]))
    torch.testing.assert_close(brighter[0], (pixels[0] + 0.2).clamp(0, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(brighter[1], (pixels[1] - 0.2).clamp(0, 1), rtol=0, atol=1e-6)
    middle = pixels * 0.4 + 0.3
    contrast = colour_jitter(middle, jitter_numbers([0.5, 1.0, 0.5]))
    torch.testing.assert_close(contrast.std(dim=(2, 3)), middle.std(dim=(2, 3)) * 1.1, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(contrast.mean(dim=(2, 3)), middle.mean(dim=(2, 3)), rtol=1e-4, atol=1e-6)
    saturated = colour_jitter(middle, jitter_numbers([0.5, 0.5, 0.0]))
    torch.testing.assert_close(saturated.std(dim=1), middle.std(dim=1) * 0.9, rtol=1e-4, atol=1e-6)


# --- actor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("state_latent_dim", [0, 8])
def test_actor_is_the_network_that_its_settings_describe(layer_norm: bool, state_latent_dim: int) -> None:
    config = with_settings(
        actor_layer_norm=layer_norm,
        state_latent_dim=state_latent_dim,
        conv_channels=[8, 4],
        conv_kernels=[3, 3],
        conv_strides=[2, 1],
        conv_padding=1,
        log_std_min=-0.05,
        log_std_max=0.03,
    )
    actor = Actor(config, horizon=10)
    scramble(actor)
    image, state = observations(5)
    pixels = preprocess_image(image, config)
    mean, log_std = actor(pixels, state)

    weights = dict(actor.named_parameters())
    x = pixels
    for index, stride in enumerate(config.conv_strides):
        name = f"encoder.convolutions.{index}"
        x = F.relu(F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding=1))

    def normalise(x: torch.Tensor, name: str) -> torch.Tensor:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = x.permute(0, 2, 3, 1).reshape(5, -1)
    x = normalise(linear(x, "encoder.image_projection"), "encoder.image_norm").tanh()
    if state_latent_dim:
        state = normalise(linear(state, "encoder.state_projection"), "encoder.state_norm").tanh()
    x = torch.cat([x, state], 1)
    for index in range(2):
        x = linear(x, f"hidden.{index}")
        x = F.relu(normalise(x, f"norms.{index}") if layer_norm else x)
    x = linear(x, "output")
    torch.testing.assert_close(mean, x[:, :4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_std, x[:, 4:].clamp(-0.05, 0.03), rtol=1e-4, atol=1e-5)
    assert log_std.min() == pytest.approx(-0.05)
    assert log_std.max() == pytest.approx(0.03)


@pytest.mark.parametrize("init", ["orthogonal", "rlinf", "default"])
def test_initial_policy_is_nearly_a_standard_normal_before_squashing(init: str) -> None:
    config = with_settings(init=init)
    image, state = observations(16)
    mean, log_std = Actor(config, 10)(preprocess_image(image, config), state)
    assert 0 < mean.abs().max() < 0.15
    assert 0 < log_std.abs().max() < 0.15


def test_orthogonal_initialisation_is_orthogonal_in_each_head() -> None:
    critic = Critic(with_settings(init="orthogonal"), 10)
    for head in critic.weights[1]:
        torch.testing.assert_close(head.T @ head, torch.eye(12), rtol=0, atol=1e-5)
    assert not torch.equal(critic.weights[1][0], critic.weights[1][1])
    small = Critic(with_settings(init="default"), 10)
    assert small.weights[-1].std() == pytest.approx(0.01, rel=0.4)
    assert small.weights[0].abs().max() <= small.weights[0].shape[1] ** -0.5


def test_rlinfs_initialisation_has_its_spreads() -> None:
    """Of its DSRL networks at their own sizes, by the formulas of the initialisers that its code calls."""
    config = load_config(["--config", str(CONFIGS / "libero_spatial_pi0.yaml"), "--sac.init", "rlinf"]).sac
    actor, critic = Actor(config, 50), Critic(config, 50)

    def spread(weight: torch.Tensor) -> float:
        return weight.std().item()

    for encoder in (actor.encoder, critic.encoder):
        first, *others = (layer for layer in encoder.convolutions if isinstance(layer, nn.Conv2d))
        # Orthogonal with gain sqrt(2): of a [32, 27] matrix the columns are orthonormal, of [32, 288] the rows.
        assert spread(first.weight) == pytest.approx((2 / 32) ** 0.5, rel=0.02)  # 0.25
        for layer in others:
            assert spread(layer.weight) == pytest.approx((2 / 288) ** 0.5, rel=0.02)  # 0.083
            rows = layer.weight.flatten(1)
            torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(32), rtol=0, atol=1e-4)
        projection, state = encoder.image_projection, encoder.state_projection
        assert spread(projection.weight) == pytest.approx((2 / (32 * 32 * 32 + 64)) ** 0.5, rel=0.01)  # 0.0078
        assert not dict(projection.named_parameters())["bias"].any()
        assert not any(value.any() for name, value in encoder.convolutions.named_parameters() if "bias" in name)
        # torch's default, uniform up to 1 / sqrt(fan in)
        assert spread(state.weight) == pytest.approx((1 / (3 * 8)) ** 0.5, rel=0.1)
        assert state.bias.any()
    *hidden, last = critic.weights
    for weight in hidden:
        assert spread(weight) == pytest.approx((2 / 128) ** 0.5, rel=0.02)  # 0.125: Kaiming, fan out
    assert weight.abs().max() > 3 * 0.125  # normal, not uniform
    assert spread(last) == pytest.approx(0.01, rel=0.1)
    assert not any(bias.any() for bias in critic.biases)
    for hidden_layer in actor.hidden.children():
        assert isinstance(hidden_layer, nn.Linear)
        assert spread(hidden_layer.weight) == pytest.approx((1 / (3 * 128)) ** 0.5, rel=0.02)
    for half in actor.output.weight.chunk(2):
        assert spread(half) == pytest.approx(0.01 * (2 / (128 + 32)) ** 0.5, rel=0.05)  # Xavier uniform
    assert not actor.output.bias.any()


def test_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = Actor(SMALL, 10, seed=3).flat
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(Actor(SMALL, 10, seed=3).flat, first)
    assert not torch.equal(Actor(SMALL, 10, seed=4).flat, first)


def test_act_mixes_warm_up_and_policy_noise_by_row() -> None:
    config = with_settings(action_magnitude=0.5)
    actor = Actor(config, 10)
    scramble(actor)
    image, state = observations(6)
    eps = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)) * 2
    mask = torch.tensor([1, 0, 1, 0, 0, 1])
    noise = act(actor, image, state, eps, mask.bool())
    assert torch.equal(noise[mask.bool()], eps[mask.bool()])
    assert torch.equal(act(actor, image, state, eps, mask.float()), noise)
    mean, log_std = actor(preprocess_image(image, config), state)
    expected = 0.5 * torch.tanh(mean + log_std.exp() * eps)
    torch.testing.assert_close(noise[~mask.bool()], expected[~mask.bool()])
    assert not noise.requires_grad


def test_deterministic_act_ignores_the_random_draw() -> None:
    config = with_settings(action_magnitude=2.0)
    actor = Actor(config, 10)
    scramble(actor)
    image, state = observations(3)
    none = torch.zeros(3)
    noise = act(actor, image, state, torch.randn(3, 4), none, deterministic=True)
    assert torch.equal(noise, act(actor, image, state, torch.full((3, 4), 9.0), none, deterministic=True))
    mean, _ = actor(preprocess_image(image, config), state)
    torch.testing.assert_close(noise, 2.0 * mean.tanh())


def test_noise_layouts() -> None:
    repeat, per_slot = with_settings(noise_layout="repeat"), with_settings(noise_layout="per_slot")
    assert (repeat.noise_width(10), per_slot.noise_width(10)) == (4, 40)
    noise = torch.arange(80.0).view(2, 40)
    slots = NoiseLayout(per_slot, 10).expand(noise)
    assert slots.shape == (2, 10, 4)
    assert slots[1, 3].tolist() == [52.0, 53.0, 54.0, 55.0]
    same = NoiseLayout(repeat, 10).expand(noise[:, :4])
    assert same.shape == (2, 10, 4)
    assert all(torch.equal(same[:, slot], noise[:, :4]) for slot in range(10))
    image, state = observations(2)
    assert act(Actor(per_slot, 10), image, state, torch.zeros(2, 40), torch.zeros(2)).shape == (2, 40)


# --- critic -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_norm", [False, True])
def test_batched_heads_equal_a_loop_over_heads(layer_norm: bool) -> None:
    config = with_settings(critic_layer_norm=layer_norm)
    critic = Critic(config, 10)
    scramble(critic)
    image, state = observations(7)
    noise = torch.randn(7, 4, generator=torch.Generator().manual_seed(3))
    pixels = preprocess_image(image, config)
    q = critic(pixels, state, noise)
    assert q.shape == (3, 7)
    for head in range(3):
        x = torch.cat([critic.encoder(pixels, state), noise], 1)
        for layer in range(2):
            x = F.linear(x, critic.weights[layer][head].T, critic.biases[layer][head, 0])
            if layer_norm:
                scale, shift = critic.norm_scales[layer][head, 0], critic.norm_shifts[layer][head, 0]
                x = F.layer_norm(x, x.shape[-1:], scale, shift)
            x = F.relu(x)
        expected = F.linear(x, critic.weights[2][head].T, critic.biases[2][head, 0])[:, 0]
        torch.testing.assert_close(q[head], expected, rtol=1e-4, atol=1e-5)
    assert (q[0] - q[1]).abs().max() > 1e-3


def test_aggregation_of_heads() -> None:
    q = torch.tensor([[1.0, 5.0], [3.0, -1.0], [2.0, 2.0]])
    assert aggregate_heads(q, "mean").tolist() == [2.0, 2.0]
    assert aggregate_heads(q, "min").tolist() == [1.0, -1.0]


# --- flat buffers -----------------------------------------------------------------------------------------


def test_parameters_and_gradients_are_views_of_the_flat_buffers() -> None:
    critic = Critic(SMALL, 10, trainable=True)
    scramble(critic)
    image, state = observations(4)
    pixels, noise = preprocess_image(image, SMALL), torch.ones(4, 4)
    expected = torch.autograd.grad(critic(pixels, state, noise).square().mean(), list(critic.parameters()))
    critic.flat_grad.fill_(7.0)
    critic.backward_(critic(pixels, state, noise).square().mean())
    offset = 0
    for parameter, gradient in zip(critic.parameters(), expected, strict=True):
        end = offset + parameter.numel()
        assert parameter.data_ptr() == critic.flat.data_ptr() + 4 * offset
        torch.testing.assert_close(critic.flat_grad[offset:end].view(gradient.shape), gradient)
        assert gradient.abs().max() > 0
        offset = end
    assert offset == critic.flat.numel() == critic.flat_grad.numel()
    critic.flat.zero_()
    assert critic(pixels, state, noise).abs().max() == 0


def test_received_weights_are_copied_in_place() -> None:
    sender, receiver = Actor(SMALL, 10, seed=1), Actor(SMALL, 10, seed=2)
    image, state = observations(2)
    address = receiver.output.weight.data_ptr()
    receiver.load_flat_(sender.flat)
    assert receiver.output.weight.data_ptr() == address
    pixels = preprocess_image(image, SMALL)
    assert torch.equal(sender(pixels, state)[0], receiver(pixels, state)[0])
    with pytest.raises(ValueError, match="same sac settings"):
        receiver.load_flat_(sender.flat[:-1])
    with pytest.raises(ValueError, match="same sac settings"):
        receiver.load_flat_(sender.flat.double())


def test_moving_a_flat_module_is_refused() -> None:
    with pytest.raises(RuntimeError, match="build another one"):
        Actor(SMALL, 10).to(torch.float64)


def test_layout_hash_is_that_of_names_and_shapes() -> None:
    reference = layout_hash(Actor(SMALL, 10, seed=0))
    assert reference == layout_hash(Actor(SMALL, 10, seed=9))
    assert 0 <= reference < 2**64
    others = [
        Actor(with_settings(hidden_dims=[12, 16]), 10),
        Actor(with_settings(noise_layout="per_slot"), 10),
        Actor(with_settings(actor_layer_norm=True), 10),
        Critic(SMALL, 10),
    ]
    assert len({reference, *map(layout_hash, others)}) == 5
    wide, tall = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 3, bias=False)
    assert len({layout_hash(wide), layout_hash(tall), layout_hash(torch.nn.Sequential(wide))}) == 3


@pytest.mark.parametrize(
    ("values", "limit", "expected"),
    [
        ([3.0, 4.0], 1.0, [0.6, 0.8]),
        ([3.0, 4.0], 10.0, [3.0, 4.0]),
        ([3.0, 4.0], None, [3.0, 4.0]),
        ([0.0, 0.0], 1.0, [0.0, 0.0]),
    ],
)
def test_gradient_clipping(values: list[float], limit: float | None, expected: list[float]) -> None:
    gradient = torch.tensor(values)
    assert clip_gradient_(gradient, limit).item() == pytest.approx(math.hypot(*values))
    assert gradient.tolist() == pytest.approx(expected)
