"""Pi0 and Pi0.5: a SigLIP tower, a Gemma language model and a Gemma action expert, in a lean layout.

One class serves training (autograd) and sampling (static buffers). Both run the same layers; they differ
only in where keys and values go, which is what the `extend` argument of the layer stacks decides: it takes
the new keys and values of a layer, puts them behind the earlier ones, and returns all of them.

What makes the layout lean, compared with the published implementations (all are exact rewrites):
- cameras are folded into the batch, and a masked camera is not given at all;
- the only mask is over the keys of empty language slots;
- the state token does not depend on the denoising time, so its keys and values are computed once;
- the last VLM layer computes keys and values only, since nothing reads its output;
- query, key and value projections are one matrix, as are gate and up;
- the query heads that share a key head are further queries of it: keys and values are not repeated;
- residuals are added inside the matrix products in front of them, and rotations happen in place;
- everything that depends on the denoising time alone is a table with a row per time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from dsrl_async.pi0.config import Pi0Config

EPSILON = 1e-6
ROPE_BASE = 10_000.0
MASKED = -2.3819763e38
"""Additive mask of a key that must not be seen; finite, so that a fully masked row stays finite."""

ATTENTION_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""torch's attention kernels for sampling on a GPU; the first that takes an input gets it.

Flash takes no mask, so it is left with the cameras. Memory-efficient attention takes the rest: any head width, masks
without a copy of them, from sm80 on as well as before. The last one takes everything, in more memory and time. cuDNN's
is not among them, though torch prefers it on sm90 and sm100: whether it takes heads of 256 channels has changed from
version to version, so that two installations would compute differently.
"""

LayerExtend = Callable[[Tensor], Tensor]
"""A layer's new keys and values [B, 2, G, T, D] -> keys and values [B, 2, G, S, D] to attend to."""
Extend = Callable[[int], LayerExtend]
"""Number of a layer -> what takes its keys and values."""


class Modulation(NamedTuple):
    """One RMSNorm: its scale times sqrt(width), sqrt(width * epsilon), and in pi0.5 its shift and the gate of the
    sublayer behind it. The factors are such that the norm is x * scale / hypot(|x|, floor) + shift.

    `offset` float32 [N] is what a kernel adds that multiplies the norm without its shift by a weight [N, width]: the
    shift times the weight, and the bias (see `dsrl_async.pi0.kernels`). It may be a table as the others are.
    """

    scale: Tensor
    floor: Tensor
    shift: Tensor | None = None
    gate: Tensor | None = None
    offset: Tensor | None = None

    def rows(self, index: tuple[slice | None, ...] | int) -> Modulation:
        """Indexes what has a row per time, and keeps what has not."""
        scale, floor, *rest = (v[index] if v is not None and v.ndim == 2 else v for v in self)
        assert scale is not None
        assert floor is not None
        return Modulation(scale, floor, *rest)


class Step(NamedTuple):
    """What the expert needs to know of one denoising time; leading axes broadcast against [B, H, width]."""

    input_weight: Tensor
    input_bias: Tensor
    norms: tuple[Modulation, ...]


class Rope(NamedTuple):
    """Rotary embedding of T tokens: cos [B,T,1,1,D/2], sin [B,T,1,2,D/2] signed for the two halves."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, position: Tensor, table: Tensor) -> Rope:
        """Rotations for integer positions [B, T], from `Pi0.rope_table`."""
        return cls.of_rows(F.embedding(position, table))

    @classmethod
    def of_rows(cls, rows: Tensor) -> Rope:
        """From rows of the table, [B, T, 3 * D/2]."""
        parts = rows.unflatten(-1, (1, 3, -1))
        return cls(parts[..., :1, :], parts[..., 1:, :])


@dataclass
class Prefix:
    """An encoded observation: what the action tokens attend to.

    `keys_values` holds [B, 2, kv_heads, S, head_dim] per layer, `mask` is the additive key mask [B, 1, 1, S],
    `position` [B] the position of the next token. `hidden` [B, P, vlm_width], the last hidden state of images and
    language, is there for auxiliary losses; nothing else reads it.
    """

    keys_values: list[Tensor]
    mask: Tensor
    position: Tensor
    hidden: Tensor | None = None

    def repeat(self, count: int) -> Prefix:
        """Each row `count` times in a row, for several action samples per observation; without `hidden`."""

        def rows(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(count, dim=0)

        return Prefix([rows(layer) for layer in self.keys_values], rows(self.mask), rows(self.position))


def rms_norm(x: Tensor, modulation: Modulation, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """RMSNorm of x [B, T, width], computed in float32 and rounded once, to `dtype` or else the dtype of x.

    With `out`, a buffer of the shape and dtype of x, one operation less, but not differentiable.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    norm = torch.hypot(norm, modulation.floor)
    scaled = x * modulation.scale
    if modulation.shift is None:
        y = torch.div(scaled, norm, out=out)
    else:
        y = torch.addcdiv(modulation.shift, scaled, norm, out=out)
    return y if out is not None else y.to(dtype or x.dtype)


