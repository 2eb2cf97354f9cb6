"""A deliberately naive Pi0 / Pi0.5, to check the lean one against.

Written from the description of the architecture, not from `dsrl_async.pi0`: separate projections, a third
camera that is masked out, one block mask over cameras, language, state and actions, key heads repeated, and
every token of both models recomputed in every denoising step. It reads a state dict under openpi's names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsrl_async.pi0.config import Pi0Config

ROOT = "paligemma_with_expert."
VISION = ROOT + "paligemma.model.vision_tower.vision_model."
PROJECTOR = ROOT + "paligemma.model.multi_modal_projector.linear"
VLM = ROOT + "paligemma.model.language_model."
EXPERT = ROOT + "gemma_expert.model."
EMBEDDING = ROOT + "paligemma.lm_head.weight"


def tensor_shapes(c: Pi0Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that openpi stores."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int, bias: bool = True) -> None:
        shapes[name + ".weight"] = (out, into)
        if bias:
            shapes[name + ".bias"] = (out,)

    w = c.vision_width
    shapes[VISION + "embeddings.patch_embedding.weight"] = (w, 3, c.patch_size, c.patch_size)
    shapes[VISION + "embeddings.patch_embedding.bias"] = (w,)
    shapes[VISION + "embeddings.position_embedding.weight"] = ((c.image_size // c.patch_size) ** 2, w)
    for i in range(c.vision_depth):
        layer = f"{VISION}encoder.layers.{i}."
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = (w,)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}self_attn.{name}", w, w)
        linear(layer + "mlp.fc1", c.vision_mlp, w)
        linear(layer + "mlp.fc2", w, c.vision_mlp)
    shapes[VISION + "post_layernorm.weight"] = shapes[VISION + "post_layernorm.bias"] = (w,)
    linear(PROJECTOR, c.vlm_width, w)
    shapes[EMBEDDING] = (c.vocab_size, c.vlm_width)
    shapes[ROOT + "gemma_expert.lm_head.weight"] = (c.vocab_size, c.expert_width)
    for stack, width, mlp in ((VLM, c.vlm_width, c.vlm_mlp), (EXPERT, c.expert_width, c.expert_mlp)):
        adaptive = c.pi05 and stack is EXPERT
        norms = [f"{stack}norm"]
        for i in range(c.depth):
            layer = f"{stack}layers.{i}."
            linear(layer + "self_attn.q_proj", c.heads * c.head_dim, width, bias=False)
            linear(layer + "self_attn.k_proj", c.kv_heads * c.head_dim, width, bias=False)
            linear(layer + "self_attn.v_proj", c.kv_heads * c.head_dim, width, bias=False)
            linear(layer + "self_attn.o_proj", width, c.heads * c.head_dim, bias=False)
            linear(layer + "mlp.gate_proj", mlp, width, bias=False)
            linear(layer + "mlp.up_proj", mlp, width, bias=False)
            linear(layer + "mlp.down_proj", width, mlp, bias=False)
            norms += [layer + "input_layernorm", layer + "post_attention_layernorm"]
        for norm in norms:
            if adaptive:
                linear(norm + ".dense", 3 * width, width)
            else:
                shapes[norm + ".weight"] = (width,)
    e = c.expert_width
    linear("action_in_proj", e, c.action_dim)
    linear("action_out_proj", c.action_dim, e)
    if c.pi05:
        linear("time_mlp_in", e, e)
        linear("time_mlp_out", e, e)
    else:
        linear("state_proj", e, c.action_dim)
        linear("action_time_mlp_in", e, 2 * e)
        linear("action_time_mlp_out", e, e)
    return shapes


def random_state_dict(c: Pi0Config, seed: int) -> dict[str, Tensor]:
    """Random tensors, scaled so that activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in tensor_shapes(c).items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 16
        state[name] = torch.randn(shape, generator=generator) / fan_in**0.5
    return state


