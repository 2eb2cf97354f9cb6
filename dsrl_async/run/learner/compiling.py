"""What torch.compile makes of an update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx


def compiled(function: Callable[[], None]) -> Callable[[], None]:
    """What torch.compile makes of `function`: the same operations on the same static tensors, with kernels fused.

    `function` runs once, so that its operations are known, and what is returned runs once, which takes a minute or so.
    """
    graph = make_fx(function, decomposition_table={torch.ops.aten._fused_adam_.default: _adam})()
    fused: Callable[[], None] = torch.no_grad()(torch.compile(graph, fullgraph=True, dynamic=False))
    fused()
    return fused


def _adam(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    averages_of_squares: Sequence[Tensor],
    _: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    **rest: Any,
) -> None:
    """Adam's fused kernel in operations that can be fused with others. The steps are counted already."""
    for parameter, gradient, average, of_squares, step in zip(
        parameters, gradients, averages, averages_of_squares, steps, strict=True
    ):
        average.lerp_(gradient, 1 - beta1)
        of_squares.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction, of_squares_correction = 1 - beta1**step, 1 - beta2**step
        divisor = (of_squares.sqrt() / of_squares_correction.sqrt()).add_(eps)
        parameter.sub_(lr / correction * (average / divisor))
