"""MuJoCo, robosuite and LIBERO, imported in the one way that does not depend on a process's surroundings.

Whoever needs `mujoco` takes it from here: with `MUJOCO_GL` set, as guides for robots tell users, a plain import loads
OpenGL's library, and fails without it. The tabletop needs none, and LIBERO's is loaded by robosuite.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from dsrl_async import untrusted
from dsrl_async.envs import graphics, libero_files

__all__ = ["import_libero", "import_robosuite", "mujoco"]


@contextlib.contextmanager
def _variable(name: str, value: str | None) -> Iterator[None]:
    """Sets a variable of the environment, or removes it (None), for a while."""
    before = os.environ.get(name)
    try:
        _set(name, value)
        yield
    finally:
        _set(name, before)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


with _variable("MUJOCO_GL", "disabled"):
    import mujoco


def import_robosuite() -> Any:
    """The module `robosuite.utils.binding_utils`, which loads OpenGL's library.

    Raises ModuleNotFoundError if robosuite is not installed, ValueError if a variable of the environment says nonsense,
    and whatever a broken OpenGL raises.
    """
    os.environ.update(graphics.variables())
    if "robosuite" not in sys.modules:
        # Settings of robosuite that a user may have written into its directory could change the physics, and its log
        # file has one name for all users of a machine.
        private = ModuleType("robosuite.macros_private")
        private.__dict__.update(CONSOLE_LOGGING_LEVEL=None, FILE_LOGGING_LEVEL=None)
        sys.modules["robosuite.macros_private"] = private
    if "NUMBA_CACHE_DIR" not in os.environ and not libero_files.numba_can_write():
        os.environ["NUMBA_CACHE_DIR"] = str(libero_files.own_directory("numba"))
    logging.getLogger("robosuite_logs").disabled = True
    # robosuite takes CUDA's numbers for those of EGL's devices, which differ, and reads no others than numbers.
    with _variable("CUDA_VISIBLE_DEVICES", None):
        import robosuite.utils.binding_utils as binding_utils
    return binding_utils


def import_libero() -> Any:
    """The module `libero.libero.envs`. Raises ValueError if it or OpenGL's library cannot be loaded."""
    libero_files.prepare_import()
    not_imported = "LIBERO cannot be imported: {}; see docs/libero.md for what to install"
    graphics.variables()
    try:
        import_robosuite()
    except ModuleNotFoundError as error:
        raise ValueError(not_imported.format(error)) from error
    except Exception as error:
        raise ValueError(graphics.no_rendering(error)) from error
    try:
        import libero.libero.envs as envs
    except Exception as error:  # a damaged package may say anything
        said = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ValueError(not_imported.format(untrusted.in_one_line(said))) from error
    return envs
