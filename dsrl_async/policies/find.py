"""Which policy the settings of a run mean: by `policy.type`, or by what the checkpoint says that it is."""

from __future__ import annotations

from pathlib import Path

from dsrl_async.config.hub import local_path
from dsrl_async.config.settings import PolicyConfig
from dsrl_async.pi0.config import EMBEDDED_POLICY
from dsrl_async.pi0.files import find_policy, read_content
from dsrl_async.policies.pi0 import PI0_SETTINGS, pi0_record
from dsrl_async.policies.protocol import PolicyRecord
from dsrl_async.policies.user import USER_SETTINGS, Ask, answer, user_record

OWN_SETTINGS = PI0_SETTINGS | USER_SETTINGS
"""The keys of `policy` that only policies of one kind read; all policies read the others."""

LEROBOT_TYPES = {"diffusion": "dsrl_async.policies.diffusion:DiffusionPolicy"}
"""`type` in LeRobot's config.json -> the class that loads such a policy, if it is not a Pi0."""


def policy_record(settings: PolicyConfig, ask: Ask = answer) -> PolicyRecord:
    """What is known of the policy. This is the one place where settings become a policy.

    `ask` calls `user.answer`; without it, this process imports the module of a policy that is not a Pi0. Raises
    ValueError with a sentence if there is no such policy, or it is incomplete or contradicts itself.
    """
    checkpoint = settings.checkpoint and local_path(settings.checkpoint)
    if settings.type is not None:
        return user_record({"type": settings.type, "checkpoint": checkpoint, "options": settings.options}, ask)
    directory = EMBEDDED_POLICY if checkpoint is None else Path(checkpoint)
    content = {} if directory.is_file() else read_content(directory)
    stated = content.get("type")
    if isinstance(stated, str) and (found := LEROBOT_TYPES.get(stated)) is not None:
        question = {"type": found, "checkpoint": str(directory), "options": settings.options}
        return user_record(question, ask, maker="LeRobot")
    return pi0_record(find_policy(directory, **settings.overrides(), content=content))
