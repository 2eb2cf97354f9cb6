"""Copies between the host and the meta device, which stands for a GPU: torch refuses to mix their tensors as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class CountCopies(TorchDispatchMode):
    """Counts the copies up and down while it is entered, and fails on any other operation of tensors of both sides.

    Nothing can be copied out of the meta device, so a copy down leaves its target as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up = self.down = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        known = dict(kwargs or {})
        tensors = [value for value in (*args, *known.values()) if isinstance(value, Tensor)]
        on_device = {tensor.is_meta for tensor in tensors if tensor.dim()}
        if func is COPIES[1] and "device" in known:
            on_device.add(torch.device(known["device"]).type == "meta")
        if len(on_device) == 2:
            assert func in COPIES, f"{func} mixes tensors of two devices"
            if args[0].is_meta == (func is COPIES[0]):
                self.up += 1
            else:
                self.down += 1
                return args[0]
        return func(*args, **known)
