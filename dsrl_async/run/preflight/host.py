"""Whether the machine has the devices and the open files that a run needs."""

from __future__ import annotations

from collections.abc import Sequence

from dsrl_async.config.command_line import program
from dsrl_async.config.load import get_key
from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.host import probe, processes

SPARE_DESCRIPTORS = 64
"""Open files of the launched process beside the workers' events: memory, logs, sockets, the terminal."""
TIME_LIMIT_S = 120.0
"""How long torch may take to be imported and to find its devices."""


def check_devices(config: Config, keys: Sequence[str] = ("device", "learner.device")) -> None:
    """Raises ConfigError where a CUDA device that one of the settings asks for is not there.

    Torch is asked in a child process, and only if there is such a device: the supervisor does without it.
    """
    wanted = {key: name for key in keys if (name := get_key(config, key) or "").startswith("cuda")}
    if not wanted:
        return
    try:
        count = probe.ask(probe.cuda_devices, TIME_LIMIT_S)["devices"]
    except probe.Unanswered as error:
        key, name = next(iter(wanted.items()))
        raise ConfigError(
            f"{key}: {name} was asked for, but torch does not say what there is ({error}); use cpu, or see what "
            f"{program('doctor')} says"
        ) from error
    for key, name in wanted.items():
        check_device(key, name, count)


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
