"""Whether the machine has the devices and the open files that a run needs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsrl_async.config.command_line import program
from dsrl_async.config.load import get_key
from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.host import probe, processes

SPARE_DESCRIPTORS = 64
"""Open files of the launched process beside the workers' events: memory, logs, sockets, the terminal."""
DEVICE_KEYS = ("device", "learner.device")
"""The settings that name a device: the policy's, and the learner's."""
TIME_LIMIT_S = 120.0
"""How long torch may take to be imported and to find its devices."""


def check_devices(config: Config, keys: Sequence[str] = DEVICE_KEYS) -> None:
    """Raises ConfigError where a CUDA device that one of the settings asks for is not there."""
    for key in keys:
        if (name := get_key(config, key) or "").startswith("cuda"):
            found = cuda_devices()
            if "error" in found:
                raise ConfigError(
                    f"{key}: {name} was asked for, but torch does not say what there is ({found['error']}); use cpu, "
                    f"or see what {program('doctor')} says"
                )
            check_device(key, name, found["devices"])


@functools.cache
def cuda_devices() -> dict[str, Any]:
    """What `probe.cuda_devices` says, or that there are none and the `error`.

    Torch is asked once, in a child process: the supervisor does without it.
    """
    try:
        return probe.ask(probe.cuda_devices, TIME_LIMIT_S)
    except probe.Unanswered as error:
        return {"devices": 0, "error": str(error)}


def has_driver() -> bool:
    """Whether there may be a CUDA device: without a driver's file (the second one is WSL's) torch need not be asked."""
    return any(Path(file).exists() for file in ("/dev/nvidiactl", "/dev/dxg"))


def cuda_index(config: Config, key: str) -> int | None:
    """The number of the CUDA device that a run uses by the setting `key`, one of `DEVICE_KEYS`; None for the CPU."""
    name = get_key(config, key) or config.device
    if name == "auto":
        return 0 if not config.serial and has_driver() and cuda_devices()["devices"] else None
    return int(name.partition(":")[2] or 0) if name.startswith("cuda") else None


def check_device(key: str, name: str | None, count: int) -> None:
    """Raises ConfigError where the CUDA device that the setting `key` asks for is not one of the `count` that there
    are."""
    if name is not None and name.startswith("cuda"):
        if not count:
            raise ConfigError(f"{key}: {name} was asked for, but torch finds no CUDA device; leave it out, or use cpu")
        if int(name.partition(":")[2] or 0) >= count:
            raise ConfigError(f"{key}: {name} was asked for, but the last of torch's CUDA devices is cuda:{count - 1}")


def check_descriptors(config: Config, key: str = "actors") -> None:
    """Every worker has an event of its own, which is an open file; raises ConfigError, naming `key`, if it may not."""
    limit = processes.raise_descriptor_limit()
    if config.actors + SPARE_DESCRIPTORS > limit:
        raise ConfigError(f"{key}: {config.actors} need more open files than the limit of {limit}; raise `ulimit -n`")
