"""The networks' parts, each with its pass backward written out.

It takes fewer operations than what autograd makes of the pass forward, and multiplies only what somebody needs: the
operations between the products are what a CPU spends its time on where networks are small, and a GPU has to launch.

A part is a function of tensors: what it reads, then its parameters. `run` makes one step of autograd's graph of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

EPSILON = 1e-5
"""Of each layer normalisation, as torch has it."""
Gradients = list[Tensor | None]


class Part(Protocol):
    """A function of several tensors."""

    def forward(self, tensors: Sequence[Tensor], kept: list[Tensor] | None) -> Tensor:
        """Its value. Appends to `kept`, unless that is None, what `backward` needs beside the tensors."""

    def backward(
        self, gradient: Tensor, tensors: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> Gradients:
        """Gradients of those tensors of which one is needed, from that of the value."""


def run(part: Part, *tensors: Tensor) -> Tensor:
    """The part's value, as a step of autograd's graph if one of the tensors has a gradient."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        value: Tensor = _Step.apply(part, *tensors)
        return value
    return part.forward(tensors, None)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Part, *tensors: Tensor) -> Tensor:
        kept: list[Tensor] = []
        value = part.forward(tensors, kept)
        ctx.part, ctx.count = part, len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return None, *ctx.part.backward(gradient, saved[: ctx.count], saved[ctx.count :], ctx.needs_input_grad[1:])


class Convolutions(NamedTuple):
    """Convolutions with ReLU, flattened pixel by pixel, then a linear layer, on `images_at_a_time` images."""

    strides: list[int]
    padding: int
    images_at_a_time: int

    def forward(
        self,
        pixels: Tensor,
        projection: Tensor,
        projection_bias: Tensor,
        convolutions: Sequence[Tensor],
        kept: list[Tensor] | None,
    ) -> Tensor:
        """[B, C, S, S] -> [B, image_latent_dim], of one dtype; `convolutions` are the weight and the bias of each layer
        in turn."""
        outputs = []
        for x in pixels.split(self.images_at_a_time):
            for weight, bias, stride in zip(convolutions[::2], convolutions[1::2], self.strides, strict=True):
                if kept is not None:
                    kept.append(x)
                x = F.conv2d(x, weight, bias, stride, self.padding).relu_()
            if kept is not None:
                kept.append(x)
            outputs.append(F.linear(_by_pixel(x), projection, projection_bias))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def backward(
        self, gradient: Tensor, projection: Tensor, convolutions: Sequence[Tensor], kept: Sequence[Tensor]
    ) -> list[Tensor]:
        """Gradients of `convolutions` and of the projection's weight and bias from that of the output."""
        layers = len(self.strides)
        of_projection: Tensor | None = None
        of_convolutions: list[Tensor] = []
        for index, g in enumerate(gradient.split(self.images_at_a_time)):
            *inputs, x = kept[index * (layers + 1) : (index + 1) * (layers + 1)]
            if of_projection is None:
                of_projection = g.t() @ _by_pixel(x)
            else:
                torch.addmm(of_projection, g.t(), _by_pixel(x), out=of_projection)
            g = (g @ projection).view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
            of_slice: list[Tensor] = []
            for layer in reversed(range(layers)):
                g = torch.ops.aten.threshold_backward(g, x, 0.0)
                x, weight, stride = inputs[layer], convolutions[2 * layer], self.strides[layer]
                g, of_weight, of_bias = torch.ops.aten.convolution_backward(
                    *(g, x, weight, [weight.shape[0]], [stride] * 2, [self.padding] * 2, [1] * 2, False, [0] * 2, 1),
                    output_mask=[layer > 0, True, True],  # nothing learns from the images' gradient
                )
                of_slice[:0] = [of_weight, of_bias]
            if of_convolutions:
                torch._foreach_add_(of_convolutions, of_slice)
            else:
                of_convolutions = of_slice
        assert of_projection is not None
        return [*of_convolutions, of_projection, gradient.sum(0)]


