"""Matrix products of the observation's pass with both sides rounded to 8 bits (`policy.prefill_precision: fp8`).

A number is kept as float8_e4m3fn, which has 4 bits of precision and reaches 448, times a float32 scale: one for each
token of the activations, found anew in every product, and one for each output channel of the weights, found when they
are loaded. A scale maps its row's largest magnitude to 448. Products are summed in float32.

On a GPU this is `torch._scaled_mm` with row-wise scales. It asks for tokens in rows and weights with an output channel
in each column of memory, for widths that are multiples of 16, and for scales [M, 1] and [1, N] in float32. A CPU, which
has no such products, computes the same from the same rounded numbers: more slowly, to measure what the rounding does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dsrl_async.pi0.model import Pi0, ReplacedLinear

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
SMALLEST = 1e-12
"""What a row of zeros is scaled by, as if it were its largest magnitude."""


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, K] of floats as float8 [N, K] and scales float32 [N, 1], whose product they are up to rounding."""
    largest = torch.linalg.vector_norm(rows, float("inf"), dim=-1, keepdim=True, dtype=torch.float32)
    scale = largest.clamp_(min=SMALLEST).div_(LARGEST)
    # into its place, so that a GPU writes no float32 copy: half of what rounding moves
    return torch.div(rows, scale, out=torch.empty_like(rows, dtype=FLOAT8)), scale


def scaled_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(x * x_scale) (weight * weight_scale)^T + bias, rounded once to `dtype`, [M, N].

    x float8 [M, K], x_scale float32 [M, 1], weight float8 [N, K], weight_scale float32 [1, N], bias [N] of `dtype`.
    """
    if x.device.type != "cpu":
        # not fast accumulation: Hopper then sums with fewer bits than float32, which the CPU's figures do not show
        return torch._scaled_mm(
            x, weight.t(), scale_a=x_scale, scale_b=weight_scale, bias=bias, out_dtype=dtype, use_fast_accum=False
        )
    product = x.float() @ weight.float().t()
    product.mul_(x_scale).mul_(weight_scale)
    return (product if bias is None else product.add_(bias)).to(dtype)


class Fp8Linear(ReplacedLinear):
    """A linear layer with the weights of another in 8 bits, or with room for them if those are on the meta device."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(torch.empty_like(weight, dtype=FLOAT8), requires_grad=False)
        self.scale = nn.Parameter(weight.new_empty(1, len(weight), dtype=torch.float32), requires_grad=False)
        self.bias = linear.bias
        self.quantise = quantise
        """How activations are rounded; `kernels.triton_kernels` puts a kernel of its own here."""
        if not weight.is_meta:
            self.fill(weight)

    @torch.no_grad()
    def fill(self, weight: Tensor, rows: slice = slice(None)) -> None:
        """Sets these rows of the weight, from floats [rows, in_features]."""
        values, scale = quantise(weight)
        self.weight[rows].copy_(values)
        self.scale[:, rows].copy_(scale.t())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] of the same dtype."""
        values, scale = self.quantise(x.flatten(0, -2))
        product = scaled_product(values, scale, self.weight, self.scale, self.bias, x.dtype)
        return product.unflatten(0, x.shape[:-1])


def use_fp8(model: Pi0, weights: Iterable[str]) -> None:
    """Replaces the layers that have these weights, which are some of `memory.fp8_weights`, with `Fp8Linear`s."""
    for name in weights:
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        layers = model.get_submodule(parent)
        setattr(layers, child, Fp8Linear(getattr(layers, child)))


@contextmanager
def rows_to_fill(model: Pi0, name: str, rows: slice) -> Iterator[Tensor]:
    """These rows of a parameter, for the caller to write to.

    Those of a weight in 8 bits are a float32 copy without values, which is rounded when it has been written.
    """
    parameter = model.get_parameter(name)
    if parameter.dtype != FLOAT8:
        yield parameter[rows]
        return
    whole = torch.empty(parameter[rows].shape, dtype=torch.float32, device=parameter.device)
    yield whole
    layer = model.get_submodule(name.removesuffix(".weight"))
    assert isinstance(layer, Fp8Linear)
    layer.fill(whole, rows)
