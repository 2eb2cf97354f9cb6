"""What is checked before anything starts; whatever is wrong becomes one sentence."""

from dsrl_async.run.preflight.host import check_descriptors, check_device
from dsrl_async.run.preflight.memory import actor_bytes, actors_that_fit, check_memory, memory_needed, template_bytes
from dsrl_async.run.preflight.policy import (
    check_checkpoint,
    check_environment,
    check_fit,
    check_policy,
    check_render_quality,
    checkpoint_maker,
    policy_directory,
)
from dsrl_async.run.preflight.run_directory import choose_run_directory, open_run_directory

__all__ = [
    "actor_bytes",
    "actors_that_fit",
    "check_checkpoint",
    "check_descriptors",
    "check_device",
    "check_environment",
    "check_fit",
    "check_memory",
    "check_policy",
    "check_render_quality",
    "checkpoint_maker",
    "choose_run_directory",
    "memory_needed",
    "open_run_directory",
    "policy_directory",
    "template_bytes",
]
