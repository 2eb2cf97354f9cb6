"""Whether the machine has the device and the open files that a run needs."""

from __future__ import annotations

from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.host import processes

SPARE_DESCRIPTORS = 64


def check_device(key: str, name: str | None) -> None:
    """Raises ConfigError where the CUDA device that the setting `key` asks for is not there."""
    if name is not None and name.startswith("cuda"):
        import torch  # only here: the supervisor does without

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ConfigError(f"{key}: {name} was asked for, but torch finds no CUDA device; leave it out, or use cpu")
        if int(name.partition(":")[2] or 0) >= count:
            raise ConfigError(f"{key}: {name} was asked for, but the last of torch's CUDA devices is cuda:{count - 1}")


def check_descriptors(config: Config, key: str = "actors") -> None:
    """Every actor has an event of its own, which is an open file; raises ConfigError, naming `key`, if it may not."""
    limit = processes.raise_descriptor_limit()
    if config.actors + SPARE_DESCRIPTORS > limit:
        raise ConfigError(f"{key}: {config.actors} need more open files than the limit of {limit}; raise `ulimit -n`")
