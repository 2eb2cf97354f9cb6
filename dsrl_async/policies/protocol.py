"""What a run asks of a frozen policy, whichever kind it is: before it is loaded, and when it is.

There is no torch in the processes that only ask before, so it is imported for the types alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dsrl_async.config.settings import PolicyConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class PolicySizes(Protocol):
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


class PolicySpec(NamedTuple):
    """The sizes of a policy, see `PolicySizes`."""

    cameras: int
    image_size: int
    robot_state_dim: int
    robot_action_dim: int
    action_horizon: int
    action_dim: int


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


@runtime_checkable
class NormalisedBatch(PolicyBatch, Protocol):
    """A batch of a policy that can be asked again while the agent learns, as DSRL-NA does."""

    normalised_actions: Tensor
    """Output, float32 [B, action_horizon, robot_action_dim]: `actions` before they are scaled to the robot's units."""

    def choose_prompts(self, prompts: Tensor) -> None:
        """Writes the prompts of the first rows, as `fill_prompts`, given by int64 [n] on the device. It can be
        captured, unless prompts hold the state."""

    def prefix(self) -> tuple[Tensor, ...]:
        """All that `encode` has computed, in tensors [B, ...] of their own."""

    def load_prefix(self, prefix: tuple[Tensor, ...]) -> None:
        """Instead of `encode`: the first rows get what `prefix` gave for others, in tensors [n, ...], n <= B."""

    def normalise(self) -> None:
        """Writes `normalised_actions` from `actions` and `state`, as inputs: what `denoise` would have scaled so."""

    def invert(self, refinements: int) -> None:
        """`denoise` backwards, after `encode`: from `normalised_actions`, as an input, to a `noise` of which it would
        make them, each step with so many refinements. How near that comes, `denoise` says; until then the actions mean
        nothing."""


class FrozenPolicy(Protocol):
    """A policy that is loaded, for the prompts of a run."""

    @property
    def spec(self) -> PolicySizes: ...

    prompt_lengths: NDArray[np.int64]
    """int64 [prompts]: the length, in any unit, that a batch needs for each prompt. There should be few different ones:
    a run makes a batch for each. Without prompts all are equal."""
    capturable: bool
    """Whether the halves of its batches can be captured, known when a batch has been made."""

    def batch(self, batch_size: int, prompt_length: int) -> PolicyBatch:
        """Makes the buffers for batches of that size with prompts of up to that length."""


class PolicyMemory(NamedTuple):
    """Estimated bytes that a policy takes on its device."""

    weights: int
    buffers: int
    """What a batch keeps."""
    activations: int
    """What a batch takes temporarily."""


@dataclass(frozen=True)
class PolicyNeeds:
    """What a run reckons with for a policy, whether or not there is a checkpoint of it."""

    spec: PolicySizes
    longest_prompt: int
    """The largest of all possible prompt lengths, see `FrozenPolicy.prompt_lengths`."""
    memory: Callable[[PolicyConfig, bool, int, int], PolicyMemory]
    """What it takes with these settings, on a GPU or not, for batches of a size with prompts of a length."""
    with_horizon: Callable[[int], PolicyNeeds] | None = None
    """The same with another action horizon, if that can be set."""
    prefix_bytes: Callable[[PolicyConfig, bool, int], int] | None = None
    """Bytes of a row of `NormalisedBatch.prefix` with these settings, on a GPU or not, for prompts of a length."""


@dataclass(frozen=True)
class PolicyRecord:
    """Everything that the rest of the package asks of a frozen policy before it is loaded, and how it is loaded.

    `dsrl_async.policies.find.policy_record` returns it for the settings of a run, and nobody else looks at
    `policy.type`, or at what a checkpoint says that it is. Neither torch nor a user's module is imported for it. All
    functions but `load` need neither, and take no longer than to read a file.
    """

    type: str
    """`pi0`, or the class that loads it, like `my_module:MyPolicy`."""
    description: str
    """What it is, for people: a few words."""
    maker: str
    """Whose layout the checkpoint has: `dsrl_async`, `LeRobot`, `openpi or RLinf`, or `yours`."""
    directory: Path | None
    """Where the checkpoint is."""
    needs: PolicyNeeds
    own_settings: frozenset[str]
    """The keys of `policy` that only policies of this kind read; what is not among them has no effect."""
    files: tuple[Path, ...]
    """The files with the weights."""
    prompt_lengths: Callable[[Sequence[str]], list[int]]
    """Those of the loaded policy for these prompts."""
    check_prompts: Callable[[Sequence[str]], tuple[str, ...]]
    """What the user should know of these prompts. Raises ValueError, naming the setting to change, when the policy
    cannot be given one of them."""
    identity: Callable[[Sequence[str]], dict[str, Any]]
    """What tells it from other policies in a run with these prompts, JSON-ready: hashes by name, `config`, a mapping,
    and unless it is a Pi0 its `type`. Raises OSError if a file cannot be read any more."""
    load: Callable[[PolicyConfig, torch.device, Sequence[str], Callable[[], None]], FrozenPolicy]
    """Reads the weights, for a device and the prompts of a run; the last argument is called as this proceeds."""
    warnings: tuple[str, ...] = ()
    """What the user should know."""
    normalised: bool = False
    """Whether its batches are a `NormalisedBatch`."""
    embed_prompts: Callable[[Sequence[str]], NDArray[np.float32]] | None = None
    """float32 [prompts, n]: the mean of the policy's own embeddings of each prompt's tokens; None if it has none.
    Raises OSError if a file cannot be read any more."""

    @property
    def spec(self) -> PolicySizes:
        return self.needs.spec

    @property
    def place(self) -> str:
        """What to call it in a message."""
        return self.type if self.directory is None else str(self.directory)
