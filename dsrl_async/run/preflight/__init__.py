"""What is checked before anything starts; whatever is wrong becomes one sentence."""

from dsrl_async.run.preflight.checked_run import CheckedRun, check_run
from dsrl_async.run.preflight.demonstrations import check_demonstrations
from dsrl_async.run.preflight.gpu_memory import check_gpu_memory, describe
from dsrl_async.run.preflight.host import (
    check_channel,
    check_compiler,
    check_descriptors,
    check_device,
    check_devices,
    check_films,
    check_kernels,
    cuda_index,
)
from dsrl_async.run.preflight.hub import fetch_policy
from dsrl_async.run.preflight.made_with import check_made_with, made_with, record_made_with
from dsrl_async.run.preflight.memory import (
    actors_that_fit,
    check_memory,
    memory_needed,
    memory_of_algorithm,
    what_to_lower,
)
from dsrl_async.run.preflight.policy import (
    check_checkpoint,
    check_effect,
    check_environment,
    check_files,
    check_fit,
    check_graphics,
    check_instructions,
    check_prompts,
    check_render_quality,
    fit_agent,
)
from dsrl_async.run.preflight.resume import check_resume
from dsrl_async.run.preflight.run_directory import choose_run_directory, open_run_directory

__all__ = [
    "CheckedRun",
    "actors_that_fit",
    "check_channel",
    "check_checkpoint",
    "check_compiler",
    "check_demonstrations",
    "check_descriptors",
    "check_device",
    "check_devices",
    "check_effect",
    "check_environment",
    "check_files",
    "check_films",
    "check_fit",
    "check_gpu_memory",
    "check_graphics",
    "check_instructions",
    "check_kernels",
    "check_made_with",
    "check_memory",
    "check_prompts",
    "check_render_quality",
    "check_resume",
    "check_run",
    "choose_run_directory",
    "cuda_index",
    "describe",
    "fetch_policy",
    "fit_agent",
    "made_with",
    "memory_needed",
    "memory_of_algorithm",
    "open_run_directory",
    "record_made_with",
    "what_to_lower",
]