class Encoding(NamedTuple):
    """`networks.Encoder`: images [B, C, S, S], states [B, N], parameters -> fp32 [B, output_dim]."""

    convolutions: Convolutions
    encodes_state: bool
    products: torch.dtype

    def forward(self, tensors: Sequence[Tensor], kept: list[Tensor] | None) -> Tensor:
        pixels, state, *parameters = tensors
        count, dtype = 2 * len(self.convolutions.strides), self.products
        *convolutions, projection, bias = (weight.to(dtype) for weight in parameters[: count + 2])
        of_trunk: list[Tensor] | None = None if kept is None else []
        latent = self.convolutions.forward(pixels.to(dtype), projection, bias, convolutions, of_trunk).float()
        scale, shift = parameters[count + 2 : count + 4]
        image = _norm(latent, scale, shift, kept).tanh_()
        if self.encodes_state:
            weight, bias, scale, shift = parameters[count + 4 :]
            latent = F.linear(state.to(dtype), weight.to(dtype), bias.to(dtype)).float()
            state = _norm(latent, scale, shift, kept).tanh_()
        if kept is not None:
            kept += [image, state, *(of_trunk or [])]
        return torch.cat([image, state], dim=1)

    def backward(
        self, gradient: Tensor, tensors: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> Gradients:
        _, state, *parameters = tensors
        count, dtype = 2 * len(self.convolutions.strides), self.products
        of_norms, (image, latent_state, *of_trunk) = (
            (kept[:6], kept[6:]) if self.encodes_state else (kept[:3], kept[3:])
        )
        width = image.shape[1]
        g = torch.ops.aten.tanh_backward(gradient[:, :width], image)
        g, *of_image_norm = _norm_backward(g, of_norms[:3], *parameters[count + 2 : count + 4])
        *convolutions, projection = (weight.to(dtype) for weight in parameters[: count + 1])
        of_images = self.convolutions.backward(g.to(dtype), projection, convolutions, of_trunk)
        gradients: Gradients = [None, None, *(one.float() for one in of_images), *of_image_norm]
        if self.encodes_state:
            g = torch.ops.aten.tanh_backward(gradient[:, width:], latent_state)
            g, *of_state_norm = _norm_backward(g, of_norms[3:], *parameters[count + 6 :])
            g = g.to(dtype)
            gradients += [(g.t() @ state.to(dtype)).float(), g.sum(0).float(), *of_state_norm]
        return gradients


class Layers(NamedTuple):
    """The actor's layers: features [B, F] and, for each hidden layer, weight, bias and, with `layer_norm`, scale and
    shift; then the last layer's weight and bias -> fp32 [B, outputs]."""

    layer_norm: bool
    products: torch.dtype

    def forward(self, tensors: Sequence[Tensor], kept: list[Tensor] | None) -> Tensor:
        x, *hidden, last, last_bias = tensors
        size, dtype = 4 if self.layer_norm else 2, self.products
        for start in range(0, len(hidden), size):
            weight, bias, *affine = hidden[start : start + size]
            x = F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
            x = (_norm(x.float(), affine[0], affine[1], kept) if affine else x).relu_()
            if kept is not None:
                kept.append(x)
        return F.linear(x.float(), last, last_bias)

    def backward(
        self, gradient: Tensor, tensors: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> Gradients:
        features, *hidden, last, _ = tensors
        size, per_layer, dtype = (4, 4, self.products) if self.layer_norm else (2, 1, self.products)
        inputs = [features, *kept[per_layer - 1 :: per_layer]]
        gradients: Gradients = [gradient.t() @ inputs[-1].float(), gradient.sum(0)]
        g = gradient @ last
        for layer in reversed(range(len(hidden) // size)):
            weight, _, *affine = hidden[layer * size : (layer + 1) * size]
            x, y = inputs[layer], inputs[layer + 1]
            g = torch.ops.aten.threshold_backward(g.to(y.dtype), y, 0.0)
            of_norm: list[Tensor] = []
            if affine:
                g, *of_norm = _norm_backward(g, kept[layer * per_layer :][:3], *affine)
            g = g.to(dtype)
            gradients[:0] = [(g.t() @ x.to(dtype)).float(), g.sum(0).float(), *of_norm]
            if layer or needed[0]:
                g = g @ weight.to(dtype)
        return [g.float() if needed[0] else None, *gradients]


class Heads(NamedTuple):
    """The critic's Q heads, by batched products: features [B, F], noise [B, A], and for each layer a weight [heads, in,
    out] and a bias [heads, 1, out], then with `layer_norm` the scales and the shifts of all hidden layers, of the same
    shape -> fp32 [heads, B, 1]."""

    layers: int
    """The last one included."""
    layer_norm: bool
    products: torch.dtype

    def _parameters(self, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Weights, biases, scales, shifts."""
        layers, hidden = self.layers, (self.layers - 1) * self.layer_norm
        ends = [2, 2 + layers, 2 + 2 * layers, 2 + 2 * layers + hidden, 2 + 2 * layers + 2 * hidden]
        return [tensors[begin:end] for begin, end in itertools.pairwise(ends)]

    def forward(self, tensors: Sequence[Tensor], kept: list[Tensor] | None) -> Tensor:
        weights, biases, scales, shifts = self._parameters(tensors)
        dtype = self.products
        x = torch.cat([tensors[0], tensors[1]], dim=1).to(dtype).expand(len(weights[0]), -1, -1)
        for layer in range(self.layers - 1):
            if kept is not None:
                kept.append(x)
            x = torch.baddbmm(biases[layer].to(dtype), x.to(dtype), weights[layer].to(dtype))
            if self.layer_norm:
                normal = _norm(x.float(), None, None, kept)
                if kept is not None:
                    kept.append(normal)
                x = torch.addcmul(shifts[layer], normal, scales[layer])
            x = x.relu_()
        if kept is not None:
            kept.append(x)
        # in fp32 in any case: what Q values differ by is less than bfloat16 tells apart
        return torch.baddbmm(biases[-1], x.float(), weights[-1])

    def backward(
        self, gradient: Tensor, tensors: Sequence[Tensor], kept: Sequence[Tensor], needed: Sequence[bool]
    ) -> Gradients:
        weights, _, scales, shifts = self._parameters(tensors)
        dtype, per_layer, trains = self.products, 5 if self.layer_norm else 1, needed[2]
        of_weights: Gradients = [None] * self.layers
        of_biases, of_scales, of_shifts = of_weights[:], [None] * len(scales), [None] * len(shifts)
        y = kept[-1]
        if trains:
            of_weights[-1], of_biases[-1] = y.float().transpose(1, 2) @ gradient, gradient.sum(1, keepdim=True)
        g = gradient * weights[-1].transpose(1, 2)
        for layer in reversed(range(self.layers - 1)):
            x, *of_norm = kept[layer * per_layer : (layer + 1) * per_layer]
            g = torch.ops.aten.threshold_backward(g.to(y.dtype), y, 0.0)
            if self.layer_norm:
                *moments, normal = of_norm
                if trains:
                    of_scales[layer], of_shifts[layer] = (g * normal).sum(1, keepdim=True), g.sum(1, keepdim=True)
                g = _norm_backward(g.mul_(scales[layer]), moments, None, None)[0]
            g, weight = g.to(dtype), weights[layer].to(dtype)
            if trains:
                of_weights[layer] = (x.to(dtype).transpose(1, 2) @ g).float()
                of_biases[layer] = g.sum(1, keepdim=True).float()
            if layer:
                y, g = x, g @ weight.transpose(1, 2)
        split = tensors[0].shape[1]
        of_inputs = [
            (g @ rows.transpose(1, 2)).sum(0).float() if wanted else None
            for rows, wanted in zip((weight[:, :split], weight[:, split:]), needed, strict=False)
        ]
        return [*of_inputs, *of_weights, *of_biases, *of_scales, *of_shifts]


def _norm(x: Tensor, scale: Tensor | None, shift: Tensor | None, kept: list[Tensor] | None) -> Tensor:
    """Layer normalisation. Appends what `_norm_backward` needs."""
    normal, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], scale, shift, EPSILON)
    if kept is not None:
        kept += [x, mean, inverse]
    return normal


def _norm_backward(
    gradient: Tensor, kept: Sequence[Tensor], scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what was normalised and of scale and shift, if there are any."""
    x, mean, inverse = kept
    mask = [True, scale is not None, shift is not None]
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
        gradient, x, x.shape[-1:], mean, inverse, scale, shift, mask
    )
    return gradients


def _by_pixel(x: Tensor) -> Tensor:
    """[B, C, S, S] in channels-last memory format -> [B, S * S * C], without a copy."""
    return x.permute(0, 2, 3, 1).flatten(1)
