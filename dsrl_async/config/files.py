"""What comes with this package, in a checkout and where it was installed: configurations, and extras to add."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dsrl_async.config.load import read_yaml
from dsrl_async.config.settings import ConfigError
from dsrl_async.untrusted import shown

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parent / "pyproject.toml"
"""The file is there if the package lies in a checkout of its repository, where `configs/` is beside it."""
PATHS = ("checkpoint", "tokenizer", "norm_stats")
"""The settings of `policy` that may be paths."""


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with the package: name, such as `tabletop`, -> file."""
    directory = PACKAGE.parent / "configs" if CHECKOUT.is_file() else PACKAGE / "configs"
    return {path.stem: path for path in sorted(directory.glob("*.yaml"))}


def find_config(given: str) -> Path:
    """The file that `--config` means: a file's path, or else the name of a configuration that comes with the package.

    Raises ConfigError, which lists those, if there is neither.
    """
    path, shipped = Path(given), shipped_configs()
    if os.path.lexists(path):
        return path
    if given in shipped:
        return shipped[given]
    raise ConfigError(f"--config {shown(given)}: no such file; by name there are {', '.join(shipped)}")


def read_config(given: str) -> dict[str, Any]:
    """Read the settings of the configuration that `--config` means, as `load.read_yaml` does.

    A relative path in it is one from the working directory, as on the command line; if there is nothing, it is one from
    the file's own directory. In a configuration that comes with the package it is one from where the package is.
    Raises ConfigError as `find_config` and `load.read_yaml` do.
    """
    path = find_config(given)
    settings, shipped = read_yaml(path), path.resolve() in shipped_configs().values()
    base = PACKAGE.parent if shipped else path.absolute().parent

    def found(value: Any) -> Any:
        beside = isinstance(value, str) and (shipped or not os.path.exists(value)) and os.path.exists(base / value)
        return str(base / value) if beside else value

    policy, replay = settings.get("policy"), settings.get("replay")
    if isinstance(policy, dict):
        policy |= {name: found(policy[name]) for name in PATHS if name in policy}
    if isinstance(replay, dict) and (files := replay.get("demonstrations")) is not None:
        replay["demonstrations"] = list(map(found, files)) if isinstance(files, list) else found(files)
    return settings


def how_to_install(extra: str) -> str:
    """The command that adds an extra of this package, such as `libero`, where it is installed now."""
    return f"pip install -e '.[{extra}]'" if CHECKOUT.is_file() else f'pip install "dsrl_async[{extra}]"'
