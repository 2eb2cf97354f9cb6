"""Environments that do not come with this package, where tests and the processes they start find them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dsrl_async.config.settings import EnvConfig
from dsrl_async.pi0.synthetic import SMALL, pi0_config, write_checkpoint

INSTALLED = Path(__file__).parent / "installed"
"""What would be site-packages: the package `reaching` with its entry point."""


@contextmanager
def found_in(directory: Path) -> Iterator[None]:
    """Have modules and installed packages found in a directory, here and in child processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")])))
        patch.syspath_prepend(str(directory))
        yield
    for name in [name for name, module in sys.modules.items() if _is_in(module, directory)]:
        del sys.modules[name]


def _is_in(module: Any, directory: Path) -> bool:
    return (getattr(module, "__file__", None) or "").startswith(f"{directory}{os.sep}")


def env_settings(name: str, options: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    """The section `env` of a configuration."""
    return EnvConfig.model_validate({"name": name, "options": options or {}, **others}).model_dump()


def write_policy(directory: Path, **sizes: Any) -> None:
    """A tiny policy with random weights; `sizes` are fields of `Pi0Config`."""
    write_checkpoint(directory, pi0_config(False, **{**SMALL, **sizes}), "dsrl_async")
