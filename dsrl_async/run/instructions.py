"""What the agent is told of its task, `sac.instruction`: a row of numbers for each of a run's instructions.

The rows follow from the instructions that the agent was trained with, which its checkpoints have, and for `embedding`
from the files of the policy that it steers. So every process makes the same ones, and needs no torch for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsrl_async.config.settings import ConfigError, SacConfig
from dsrl_async.policies import PolicyRecord
from dsrl_async.run import checkpoints
from dsrl_async.untrusted import shown

SAME = 1e-6
"""Embeddings that differ by less than this share of their length are of the same words."""


class Instructions(NamedTuple):
    """A run's instructions, as its agent is told them."""

    learned: tuple[str, ...]
    """Those that the agent was trained with, each once."""
    table: NDArray[np.float32]
    """float32 [prompts, instruction_dim], one row for each of the environment's prompts, by task_index."""


def check_kind(sac: SacConfig, policy: PolicyRecord) -> None:
    """Raises ConfigError if the agent of this policy cannot be told anything as `sac.instruction` says."""
    if sac.instruction == "none" and sac.instruction_dim:
        raise ConfigError("sac.instruction_dim: it has no effect with sac.instruction none; leave it out")
    if sac.instruction == "embedding" and policy.embed_prompts is None:
        raise ConfigError(
            f"sac.instruction: embedding is made of the policy's own embeddings of words, which a Pi0 has and "
            f"{policy.type} does not; set it to task"
        )


def instructions_of(
    sac: SacConfig, policy: PolicyRecord, prompts: Sequence[str], learned: Sequence[str] | None = None
) -> Instructions | None:
    """What the agent is told with an environment's `prompts`; None if nothing.

    Args:
        sac: settings of the agent, with its widths.
        policy: what it steers.
        prompts: the environment's, by task_index; some may be the same.
        learned: those that the agent was trained with; None means these.

    With `task`, rows of prompts that are not among `learned` are zeros: see `learned_by`. The rows' numbers have a
    mean square of 1: over each row with `task`, and over all that were learned with `embedding`.

    Raises:
        ConfigError: as `check_kind`; or the agent cannot tell two instructions apart, or the policy's files cannot be
            read.
    """
    check_kind(sac, policy)
    if not (width := sac.instruction_dim):
        return None
    distinct = tuple(dict.fromkeys(prompts if learned is None else learned))
    if sac.instruction == "task":
        if width != len(distinct):
            raise ConfigError(
                f"sac.instruction_dim: {width} must be the number of instructions, {len(distinct)}, with "
                "sac.instruction task; leave it out"
            )
        of_task = np.eye(width, dtype=np.float32) * np.float32(width**0.5)
        known = dict(zip(distinct, of_task, strict=True))
        nothing = np.zeros(width, np.float32)
        return Instructions(distinct, np.array([known.get(prompt, nothing) for prompt in prompts]))
    assert policy.embed_prompts is not None
    try:
        embedded = policy.embed_prompts([*distinct, *prompts]).astype(np.float64)
    except OSError as error:
        raise ConfigError(f"policy.checkpoint: {error.filename} cannot be read: {error.strerror}") from error
    _check_distinct(distinct, embedded)
    centred = (embedded - embedded[: len(distinct)].mean(0)) @ _signs(embedded.shape[1], width)
    size = np.sqrt(np.square(centred[: len(distinct)]).mean())
    return Instructions(distinct, (centred[len(distinct) :] / (size or 1.0)).astype(np.float32))


def _check_distinct(prompts: Sequence[str], embedded: NDArray[np.float64]) -> None:
    for number, prompt in enumerate(prompts):
        for other in range(number):
            length = np.linalg.norm(embedded[number])
            if np.linalg.norm(embedded[number] - embedded[other]) <= SAME * length:
                raise ConfigError(
                    f"sac.instruction: embedding cannot tell {shown(prompts[other])} from {shown(prompt)}, which have "
                    "the same words in the policy's eyes; take task"
                )


def _signs(rows: int, columns: int) -> NDArray[np.float64]:
    """A projection that keeps distances nearly (Achlioptas 2003): random signs, the same for ever."""
    random = hashlib.shake_256(b"dsrl_async instructions").digest(-(-rows * columns // 8))
    bits = np.unpackbits(np.frombuffer(random, np.uint8), count=rows * columns)
    return 2.0 * bits.reshape(rows, columns).astype(np.float64) - 1.0


def learned_by(checkpoint: Path, sac: SacConfig, prompts: Sequence[str] = ()) -> tuple[str, ...] | None:
    """The instructions that a checkpoint's agent was trained with, each once; None if it is told none.

    Raises ConfigError if it cannot be told one of `prompts`: with `task` it knows those that it was trained with.
    """
    if not sac.instruction_dim:
        return None
    path = checkpoint / checkpoints.AGENT
    try:
        learned = checkpoints.learned_prompts(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if learned is None:
        raise ConfigError(f"{path} does not say which instructions the agent was trained with; use another checkpoint")
    if sac.instruction == "task" and (unknown := [prompt for prompt in prompts if prompt not in learned]):
        raise ConfigError(
            f"{path}: the agent was trained with {len(learned)} instructions, and {shown(unknown[0])} is none of them; "
            "with sac.instruction task it knows no others: leave that one out, or train with sac.instruction embedding"
        )
    return learned
