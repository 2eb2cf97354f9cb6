"""What is checked of a run with groups before anything starts; whatever is wrong becomes one sentence."""

from __future__ import annotations

from dsrl_async.config.load import validate
from dsrl_async.config.settings import ConfigError
from dsrl_async.groups.member import config_of
from dsrl_async.groups.placing import local_gpus
from dsrl_async.groups.ray_placement import check_library
from dsrl_async.groups.supervision import policy_on_gpu
from dsrl_async.host.machine import available_memory
from dsrl_async.run.preflight import check_devices, check_gpu_memory, memory_needed
from dsrl_async.run.preflight.checked_run import CheckedRun
from dsrl_async.run.preflight.host import DEVICE_KEYS
from dsrl_async.run.preflight.memory import MODEL_PROCESS_BYTES

GIB = 2**30
LINK_BYTES = 60 << 20
"""Private memory of an uplink or downlink, about."""


def whole_run(run: CheckedRun) -> CheckedRun:
    """The run of all groups' environments together, for which there is one learner."""
    return run.with_actors(run.config.groups * run.config.actors)


def check_groups(run: CheckedRun) -> None:
    """Raises ConfigError where GPUs or memory of this machine do not do for the groups that are to be on it, and for
    the learner."""
    config = run.config
    if config.ray is None:
        check_devices(config)
        if policy_on_gpu(config):
            local_gpus(config.groups, config.group.gpus)
        check_gpu_memory(run)
    else:
        check_library()
        of_learner = ("learner.device",)
        check_devices(config, of_learner if config.learner.device is not None else DEVICE_KEYS)
        check_gpu_memory(run, of_learner)
    parts = run.environment, run.spec, run.policy.needs
    learner = memory_needed(whole_run(run).config, *parts)
    need, of_groups = learner.shared + learner.agent + MODEL_PROCESS_BYTES + LINK_BYTES, 0
    if config.ray is None:
        group = memory_needed(validate(config_of(config, 0)), *parts, learning=False)
        of_groups = config.groups * (group.total - MODEL_PROCESS_BYTES + LINK_BYTES)  # there is no learner in them
    if need + of_groups > (available := available_memory()):
        raise ConfigError(
            f"this run needs about {(need + of_groups) / GIB:.1f} GiB of memory ({of_groups / GIB:.1f} of them for "
            f"{config.groups} groups of {config.actors} environments) and {available / GIB:.1f} are available; lower "
            "replay.capacity, groups or actors"
        )
