"""Asks a GPU whether it computes in 8 bits. `probe.ask` calls this in a process of its own, which imports torch."""

from __future__ import annotations

from typing import Any


def fp8_fault(index: int) -> dict[str, Any]:
    """Why a CUDA device cannot compute what `policy.prefill_precision: fp8` asks of it: `fault`, empty if it can."""
    import torch

    capability = torch.cuda.get_device_capability(index)
    torch_version = tuple(map(int, torch.__version__.split(".")[:2]))
    if capability < (8, 9):
        return {"fault": "it has compute capability {}.{}, and products of 8 bits begin with 8.9".format(*capability)}
    if capability == (8, 9) and torch_version < (2, 12):  # pytorch/pytorch#177651
        return {"fault": f"torch {torch.__version__} starts them on the wrong stream of this GPU, 2.12 does not"}
    try:
        from dsrl_async.pi0.fp8 import quantise, scaled_product

        ones = torch.ones(32, 64, dtype=torch.bfloat16, device=f"cuda:{index}")
        values, scale = quantise(ones)
        product = scaled_product(values, scale, values, scale.t().contiguous(), ones[0, :32], torch.bfloat16)
        wrong = (product - 65).abs().max().item()
    except RuntimeError as error:
        return {"fault": str(error).partition("\n")[0]}
    return {"fault": f"a product that is 65 came out wrong by {wrong:g}" if wrong > 0.5 else ""}
