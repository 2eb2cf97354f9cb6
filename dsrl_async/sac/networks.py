"""The actor (image, state -> noise) and the critic (image, state, noise -> Q heads) of DSRL-SAC.

Conventions, used by every function of this package:

* The RL *action* is tanh(u) in [-1, 1]. The *noise* handed to the policy is action * action_magnitude.
* Replay holds the noise that was used, so warm-up noise, unsquashed N(0, I), may exceed the magnitude.
* Where the agent is told its task (`config.instruction_dim` > 0), the networks take it as `instruction`, fp32
  [B, instruction_dim] with a mean square of about 1, and put it beside the encoded image and state. Otherwise there is
  none.
* The critic sees the noise as the policy sees it, not divided by the magnitude: its input then stays of order one for
  both kinds of noise, and does not depend on a setting of the actor.
* Log-probabilities are those of the action. They leave out the constant log-volume `action_dim * log(action_magnitude)`
  of the scaling, so that `target_entropy` means the same for every magnitude.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsrl_async.config.settings import SacConfig
from dsrl_async.config.shapes import SAC_IMAGE_SIZE
from dsrl_async.sac.augmentation import colour_jitter
from dsrl_async.sac.flat import FlatModule
from dsrl_async.sac.passes import Convolutions, Encoding, Heads, Layers, run

LAST_LAYER_GAIN = 0.01
CACHED_NUMBERS = 2**21
"""Size of the largest activation that a CPU computes at a time, in numbers (8 MiB). It stays in the last cache, and the
allocator reuses the memory, which it does not from 32 MiB on (docs/learner.md has the measurements)."""


def preprocess_image(image: Tensor, config: SacConfig, jitter: Tensor | None = None) -> Tensor:
    """Average-pool the image and scale it to `image_range`.

    Args:
        image: uint8 [B, 64, 64, 3 * cameras].
        config: its `image_pool` and `image_range` are used.
        jitter: fp32 [B, 5] in [0, 1], random numbers for `colour_jitter`, or None.

    Returns:
        fp32 [B, 3 * cameras, 64 / image_pool, 64 / image_pool], in channels-last memory format.
    """
    pool = config.image_pool
    unit = 1.0 / (255 * pool * pool)
    if pool > 1:
        # Exact integer sums of whole rows, then of whole pixels: on a CPU 6x faster than avg_pool2d.
        size, channels = SAC_IMAGE_SIZE // pool, image.shape[3]
        rows = image.view(-1, size, pool, SAC_IMAGE_SIZE * channels).to(torch.int16)
        columns = functools.reduce(torch.add, rows.unbind(2)).view(-1, size, size, pool, channels)
        image = functools.reduce(torch.add, columns.unbind(3))
    pixels = image.permute(0, 3, 1, 2).to(torch.float32)
    if jitter is not None:
        pixels = colour_jitter(pixels.mul_(unit), jitter)
        return pixels if config.image_range == "zero_one" else pixels.mul_(2).sub_(1)
    return pixels.mul_(unit) if config.image_range == "zero_one" else pixels.mul_(2 * unit).sub_(1)


class Encoder(nn.Module):
    """Image features (convolutions with ReLU, Linear, LayerNorm, tanh) next to state features (Linear, LayerNorm, tanh,
    or the raw state), and to the instruction.

    On the CPU, images pass through convolutions and projection a few at a time, forward and backward.
    """

    def __init__(self, config: SacConfig, products: torch.dtype) -> None:
        super().__init__()
        self.products = products
        channels = [config.image_shape[2], *config.conv_channels]
        self.convolutions = nn.ModuleList()
        size, largest = SAC_IMAGE_SIZE // config.image_pool, 0
        for (fan_in, fan_out), kernel, stride in zip(
            itertools.pairwise(channels), config.conv_kernels, config.conv_strides, strict=True
        ):
            self.convolutions.append(nn.Conv2d(fan_in, fan_out, kernel, stride, config.conv_padding))
            size = (size + 2 * config.conv_padding - kernel) // stride + 1
            largest = max(largest, fan_out * size * size)
        self.image_projection = nn.Linear(channels[-1] * size * size, config.image_latent_dim)
        self.image_norm = nn.LayerNorm(config.image_latent_dim)
        self.encodes_state = config.state_latent_dim > 0
        if self.encodes_state:
            self.state_projection = nn.Linear(config.state_dim, config.state_latent_dim)
            self.state_norm = nn.LayerNorm(config.state_latent_dim)
        of_state = config.state_latent_dim or config.state_dim
        self.output_dim = config.image_latent_dim + of_state + config.instruction_dim
        self.strides, self.padding = list(config.conv_strides), config.conv_padding
        self.images_at_a_time = max(1, CACHED_NUMBERS // largest)
        self._parameters_in_order = list(self.parameters())
        if config.init == "default":
            return
        for name, module in self.named_modules():
            if config.init == "rlinf" and name == "state_projection":
                continue  # RLinf leaves it as torch makes it
            if isinstance(module, nn.Conv2d):
                nn.init.orthogonal_(module.weight, math.sqrt(2))
            elif isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, pixels: Tensor, state: Tensor, instruction: Tensor | None = None) -> Tensor:
        """fp32 [B, C, S, S], fp32 [B, state_dim], fp32 [B, instruction_dim] -> fp32 [B, output_dim]."""
        at_a_time = self.images_at_a_time if pixels.device.type == "cpu" else pixels.shape[0]
        convolutions = Convolutions(self.strides, self.padding, at_a_time)
        encoding = Encoding(convolutions, self.encodes_state, self.products)
        features = run(encoding, pixels, state, *self._parameters_in_order)
        return features if instruction is None else torch.cat([features, instruction], dim=1)


class Actor(FlatModule):
    """Squashed normal policy: `tanh(mean + exp(log_std) * eps)`.

    Args:
        config: network settings.
        horizon: number of action slots of the policy; it matters only with `per_slot`.
        device: device of the parameters.
        seed: determines the initial weights. The global random state does not change.
        trainable: whether gradients are kept. An actor that only acts needs none.
        products: dtype that the inputs of convolutions and matrix products are rounded to, but for the last layer's.
            Weights, what is summed up and all else are fp32.
    """

    def __init__(
        self,
        config: SacConfig,
        horizon: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        trainable: bool = False,
        products: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config, self.products = config, products
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.encoder = Encoder(config, products)
            widths = [self.encoder.output_dim, *config.hidden_dims]
            self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))
            self.norms = nn.ModuleList(nn.LayerNorm(o) for o in config.hidden_dims if config.actor_layer_norm)
            self.output = nn.Linear(widths[-1], 2 * config.noise_width(horizon))
            # Every kind of initialisation starts near mean 0, log_std 0 for every observation.
            for half in self.output.weight.data.chunk(2):
                if config.init == "orthogonal":
                    nn.init.orthogonal_(half, LAST_LAYER_GAIN)
                else:
                    nn.init.xavier_uniform_(half, LAST_LAYER_GAIN)
            nn.init.zeros_(self.output.bias)
            if config.init == "orthogonal":
                for layer in self.hidden.children():
                    assert isinstance(layer, nn.Linear)
                    nn.init.orthogonal_(layer.weight)
                    nn.init.zeros_(layer.bias)
        self._layers = []
        for index, layer in enumerate(self.hidden.children()):
            norm = [self.norms[index]] if config.actor_layer_norm else []
            self._layers += [parameter for part in (layer, *norm) for parameter in part.parameters()]
        self._layers += self.output.parameters()
        self.flatten_(device, trainable)

    def forward(self, pixels: Tensor, state: Tensor, instruction: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Parameters of the normal distribution of u.

        Args:
            pixels: fp32 [B, C, S, S] from `preprocess_image`.
            state: fp32 [B, state_dim].
            instruction: fp32 [B, instruction_dim], or None where that is 0.

        Returns:
            mean and log_std, each fp32 [B, A]; log_std within [log_std_min, log_std_max].
        """
        layers = Layers(self.config.actor_layer_norm, self.products)
        outputs = run(layers, self.encoder(pixels, state, instruction), *self._layers)
        mean, log_std = outputs.chunk(2, dim=1)
        return mean, log_std.clamp(self.config.log_std_min, self.config.log_std_max)


