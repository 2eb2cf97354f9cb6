"""The base of policies that do not come as a Pi0: a user's own, and those of other projects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsrl_async.policies.protocol import PolicySpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Policy(ABC):
    """A frozen policy, which denoises an action chunk from an initial noise that the agent chooses.

    A subclass is named by `policy.type: my_module:MyPolicy`. It is made as `MyPolicy(checkpoint, **policy.options)`,
    with the `policy.checkpoint` or None, before a run starts and again where it is loaded. Making it should be quick:
    it sets `spec`, and raises ValueError with a sentence for what a user can mend. `load` then reads the weights.

    `encode` and `denoise` are functions of tensors on the device of `load`; they get static buffers, keep no reference
    to them, and their results are copied into others. On a GPU they are captured as CUDA graphs unless they wait for
    the device (`.item()`, `.cpu()`, a condition on a tensor, a shape that depends on values), or `capturable` is false.
    """

    spec: PolicySpec
    weight_bytes: int | None = None
    """Memory of the loaded weights; None: as much as `files` take on the disk."""
    row_bytes: int = 16 << 20
    """Upper estimate of the memory that a row of a batch takes: what `encode` returns, and activations."""
    capturable: bool = True
    """Whether `encode` and `denoise` may be captured as CUDA graphs."""
    warnings: Sequence[str] = ()
    """What the user should know, said at the start of a run."""

    def __init__(self, checkpoint: Path | None) -> None:
        self.checkpoint = checkpoint

    def files(self) -> Sequence[Path]:
        """The files that make this policy what it is: a run is resumed only with the same. By default the checkpoint,
        or what lies in it."""
        if self.checkpoint is None:
            return []
        if self.checkpoint.is_file():
            return [self.checkpoint]
        return [path for path in sorted(self.checkpoint.iterdir()) if path.is_file() and path.name[0] != "."]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ValueError if the policy cannot be given one of these instructions. By default it can, and may ignore
        them."""
        return

    @abstractmethod
    def load(self, device: torch.device, prompts: Sequence[str]) -> None:
        """Reads the weights to the device, for a run with these instructions."""

    @abstractmethod
    def encode(self, images: Tensor, state: Tensor, prompts: Tensor) -> Any:
        """Encodes a batch of observations: a tensor, or tensors in tuples, lists or mappings, of shapes that depend on
        nothing but the batch size.

        Args:
            images: uint8 [B, cameras, image_size, image_size, 3].
            state: float32 [B, robot_state_dim], in the robot's units.
            prompts: int64 [B], numbers of the instructions that `load` was given.
        """

    @abstractmethod
    def denoise(self, encoded: Any, noise: Tensor) -> Tensor:
        """The actions, float32 [B, action_horizon, robot_action_dim] in the robot's units, that the policy denoises
        from `noise`, float32 [B, action_horizon, action_dim]. Without steering it is independent N(0, I).

        `encoded` is what `encode` returned. It may be used again for other noise, and must stay as it is.
        """