class Reference:
    def __init__(self, config: Pi0Config, state_dict: dict[str, Tensor]) -> None:
        self.c, self.w = config, state_dict

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.w[name + ".weight"].T
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-6) * self.w[name + ".weight"] + self.w[name + ".bias"]

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def vision(self, image: Tensor) -> Tensor:
        """One camera [B, 3, size, size] -> [B, tokens, vlm_width]."""
        c, p = self.c, self.c.patch_size
        kernel = self.w[VISION + "embeddings.patch_embedding.weight"].flatten(1)
        tokens = []
        for row in range(c.image_size // p):
            for column in range(c.image_size // p):
                patch = image[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p].flatten(1)
                tokens.append(patch @ kernel.T + self.w[VISION + "embeddings.patch_embedding.bias"])
        x = torch.stack(tokens, 1) + self.w[VISION + "embeddings.position_embedding.weight"]
        dim = c.vision_width // c.vision_heads
        for i in range(c.vision_depth):
            layer = f"{VISION}encoder.layers.{i}."
            y = self.layer_norm(x, layer + "layer_norm1")
            q, k, v = (self.linear(y, f"{layer}self_attn.{name}_proj") for name in "qkv")
            heads = []
            for h in range(c.vision_heads):
                part = slice(h * dim, (h + 1) * dim)
                logits = q[..., part] @ k[..., part].transpose(1, 2) * dim**-0.5
                heads.append(logits.softmax(-1) @ v[..., part])
            x = x + self.linear(torch.cat(heads, -1), layer + "self_attn.out_proj")
            y = self.layer_norm(x, layer + "layer_norm2")
            x = x + self.linear(self.gelu(self.linear(y, layer + "mlp.fc1")), layer + "mlp.fc2")
        return self.linear(self.layer_norm(x, VISION + "post_layernorm"), PROJECTOR)

    def time_embedding(self, t: float) -> Tensor:
        half = self.c.expert_width // 2
        angles = []
        for j in range(half):
            period = 4e-3 * (4.0 / 4e-3) ** (j / (half - 1))
            angles.append(2 * math.pi * t / period)
        values = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        return torch.tensor(values, dtype=torch.float64).float()

    def norm(self, x: Tensor, name: str, condition: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """Normalised x, and the gate for the sublayer behind it."""
        y = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6)
        if name + ".weight" in self.w:
            return y * (1 + self.w[name + ".weight"]), 1.0
        assert condition is not None
        width = x.shape[-1]
        modulation = self.linear(condition, name + ".dense")
        scale, shift, gate = modulation[:width], modulation[width : 2 * width], modulation[2 * width :]
        return y * (1 + scale) + shift, gate

    def rope(self, x: Tensor, position: Tensor) -> Tensor:
        """x [B, heads, T, D] at position [B, T]: channel i is rotated with channel i + D/2."""
        half = self.c.head_dim // 2
        out = torch.empty_like(x)
        for i in range(half):
            angle = (position * 10000.0 ** (-2 * i / self.c.head_dim))[:, None, :]
            a, b = x[..., i], x[..., i + half]
            out[..., i] = a * angle.cos() - b * angle.sin()
            out[..., i + half] = b * angle.cos() + a * angle.sin()
        return out

    def project(
        self, x: Tensor, layer: str, position: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
        y, gate = self.norm(x, layer + "input_layernorm", condition)

        def heads(name: str, count: int) -> Tensor:
            z = self.linear(y, f"{layer}self_attn.{name}_proj")
            return z.view(z.shape[0], z.shape[1], count, self.c.head_dim).transpose(1, 2)

        q, k, v = heads("q", self.c.heads), heads("k", self.c.kv_heads), heads("v", self.c.kv_heads)
        return self.rope(q, position), self.rope(k, position), v, gate

    def finish(
        self, x: Tensor, attention: Tensor, layer: str, gate: Tensor | float, condition: Tensor | None
    ) -> Tensor:
        x = x + self.linear(attention, layer + "self_attn.o_proj") * gate
        y, gate = self.norm(x, layer + "post_attention_layernorm", condition)
        hidden = self.gelu(self.linear(y, layer + "mlp.gate_proj")) * self.linear(y, layer + "mlp.up_proj")
        return x + self.linear(hidden, layer + "mlp.down_proj") * gate

    def velocity(
        self,
        cameras: list[tuple[Tensor, bool]],
        tokens: Tensor,
        token_mask: Tensor,
        state: Tensor,
        x_t: Tensor,
        t: float,
    ) -> Tensor:
        """cameras: (image [B, 3, size, size], whether it is there)."""
        c = self.c
        batch, horizon = x_t.shape[:2]
        prefix, valid = [], []
        for image, there in cameras:
            prefix.append(self.vision(image))
            valid.append(torch.full(prefix[-1].shape[:2], there))
        prefix.append(self.w[EMBEDDING][tokens] * math.sqrt(c.vlm_width))
        valid.append(token_mask)
        embedded = torch.cat(prefix, 1)
        time = self.time_embedding(t)
        condition = None
        if c.pi05:
            hidden = torch.nn.functional.silu(self.linear(time, "time_mlp_in"))
            condition = torch.nn.functional.silu(self.linear(hidden, "time_mlp_out"))
            suffix = self.linear(x_t, "action_in_proj")
        else:
            action = self.linear(x_t, "action_in_proj")
            joined = torch.cat([action, time.expand(batch, horizon, -1)], -1)
            hidden = torch.nn.functional.silu(self.linear(joined, "action_time_mlp_in"))
            actions = self.linear(hidden, "action_time_mlp_out")
            suffix = torch.cat([self.linear(state, "state_proj")[:, None], actions], 1)
        p, s = embedded.shape[1], suffix.shape[1]
        valid.append(torch.ones(batch, s, dtype=torch.bool))
        validity = torch.cat(valid, 1)
        position = validity.long().cumsum(1) - 1
        block = torch.zeros(p + s, dtype=torch.long)
        block[p:] = 1
        block[p + s - horizon :] = 2
        allowed = (block[None, :] <= block[:, None])[None] & validity[:, None, :] & validity[:, :, None]
        mask = torch.where(allowed, 0.0, -2.3819763e38)[:, None]
        for i in range(c.depth):
            vlm, expert = f"{VLM}layers.{i}.", f"{EXPERT}layers.{i}."
            q1, k1, v1, gate1 = self.project(embedded, vlm, position[:, :p], None)
            q2, k2, v2, gate2 = self.project(suffix, expert, position[:, p:], condition)
            q, k, v = torch.cat([q1, q2], 2), torch.cat([k1, k2], 2), torch.cat([v1, v2], 2)
            k = k.repeat_interleave(c.heads // c.kv_heads, dim=1)
            v = v.repeat_interleave(c.heads // c.kv_heads, dim=1)
            logits = q @ k.transpose(2, 3) * c.head_dim**-0.5 + mask
            attention = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
            embedded = self.finish(embedded, attention[:, :p], vlm, gate1, None)
            suffix = self.finish(suffix, attention[:, p:], expert, gate2, condition)
        out, _ = self.norm(suffix, EXPERT + "norm", condition)
        return self.linear(out[:, -horizon:], "action_out_proj")

    def sample(
        self, images: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor, noise: Tensor, steps: int
    ) -> Tensor:
        """images [B, cameras, 3, size, size]; a camera that is not there is added, as openpi does."""
        cameras = [(images[:, i], True) for i in range(images.shape[1])]
        cameras.append((torch.full_like(images[:, 0], -1.0), False))
        x, delta, time = noise, torch.tensor(-1.0 / steps), torch.tensor(1.0)
        while time >= -delta / 2:
            x = x + delta * self.velocity(cameras, tokens, token_mask, state, x, time.item())
            time = time + delta
        return x
