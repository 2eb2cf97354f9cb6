"""Modules whose parameters are views of one contiguous buffer.

With one buffer per network, the soft target update is one `lerp_`, the gradient norm one reduction, Adam one fused
kernel, and a broadcast of the weights one memory copy. A receiver writes into the same storage, so captured CUDA graphs
that read the parameters stay valid.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


class FlatModule(nn.Module):
    """A module whose parameters, once `flatten_` has run, are views of `flat`.

    Attributes:
        flat: fp32 [N], all parameters in the order of `named_parameters()`.
        flat_grad: fp32 [N], the gradients that `backward_` computes, in the same order; empty if not trainable.
    """

    flat: Tensor
    flat_grad: Tensor

    def flatten_(self, device: torch.device | str, trainable: bool) -> None:
        """Move all parameters into one new buffer on `device`. Call it once, at the end of `__init__`."""
        parameters = list(self.parameters())
        self.flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters]).to(device)
        self.flat_grad = torch.zeros_like(self.flat) if trainable else self.flat.new_empty(0)
        offset = 0
        for parameter in parameters:
            end = offset + parameter.numel()
            parameter.data = self.flat[offset:end].view(parameter.shape)
            parameter.requires_grad_(trainable)
            offset = end

    def _apply(self, *args: object, **kwargs: object) -> FlatModule:
        # `.to()`, `.half()` and the like give every parameter storage of its own and leave `flat` behind.
        raise RuntimeError("a FlatModule stays on the device and in the dtype it was built with; build another one")

    @torch.no_grad()
    def load_flat_(self, values: Tensor) -> None:
        """Copy `values` (fp32 [N], on any device) into the parameters.

        Raises:
            ValueError: the length or the dtype does not fit.
        """
        if values.shape != self.flat.shape or values.dtype != self.flat.dtype:
            raise ValueError(
                f"expected a float32 vector of {self.flat.numel()} weights but got {values.dtype} of shape"
                f" {tuple(values.shape)}; sender and receiver must use the same sac settings"
            )
        self.flat.copy_(values)

    def backward_(self, loss: Tensor) -> None:
        """Overwrite `flat_grad` with the gradient of `loss` with respect to this module's parameters.

        No gradient is computed for other networks that `loss` runs through.
        """
        gradients = torch.autograd.grad(loss, list(self.parameters()))
        torch.cat([gradient.reshape(-1) for gradient in gradients], out=self.flat_grad)


def layout_hash(module: nn.Module) -> int:
    """64-bit unsigned hash of the names and shapes of all parameters, in order, the same in every process.

    Two modules with the same hash read a flat vector in the same way.
    """
    text = ";".join(f"{name}:{tuple(parameter.shape)}" for name, parameter in module.named_parameters())
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def clip_gradient_(gradient: Tensor, limit: float | None) -> Tensor:
    """Scale `gradient` in place to a Euclidean norm of at most `limit`; None leaves it as it is.

    Returns:
        fp32 []: the norm before clipping.
    """
    norm = torch.linalg.vector_norm(gradient)
    if limit is not None:
        # Unlike a comparison on the host, the clamp does not synchronise. limit / 0 is inf, which becomes 1.
        gradient.mul_((limit / norm).clamp_(max=1.0))
    return norm
