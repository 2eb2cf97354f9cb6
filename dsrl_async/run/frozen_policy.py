"""What a run asks of a frozen policy, whichever kind it is. Pi0 is one (`dsrl_async.pi0.policy`).

There is no torch in the processes that only need the sizes, so it is imported for the types alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


class PolicySpec(Protocol):
    """The sizes of a policy."""

    @property
    def cameras(self) -> int:
        """Number of images in an observation."""

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""

    @property
    def robot_state_dim(self) -> int:
        """Width of the robot's state."""

    @property
    def robot_action_dim(self) -> int:
        """Width of the robot's action."""

    @property
    def action_horizon(self) -> int:
        """Number of actions that are sampled at once; each has a slot of its own in the noise."""

    @property
    def action_dim(self) -> int:
        """Width of the noise of one action slot."""


class PolicyBatch(Protocol):
    """A policy over static buffers, for batches of B rows.

    `encode` and `denoise` read and write the same storages in every call and never wait for the device, so that each
    can be captured as a CUDA graph. `denoise` may be called again, with other noise, for what was encoded once.
    """

    name: str
    """Tells this batch from others of the same policy, in messages."""
    images: Tensor
    """Input, uint8 [B, cameras, image_size, image_size, 3]."""
    state: Tensor
    """Input, float32 [B, robot_state_dim], in the robot's units."""
    noise: Tensor
    """Input, float32 [B, action_horizon, action_dim]; the policy was trained with independent N(0, I)."""
    actions: Tensor
    """Output, float32 [B, action_horizon, robot_action_dim], in the robot's units."""

    def fill_prompts(self, prompts: NDArray[np.int64]) -> None:
        """Writes the prompts of the first rows, given by their numbers int64 [n], n <= B. `state` is there already.

        It is not part of what is captured.
        """

    def encode(self) -> None:
        """The first half: processes and encodes the observation and the prompt."""

    def denoise(self) -> None:
        """The second half: from `noise` to `actions`."""


class FrozenPolicy(Protocol):
    """A policy that is loaded, for the prompts of a run."""

    @property
    def spec(self) -> PolicySpec: ...

    prompt_lengths: NDArray[np.int64]
    """int64 [prompts]: the length, in any unit, that a batch needs for each prompt. There should be few different ones:
    a run makes a batch for each. Without prompts all are equal."""

    def batch(self, batch_size: int, prompt_length: int) -> PolicyBatch:
        """Makes the buffers for batches of that size with prompts of up to that length."""
