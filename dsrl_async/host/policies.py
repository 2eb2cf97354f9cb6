"""What is known of a policy, for the processes that must not import torch or a user's module: a child is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsrl_async.config.settings import PolicyConfig
from dsrl_async.host import probe
from dsrl_async.policies import PolicyRecord, find, user

TIME_LIMIT_S = 120.0
"""How long a policy's module may take to be imported, and its class to be made."""


def policy_record(settings: PolicyConfig) -> PolicyRecord:
    """What is known of the policy; raises ValueError as `find.policy_record`."""
    return find.policy_record(settings, _asked)


def _asked(question: Mapping[str, Any]) -> dict[str, Any]:
    silence = f"policy.type: the process that was to say what {question['type']} is did not answer"
    return probe.ask_once(user.answer, question, TIME_LIMIT_S, silence)
