"""Frozen policies: what a run asks of one, Pi0 and others, and the base of a user's own.

Neither torch nor a user's module is imported here, so that processes which only ask what a policy is stay small.
"""

from __future__ import annotations

from dsrl_async.policies.policy import Policy
from dsrl_async.policies.protocol import (
    FrozenPolicy,
    NormalisedBatch,
    PolicyBatch,
    PolicyMemory,
    PolicyNeeds,
    PolicyRecord,
    PolicySizes,
    PolicySpec,
)

__all__ = [
    "FrozenPolicy",
    "NormalisedBatch",
    "Policy",
    "PolicyBatch",
    "PolicyMemory",
    "PolicyNeeds",
    "PolicyRecord",
    "PolicySizes",
    "PolicySpec",
]