class Critic(FlatModule):
    """`num_q_heads` Q functions over one encoder, evaluated together by batched products. Arguments as for `Actor`."""

    def __init__(
        self,
        config: SacConfig,
        horizon: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        trainable: bool = False,
        products: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config, self.products = config, products
        heads = config.num_q_heads
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.encoder = Encoder(config, products)
            widths = [self.encoder.output_dim + config.noise_width(horizon), *config.hidden_dims, 1]
            self.weights = nn.ParameterList()
            self.norm_scales = nn.ParameterList()
            self.norm_shifts = nn.ParameterList()
            self.biases = nn.ParameterList()
            for index, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
                weight = torch.empty(heads, fan_in, fan_out)
                bias = torch.zeros(heads, 1, fan_out)
                if config.init == "orthogonal":
                    for head in weight:
                        nn.init.orthogonal_(head)
                elif config.init == "rlinf" and index + 1 < len(widths) - 1:
                    nn.init.normal_(weight, std=math.sqrt(2 / fan_out))  # Kaiming, for ReLU, of what goes out
                elif index + 1 < len(widths) - 1:
                    nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5)
                    nn.init.uniform_(bias, -(fan_in**-0.5), fan_in**-0.5)
                else:
                    nn.init.normal_(weight, std=LAST_LAYER_GAIN)
                self.weights.append(nn.Parameter(weight))
                self.biases.append(nn.Parameter(bias))
                if config.critic_layer_norm and index + 1 < len(widths) - 1:
                    self.norm_scales.append(nn.Parameter(torch.ones(heads, 1, fan_out)))
                    self.norm_shifts.append(nn.Parameter(torch.zeros(heads, 1, fan_out)))
        self.flatten_(device, trainable)
        self._heads = [*self.weights, *self.biases, *self.norm_scales, *self.norm_shifts]
        self._constant_heads = [parameter.detach() for parameter in self._heads]

    def q_values(self, features: Tensor, noise: Tensor) -> Tensor:
        """Evaluate the Q heads on encoded observations.

        Args:
            features: fp32 [B, F] from `encoder`.
            noise: fp32 [B, A], the noise as the policy sees it.

        Returns:
            fp32 [heads, B]. If `features` has no gradient, the heads' weights get none either.
        """
        heads = Heads(len(self.weights), self.config.critic_layer_norm, self.products)
        parameters = self._heads if features.requires_grad else self._constant_heads
        return run(heads, features, noise, *parameters).squeeze(-1)

    def forward(self, pixels: Tensor, state: Tensor, noise: Tensor, instruction: Tensor | None = None) -> Tensor:
        """fp32 [B, C, S, S], fp32 [B, state_dim], fp32 [B, A], fp32 [B, instruction_dim] -> fp32 [heads, B]."""
        return self.q_values(self.encoder(pixels, state, instruction), noise)


