"""Where a run's curves, pictures and texts go: TensorBoard, and services that a user asks for (`log.loggers`)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dsrl_async.config.files import how_to_install
from dsrl_async.config.settings import Config, ConfigError

NEEDED = {"wandb": "wandb", "trackio": "trackio"}
"""Logger -> the library that it needs, which is an extra of the same name. TensorBoard's is always there."""


class Facts(NamedTuple):
    """What does not change while a run goes on."""

    settings: Mapping[str, Any]
    """The settings, by dotted key."""
    texts: Mapping[str, str]
    """Title -> Markdown."""
    first_undone: int
    """The environment step from which on what was logged is taken back."""


class Logger(Protocol):
    """A place for curves, whose x axis is environment steps, and for pictures. Any method may raise OSError."""

    def scalars(self, values: Mapping[str, float], env_steps: int) -> None: ...

    def image(self, tag: str, file: bytes, width: int, height: int, env_steps: int) -> None:
        """`file` is the contents of a PNG file or of an animated GIF."""

    def close(self) -> None: ...


def check_loggers(config: Config) -> None:
    """Raises ConfigError if a logger is asked for twice, or its library is not installed."""
    names = config.log.loggers
    if len(set(names)) < len(names):
        raise ConfigError(f"log.loggers: {', '.join(names)} has one twice")
    for name in names:
        if name in NEEDED and find_spec(NEEDED[name]) is None:
            raise ConfigError(f"log.loggers: {name} is not installed; {how_to_install(name)}")


def open_loggers(config: Config, run_dir: Path, facts: Facts) -> dict[str, Logger]:
    """The loggers of a run by name; raises ConfigError if one cannot be had."""
    opened: dict[str, Logger] = {}
    try:
        for name in config.log.loggers:
            module = importlib.import_module(f"dsrl_async.telemetry.loggers.{name}_logger")
            opened[name] = module.open_logger(config, run_dir, facts)
    except BaseException:
        for logger in opened.values():
            logger.close()
        raise
    return opened
