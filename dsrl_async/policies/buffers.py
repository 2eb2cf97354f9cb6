"""The static buffers of a `Policy`, which make a frozen policy of its two functions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsrl_async.policies.policy import Policy
from dsrl_async.users_code import FAULTS, blamed

logger = logging.getLogger(__name__)

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount")
"""Operations of ATen that wait for the device, since a number or a shape depends on what it computes."""

MASKED, MASKS = ("index", "index_put", "index_put_"), (torch.bool, torch.uint8)
"""Operations that wait where an index is a mask."""


class Waits(Exception):
    """Something waits for the device; the message is the operation."""


class NoWaiting(TorchDispatchMode):
    """Raises `Waits` at the first operation inside the `with` that would wait for a GPU, whatever the device is."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in WAITING:
            raise Waits(name)
        if name in MASKED and any(index is not None and index.dtype in MASKS for index in args[1]):
            raise Waits("a mask as an index")
        result = function(*args, **(kwargs or {}))
        if name == "_to_copy" and result.is_cpu != args[0].is_cpu:
            raise Waits("a copy to or from the device")
        return result


class BufferedPolicy:
    """A loaded `Policy`, as a `FrozenPolicy`. All prompts have the length 0: the policy knows them by their numbers."""

    def __init__(self, name: str, policy: Policy, device: torch.device, prompts: Sequence[str]) -> None:
        """`name` is what messages call it. Raises RuntimeError, naming the user's line, if it cannot be loaded."""
        self.name, self.policy, self.device, self.spec = name, policy, device, policy.spec
        self.prompt_lengths = np.zeros(len(prompts), np.int64)
        with torch.no_grad():
            self.call(policy.load, device, list(prompts))
        self.capturable = policy.capturable

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function of the policy. Raises RuntimeError, which names the user's line, for what it raises."""
        try:
            return function(*arguments)
        except Waits:
            raise
        except FAULTS as error:
            what = f"{getattr(function, '__name__', 'it')} failed"
            raise RuntimeError(
                f"the policy {self.name}: {what}: {blamed(error, type(self.policy).__module__)}"
            ) from error

    def batch(self, batch_size: int, prompt_length: int) -> BufferedBatch:
        batch = BufferedBatch(self, batch_size)
        if self.capturable and (reason := batch.waits()) is not None:
            self.capturable = False
            message = "the policy %s is not captured in CUDA graphs, since it waits for the device: %s"
            logger.warning(message, self.name, reason)
        return batch


class BufferedBatch:
    """The buffers of a `Policy` for batches of B, see `PolicyBatch`. What `encode` returns has its own."""

    @torch.no_grad()
    def __init__(self, frozen: BufferedPolicy, batch_size: int) -> None:
        """Raises RuntimeError if the policy's functions fail or return something of another shape."""
        spec, device = frozen.spec, frozen.device
        self.frozen, self.name = frozen, f"batch size {batch_size}"
        pixels = (batch_size, spec.cameras, spec.image_size, spec.image_size, 3)
        self.images = torch.zeros(pixels, dtype=torch.uint8, device=device)
        self.state = torch.zeros(batch_size, spec.robot_state_dim, device=device)
        self.noise = torch.zeros(batch_size, spec.action_horizon, spec.action_dim, device=device)
        self.actions = torch.zeros(batch_size, spec.action_horizon, spec.robot_action_dim, device=device)
        self.prompts = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(batch_size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.encoded = map_tensors(torch.clone, self._encode(), f"the policy {frozen.name}: encode returned")
        found = self._denoise()
        if not isinstance(found, Tensor) or found.shape != self.actions.shape:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise RuntimeError(
                f"the policy {frozen.name}: denoise must return [{batch_size}, action_horizon, robot_action_dim], "
                f"{list(self.actions.shape)}, and not {shape}"
            )

    def fill_prompts(self, prompts: NDArray[np.int64]) -> None:
        count = len(prompts)
        self._numbers[:count].numpy()[:] = prompts
        self.prompts[:count].copy_(self._numbers[:count], non_blocking=True)

    @torch.no_grad()
    def encode(self) -> None:
        copy_tensors(self._encode(), self.encoded)

    @torch.no_grad()
    def denoise(self) -> None:
        self.actions.copy_(self._denoise())

    @torch.no_grad()
    def waits(self) -> str | None:
        """The user's line and the operation, if one waits for the device."""
        try:
            with NoWaiting():
                self._encode()
                self._denoise()
        except Waits as error:
            return blamed(error, type(self.frozen.policy).__module__).replace(f"{Waits.__name__}: ", "")
        return None

    def _encode(self) -> Any:
        return self.frozen.call(self.frozen.policy.encode, self.images, self.state, self.prompts)

    def _denoise(self) -> Any:
        return self.frozen.call(self.frozen.policy.denoise, self.encoded, self.noise)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any, what: str) -> Any:
    """The same tuples, lists and mappings with other tensors; raises RuntimeError, beginning with `what`, if there is
    something else in them."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item, what) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(function, item, what) for item in value]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    raise RuntimeError(f"{what} {type(value).__name__}; return tensors, in tuples, lists or mappings")


def copy_tensors(source: Any, target: Any) -> None:
    """Copies the tensors of nested values into those of others of the same structure."""
    if isinstance(target, Tensor):
        target.copy_(source)
    elif isinstance(target, Mapping):
        for key, item in target.items():
            copy_tensors(source[key], item)
    else:
        for item, other in zip(source, target, strict=True):
            copy_tensors(item, other)