def aggregate_heads(q: Tensor, rule: str) -> Tensor:
    """fp32 [heads, B] -> fp32 [B] by `mean` or `min` over the heads."""
    return q.mean(0) if rule == "mean" else q.amin(0)


def log_prob(u: Tensor, log_std: Tensor, eps: Tensor) -> Tensor:
    """Log-density of the action tanh(u) where u = mean + exp(log_std) * eps.

    It is log N(u) - sum log(1 - tanh(u)^2). The form log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)) neither
    overflows nor loses digits for large |u|, where 1 - tanh(u)^2 rounds to 0.

    Args:
        u, log_std, eps: [B, A]; u is before squashing, eps the standard normal draw that u was made from.

    Returns:
        [B], for the action in [-1, 1]; the volume of `action_magnitude` is not included.
    """
    half_log_jacobian = math.log(2.0) - u - F.softplus(-2.0 * u)
    per_dimension = -0.5 * eps.square() - log_std - 2.0 * half_log_jacobian
    return per_dimension.sum(1) - 0.5 * math.log(2.0 * math.pi) * u.shape[1]


@torch.no_grad()
def act(
    actor: Actor,
    image: Tensor,
    state: Tensor,
    eps: Tensor,
    use_gaussian: Tensor,
    deterministic: bool | Tensor = False,
    snapshot: tuple[Actor, Tensor] | None = None,
    instruction: Tensor | None = None,
) -> Tensor:
    """The policy's initial noise for a batch of observations.

    Args:
        actor: the current actor.
        image: uint8 [B, 64, 64, 3 * cameras].
        state: fp32 [B, state_dim].
        eps: fp32 [B, A], standard normal.
        use_gaussian: bool or fp32 [B]; where true (non-zero), the noise is `eps` itself, as in the warm-up.
        deterministic: whether to take tanh(mean) instead of a sample; bool [B] says it of each row.
        snapshot: another actor, and bool [B] that is true where it chooses the noise instead.
        instruction: as for `Actor.forward`.

    Returns:
        fp32 [B, A].
    """
    pixels = preprocess_image(image, actor.config)
    mean, log_std = actor(pixels, state, instruction)
    if snapshot is not None:
        other, by_other = snapshot[0], snapshot[1].unsqueeze(1)
        other_mean, other_log_std = other(pixels, state, instruction)
        mean, log_std = torch.where(by_other, other_mean, mean), torch.where(by_other, other_log_std, log_std)
    if isinstance(deterministic, Tensor):
        u = torch.addcmul(mean, log_std.exp(), eps.masked_fill(deterministic.unsqueeze(1), 0.0))
    else:
        u = mean if deterministic else torch.addcmul(mean, log_std.exp(), eps)
    return torch.where(use_gaussian.bool().unsqueeze(1), eps, u.tanh() * actor.config.action_magnitude)