def rotate_(x: Tensor, rope: Rope) -> None:
    """Rotary embedding of x [B, T, heads, D], in place, in the half-split layout: channel i is paired with i + D/2."""
    halves = x.unflatten(-1, (2, -1))
    swapped = halves.flip(-2)
    halves.mul_(rope.cos).addcmul_(swapped, rope.sin)


def rotate_apart_(x: Tensor, rope: Rope, heads: int) -> Tensor:
    """As `rotate_`, except that the first `heads` are returned, contiguous [B, T, heads, D], and undefined in x."""
    halves = x.unflatten(-1, (2, -1))
    swapped = halves.flip(-2)
    halves.mul_(rope.cos)
    halves[:, :, heads:].addcmul_(swapped[:, :, heads:], rope.sin)
    return torch.addcmul(halves[:, :, :heads], swapped[:, :, :heads], rope.sin).flatten(-2)


def attend(query: Tensor, keys_values: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention: query [B, T, heads, D], keys and values [B, 2, G, S, D] -> [B, T, heads * D].

    `mask` is [B, 1, 1, S]: it is the same for all queries, so that the query heads of a key head may be queries like
    others: attention gets [B, G, T * heads / G, D]. Where there is one key head and `query` is contiguous, both are
    views.
    """
    batch, tokens, heads, width = query.shape
    groups = keys_values.shape[2]
    folded = query.unflatten(2, (groups, heads // groups)).transpose(1, 2).flatten(2, 3)
    key, value = keys_values.unbind(1)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask)
    return out.unflatten(2, (tokens, heads // groups)).transpose(1, 2).reshape(batch, tokens, heads * width)


def add_projected(
    x: Tensor, update: Tensor, projection: nn.Linear | ReplacedLinear, gate: Tensor | None, in_place: bool
) -> Tensor:
    """x + gate * projection(update), for x [B, T, width]; the projection has no bias.

    In place, without autograd, it spares a GPU a copy: there the sum starts as a copy of x, unless it is x itself.
    """
    if gate is not None:
        update = projection(update)
        return x.addcmul_(update, gate) if in_place else torch.addcmul(x, update, gate)
    if isinstance(projection, ReplacedLinear):
        return projection.add_to(x, update)
    rows, update, weight = x.view(-1, x.shape[-1]), update.flatten(0, 1), projection.weight.t()
    added = rows.addmm_(update, weight) if in_place else torch.addmm(rows, update, weight)
    return added.view_as(x)


class ReplacedLinear(nn.Module):
    """What takes the place of a linear layer for sampling: see `fp8` and `packed`."""

    def add_to(self, x: Tensor, update: Tensor) -> Tensor:
        """x + self(update), which may overwrite x."""
        return x.add_(self(update))


def rope_frequency(head_dim: int) -> Tensor:
    """Radians per position of each pair of channels, float32 [head_dim / 2]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return ROPE_BASE**-exponent


def time_frequency(width: int) -> Tensor:
    """Radians per unit of denoising time of each sine, float64 [width / 2]: periods from 4e-3 to 4."""
    period = 4e-3 * (4.0 / 4e-3) ** torch.linspace(0, 1, width // 2, dtype=torch.float64)
    return 2 * torch.pi / period


def prefix_position(token_mask: Tensor, before: int) -> Tensor:
    """Positions int64 [B, before + L] of images and language: empty language slots do not advance."""
    return F.pad(token_mask, (before, 0), value=True).cumsum(1) - 1


def key_mask(token_mask: Tensor, before: int, after: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, 1, before + L + after]: 0, or `MASKED` for the empty language slots.

    token_mask is bool [B, L]; `before` and `after` count the keys around the language slots.
    """
    blocked = F.pad(~token_mask, (before, after))[:, None, None, :]
    return blocked.to(dtype) * MASKED


class VisionLayer(nn.Module):
    """A pre-LayerNorm transformer layer with biases."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, EPSILON)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, EPSILON)
        self.fc1 = nn.Linear(width, mlp)
        self.fc2 = nn.Linear(mlp, width)

    def attend(self, normed: Tensor) -> Tensor:
        """Attention for its norm, all [N, tokens, width], before it is projected to the residual."""
        qkv = self.qkv(normed).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = F.scaled_dot_product_attention(query, key, value)
        return attention.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attend(self.attention_norm(x)))
        return x + self.fc2(F.gelu(self.fc1(self.mlp_norm(x)), approximate="tanh"))


class VisionTower(nn.Module):
    """SigLIP without its pooling head, and the projection to the language model's width."""

    def __init__(self, config: Pi0Config) -> None:
        super().__init__()
        width = config.vision_width
        self.patch = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.position = nn.Parameter(torch.empty(config.image_tokens, width))
        nn.init.normal_(self.position, std=0.02)
        self.blocks = [VisionLayer(width, config.vision_heads, config.vision_mlp) for _ in range(config.vision_depth)]
        self.layers = nn.ModuleList(self.blocks)
        self.norm = nn.LayerNorm(width, EPSILON)
        self.projector = nn.Linear(width, config.vlm_width)

    def forward(self, images: Tensor, run_layers: VisionLayers | None = None) -> Tensor:
        """float32 images [N, 3, size, size] in [-1, 1] -> [N, tokens, vlm_width]."""
        x = self.patch(images).flatten(2).transpose(1, 2) + self.position
        x = x.to(self.projector.weight.dtype)
        projected: Tensor = self.projector((run_layers or vision_layers)(self, x))
        return projected


VisionLayers = Callable[[VisionTower, Tensor], Tensor]
"""A tower and its patches [N, tokens, width] -> the final norm of what its layers make of them."""


def vision_layers(tower: VisionTower, x: Tensor) -> Tensor:
    """`VisionLayers` in torch's operations."""
    for layer in tower.layers:
        x = layer(x)
    normed: Tensor = tower.norm(x)
    return normed


class GemmaNorm(nn.Module):
    """The parameters of an RMSNorm: a weight (used as 1 + weight), or in pi0.5 a map from the condition."""

    def __init__(self, width: int, adaptive: bool) -> None:
        super().__init__()
        self.adaptive = adaptive
        if adaptive:
            self.dense = nn.Linear(width, 3 * width)
        else:
            self.weight = nn.Parameter(torch.zeros(width))

    def modulation(self, condition: Tensor | None, gate_dtype: torch.dtype) -> Modulation:
        """`condition` is [n, width] in pi0.5, and not read in pi0."""
        if not self.adaptive:
            width = len(self.weight)
            return Modulation((1 + self.weight) * width**0.5, self.weight.new_full((), (width * EPSILON) ** 0.5))
        scale, shift, gate = self.dense(condition).chunk(3, dim=-1)
        width = scale.shape[-1]
        floor = scale.new_full((), (width * EPSILON) ** 0.5)
        return Modulation((1 + scale) * width**0.5, floor, shift, gate.to(gate_dtype))


class GemmaLayer(nn.Module):
    """A Gemma layer; with `keys_only` just its first norm and its key and value projections."""

    def __init__(self, config: Pi0Config, width: int, mlp: int, adaptive: bool, keys_only: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        rows = (0 if keys_only else self.heads) + 2 * self.kv_heads
        self.attention_norm = GemmaNorm(width, adaptive)
        self.qkv = nn.Linear(width, rows * self.head_dim, bias=False)
        if not keys_only:
            self.out = nn.Linear(self.heads * self.head_dim, width, bias=False)
            self.mlp_norm = GemmaNorm(width, adaptive)
            self.gate_up = nn.Linear(width, 2 * mlp, bias=False)
            self.down = nn.Linear(mlp, width, bias=False)

    def norms(self) -> list[GemmaNorm]:
        return [self.attention_norm, self.mlp_norm] if hasattr(self, "mlp_norm") else [self.attention_norm]

    def project_keys_values(self, normed: Tensor) -> Tensor:
        """Keys and values before rotation, [B, T, 2 kv_heads, head_dim]."""
        rows = 2 * self.kv_heads * self.head_dim
        plain = isinstance(self.qkv, nn.Linear)
        projected = F.linear(normed, self.qkv.weight[-rows:]) if plain else self.qkv(normed)[..., -rows:]
        return projected.unflatten(-1, (2 * self.kv_heads, self.head_dim))

    def forward(
        self,
        x: Tensor,
        attention_norm: Modulation,
        mlp_norm: Modulation,
        rope: Rope,
        mask: Tensor | None,
        extend: LayerExtend,
        scratch: Tensor | None,
        kernels: LayerKernels,
    ) -> Tensor:
        """x [B, T, width] -> the same.

        `scratch`, of the same shape and dtype, is for intermediate results; with it x is overwritten.
        """
        query, keys_values = kernels.heads(self, x, attention_norm, rope, extend, scratch)
        attention = kernels.attend(query, keys_values, mask)
        del query  # its memory is the MLP's
        x = add_projected(x, attention, self.out, attention_norm.gate, in_place=scratch is not None)
        update = kernels.gated(self, x, mlp_norm, scratch)
        return add_projected(x, update, self.down, mlp_norm.gate, in_place=scratch is not None)


class LayerKernels(NamedTuple):
    """How the layers of a Gemma stack compute all but the products that are added to the residual.

    Each but the last takes a layer, x [B, T, width], the norm in front, and `scratch` as in `GemmaLayer.forward`.
    """

    heads: Callable[[GemmaLayer, Tensor, Modulation, Rope, LayerExtend, Tensor | None], tuple[Tensor, Tensor]]
    """-> rotated queries [B, T, heads, D], and the keys and values [B, 2, G, S, D] to attend to."""
    keys_values: Callable[[GemmaLayer, Tensor, Modulation, Rope, LayerExtend, Tensor | None], None]
    """Keys and values only."""
    gated: Callable[[GemmaLayer, Tensor, Modulation, Tensor | None], Tensor]
    """-> gelu(gate) * up [B, T, mlp], which is to be projected down."""
    attend: Callable[[Tensor, Tensor, Tensor | None], Tensor] = attend
    """As the function of that name."""


def project_heads(
    layer: GemmaLayer, x: Tensor, norm: Modulation, rope: Rope, extend: LayerExtend, scratch: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`LayerKernels.heads` in torch's operations."""
    qkv = layer.qkv(rms_norm(x, norm, scratch)).unflatten(-1, (-1, layer.head_dim))
    query = rotate_apart_(qkv[:, :, : layer.heads + layer.kv_heads], rope, layer.heads)
    return query, extend(qkv[:, :, layer.heads :].unflatten(2, (2, -1)).permute(0, 2, 3, 1, 4))


def project_keys_values(
    layer: GemmaLayer, x: Tensor, norm: Modulation, rope: Rope, extend: LayerExtend, scratch: Tensor | None
) -> None:
    """`LayerKernels.keys_values` in torch's operations."""
    projected = layer.project_keys_values(rms_norm(x, norm, scratch))
    rotate_(projected[:, :, : layer.kv_heads], rope)
    extend(projected.unflatten(2, (2, -1)).permute(0, 2, 3, 1, 4))


def project_gated(layer: GemmaLayer, x: Tensor, norm: Modulation, scratch: Tensor | None) -> Tensor:
    """`LayerKernels.gated` in torch's operations."""
    gate, up = layer.gate_up(rms_norm(x, norm, scratch)).chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


TORCH_LAYER = LayerKernels(project_heads, project_keys_values, project_gated)


class GemmaStack(nn.Module):
    """The layers of the language model or of the action expert, without embedding and final norm."""

    def __init__(self, config: Pi0Config, width: int, mlp: int, adaptive: bool, last_keys_only: bool) -> None:
        super().__init__()
        self.blocks = [
            GemmaLayer(config, width, mlp, adaptive, keys_only=last_keys_only and i == config.depth - 1)
            for i in range(config.depth)
        ]
        self.layers = nn.ModuleList(self.blocks)

    def modulations(self, condition: Tensor | None, gate_dtype: torch.dtype) -> tuple[Modulation, ...]:
        """Two per layer; one for a layer that computes keys and values only."""
        norms = [norm for block in self.blocks for norm in block.norms()]
        return tuple(norm.modulation(condition, gate_dtype) for norm in norms)

    def forward(
        self,
        x: Tensor,
        norms: tuple[Modulation, ...],
        rope: Rope,
        mask: Tensor | None,
        extend: Extend,
        scratch: Tensor | None = None,
        last_keys_only: bool = False,
        kernels: LayerKernels = TORCH_LAYER,
    ) -> Tensor:
        """The hidden state behind the last layer, or before it when that is to give keys and values only.

        x [B, T, width]; `scratch`, of the same shape and dtype, saves operations and forbids autograd, and x is
        overwritten.
        """
        blocks = self.blocks[:-1] if last_keys_only else self.blocks
        for i, block in enumerate(blocks):
            x = block(x, norms[2 * i], norms[2 * i + 1], rope, mask, extend(i), scratch, kernels)
        if last_keys_only:
            last = len(blocks)
            kernels.keys_values(self.blocks[last], x, norms[2 * last], rope, extend(last), scratch)
        return x


class Pi0(nn.Module):
    """The policy network.

    Sampling calls `run_prefix`, `run_state`, `step_tables` and `run_actions` with its own buffers;
    training calls `encode_prefix` and `velocity`, which are thin layers over the same four.
    """

    inverse_frequency: Tensor
    time_frequency: Tensor

    def __init__(self, config: Pi0Config) -> None:
        super().__init__()
        self.config = config
        width = config.expert_width
        self.vision = VisionTower(config)
        self.embedding = nn.Embedding(config.vocab_size, config.vlm_width)
        nn.init.normal_(self.embedding.weight, std=config.vlm_width**-0.5)
        self.vlm = GemmaStack(config, config.vlm_width, config.vlm_mlp, adaptive=False, last_keys_only=True)
        self.expert = GemmaStack(config, width, config.expert_mlp, config.pi05, last_keys_only=False)
        self.expert_norm = GemmaNorm(width, config.pi05)
        self.action_in = nn.Linear(config.action_dim, width)
        self.action_out = nn.Linear(width, config.action_dim)
        if config.pi05:
            self.time_in = nn.Linear(width, width)
        else:
            self.state_in = nn.Linear(config.action_dim, width)
            self.time_in = nn.Linear(2 * width, width)
        self.time_out = nn.Linear(width, width)
        self.register_buffer("inverse_frequency", rope_frequency(config.head_dim), persistent=False)
        self.register_buffer("time_frequency", time_frequency(width), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the two Gemma stacks, and unless `vision_float32` of the vision tower."""
        return self.embedding.weight.dtype

    def set_dtype(self, dtype: torch.dtype) -> Pi0:
        """Casts what openpi's mixed precision casts, in place.

        Patch convolution, position table, Gemma norms, and the projections around the expert stay float32; so does the
        whole vision tower with `vision_float32`.
        """
        kept = [self.vision.patch, *(m for m in self.modules() if isinstance(m, GemmaNorm))]
        excluded = {id(parameter) for module in kept for parameter in module.parameters()}
        excluded.add(id(self.vision.position))
        stacks = [self.embedding, self.vlm, self.expert] + [self.vision] * (not self.config.vision_float32)
        for module in stacks:
            for parameter in module.parameters():
                if id(parameter) not in excluded:
                    parameter.data = parameter.data.to(dtype)
        return self

    def rope_table(self) -> Tensor:
        """Rotations of every position that can occur: cos, -sin and sin, [positions, 3 * D/2] in the model's dtype."""
        config = self.config
        count = config.prefix_length + config.state_tokens + config.action_horizon
        angle = torch.arange(count, device=self.inverse_frequency.device)[:, None] * self.inverse_frequency
        return torch.cat([angle.cos(), -angle.sin(), angle.sin()], dim=-1).to(self.dtype)

    def vlm_norms(self) -> tuple[Modulation, ...]:
        """Modulations of the language model's norms."""
        return self.vlm.modulations(None, self.dtype)

    def _expert_norms(self, condition: Tensor | None) -> tuple[Modulation, ...]:
        """Modulations of all expert norms: two per layer, then the final one."""
        return (
            *self.expert.modulations(condition, self.dtype),
            self.expert_norm.modulation(condition, self.dtype),
        )

    def step_tables(self, times: Tensor) -> Step:
        """Everything that depends on the denoising time alone, for float32 times [n]: rows of [n, width].

        Differentiable in the parameters. pi0 folds the projection of the action into the first layer of
        the action-time MLP: in(cat[W x + b, e]) = (A W) x + (A b + T e + c).
        """
        angle = times.to(torch.float64)[:, None] * self.time_frequency
        embedding = torch.cat([angle.sin(), angle.cos()], dim=-1).to(torch.float32)
        if self.config.pi05:
            condition = F.silu(self.time_out(F.silu(self.time_in(embedding))))
            bias = self.action_in.bias.expand(len(times), -1)
            return Step(self.action_in.weight, bias, self._expert_norms(condition))
        of_action, of_time = self.time_in.weight.chunk(2, dim=1)
        bias = F.linear(embedding, of_time, self.time_in.bias + of_action @ self.action_in.bias)
        return Step(of_action @ self.action_in.weight, bias, self._expert_norms(None))

    def run_prefix(
        self,
        images: Tensor,
        tokens: Tensor,
        mask: Tensor,
        rope: Rope,
        norms: tuple[Modulation, ...],
        extend: Extend,
        scratch: Tensor | None = None,
        kernels: Kernels | None = None,
    ) -> Tensor:
        """Encodes cameras and prompt; every layer's keys and values go to `extend`.

        images float32 [B, cameras, 3, size, size] in [-1, 1]; tokens int64 [B, L]; mask [B, 1, 1, P] and rope are of
        all P positions; norms are `vlm_norms()`. Returns the hidden state [B, P, vlm_width] that enters the last
        layer; `scratch` has its shape and dtype.
        """
        batch, kernels = images.shape[0], kernels or TORCH
        image_tokens = (
            self.vision(images.flatten(0, 1), kernels.vision).to(self.dtype).unflatten(0, (batch, -1)).flatten(1, 2)
        )
        language = self.embedding(tokens) * self.config.vlm_width**0.5
        x = torch.cat([image_tokens, language], dim=1)
        hidden: Tensor = self.vlm(x, norms, rope, mask, extend, scratch, last_keys_only=True, kernels=kernels.vlm)
        return hidden

    def run_state(
        self,
        state: Tensor,
        mask: Tensor,
        rope: Rope,
        norms: tuple[Modulation, ...],
        extend: Extend,
        scratch: Tensor | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """Sends the state token's keys and values of every expert layer to `extend` (pi0 only).

        state float32 [B, action_dim], normalised and padded; mask [B, 1, 1, P + 1]; rope is of the token's position;
        norms are those of any `Step`; scratch [B, 1, expert_width] in the model's dtype.
        """
        x = self.state_in(state)[:, None].to(self.dtype)
        kernels = kernels or TORCH
        self.expert(x, norms, rope, mask, extend, scratch, last_keys_only=True, kernels=kernels.expert)

    def run_actions(
        self,
        x_t: Tensor,
        step: Step,
        rope: Rope,
        mask: Tensor,
        extend: Extend,
        scratch: Tensor | None = None,
        kernels: Kernels | None = None,
    ) -> Tensor:
        """Velocity float32 [B, H, action_dim] at x_t float32 [B, H, action_dim].

        scratch [B, H, expert_width] in the model's dtype.
        """
        kernels = kernels or TORCH
        x = kernels.embed_actions(self, x_t, step)
        x = self.expert(x, step.norms, rope, mask, extend, scratch, kernels=kernels.expert)
        return kernels.velocity(self, x, step.norms[-1])

    def encode_images(self, images: Tensor, tokens: Tensor, token_mask: Tensor) -> Prefix:
        """Keys and values of cameras and prompt (shapes as in `run_prefix`); differentiable."""
        layers: list[Tensor] = []

        def keep(keys_values: Tensor) -> Tensor:
            layers.append(keys_values)
            return keys_values

        before = self.config.cameras * self.config.image_tokens
        mask = key_mask(token_mask, before, 0, self.dtype)
        rope = Rope.at(prefix_position(token_mask, before), self.rope_table())
        hidden = self.run_prefix(images, tokens, mask, rope, self.vlm_norms(), lambda _: keep)
        return Prefix(layers, mask, before + token_mask.sum(1), hidden)

    def append_state(self, prefix: Prefix, state: Tensor) -> Prefix:
        """`prefix` with the state token behind it; state float32 [B, action_dim]. pi0.5 has none."""
        if self.config.pi05:
            return prefix
        mask = F.pad(prefix.mask, (0, 1))
        grown: list[Tensor] = []

        def extend(layer: int) -> LayerExtend:
            def grow(keys_values: Tensor) -> Tensor:
                grown.append(_behind(prefix, layer, keys_values))
                return grown[-1]

            return grow

        rope = Rope.at(prefix.position[:, None], self.rope_table())
        self.run_state(state, mask, rope, self._expert_norms(None), extend)
        return Prefix(grown, mask, prefix.position + 1, prefix.hidden)

    def encode_prefix(self, images: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor) -> Prefix:
        """Encodes an observation; shapes as in `run_prefix` and `run_state`. Differentiable."""
        return self.append_state(self.encode_images(images, tokens, token_mask), state)

    def velocity(self, x_t: Tensor, t: Tensor, prefix: Prefix) -> Tensor:
        """Velocity [B, H, action_dim] at x_t [B, H, action_dim] and time t [B] in [0, 1]; 1 is noise.

        Differentiable; the flow-matching target is noise - actions.
        """
        table = self.step_tables(t)
        norms = tuple(norm.rows((slice(None), None)) for norm in table.norms)
        step = Step(table.input_weight, table.input_bias[:, None], norms)
        mask = F.pad(prefix.mask, (0, self.config.action_horizon))
        slots = torch.arange(self.config.action_horizon, device=x_t.device)
        rope = Rope.at(prefix.position[:, None] + slots, self.rope_table())
        return self.run_actions(x_t, step, rope, mask, lambda layer: partial(_behind, prefix, layer))


class Kernels(NamedTuple):
    """How each part of the network is computed: `TORCH`, or for sampling `dsrl_async.pi0.kernels.triton_kernels`."""

    vision: VisionLayers
    vlm: LayerKernels
    expert: LayerKernels
    embed_actions: Callable[[Pi0, Tensor, Step], Tensor]
    """x_t float32 [B, H, action_dim] -> the expert's input [B, H, expert_width]."""
    velocity: Callable[[Pi0, Tensor, Modulation], Tensor]
    """The expert's output and the final norm -> velocity float32 [B, H, action_dim]."""


def embed_actions(model: Pi0, x_t: Tensor, step: Step) -> Tensor:
    """`Kernels.embed_actions` in torch's operations."""
    if step.input_bias.ndim == 1:  # one time for all rows
        x = F.linear(x_t, step.input_weight, step.input_bias)
    else:
        x = F.linear(x_t, step.input_weight) + step.input_bias
    if not model.config.pi05:
        x = model.time_out(F.silu(x))
    return x.to(model.dtype)


def velocity(model: Pi0, x: Tensor, norm: Modulation) -> Tensor:
    """`Kernels.velocity` in torch's operations."""
    projected: Tensor = model.action_out(rms_norm(x, norm, dtype=torch.float32))
    return projected


TORCH = Kernels(vision_layers, TORCH_LAYER, TORCH_LAYER, embed_actions, velocity)
"""What training and by default sampling use."""


def _behind(prefix: Prefix, layer: int, keys_values: Tensor) -> Tensor:
    return torch.cat([prefix.keys_values[layer], keys_values], dim=3)


def time_grid(steps: int, kind: str) -> list[float]:
    """The float32 times at which the velocity is evaluated, from 1 (noise) downwards.

    `accumulated` adds -1/steps in float32 as openpi's loop does; `exact` rounds 1 - k/steps.
    """
    if kind == "exact":
        return [1.0 - k / steps for k in range(steps)]
    delta = torch.tensor(-1.0 / steps)
    time = torch.tensor(1.0)
    times = []
    while time >= -delta / 2:
        times.append(time.item())
        time = time + delta
    return times


def step_rows(table: Step) -> Iterator[Step]:
    """The rows of `Pi0.step_tables` one by one, as one-dimensional views."""
    for k in range(table.input_bias.shape[0]):
        yield Step(table.input_weight, table.input_bias[k], tuple(norm.rows(k) for norm in table.norms))
