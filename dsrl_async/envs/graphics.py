"""Which OpenGL LIBERO draws with: what the variables of the environment say, and what to do if it does not work.

Nothing here imports MuJoCo or OpenGL.
"""

from __future__ import annotations

import ctypes
import os

NEEDS = {
    "egl": (("libEGL.so.1",), ("libEGL_nvidia.so.0", "libEGL_mesa.so.0")),
    "osmesa": (("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"),),
}
"""The libraries that a backend needs: one of each group."""
OTHER_WORDS = ("", *("glfw", "enable", "enabled", "on", "true", "1", "disable", "disabled", "off", "false", "0"))
"""What MuJoCo takes in `MUJOCO_GL`, and robosuite replaces by `egl`, since it draws without a window."""


def variables() -> dict[str, str]:
    """`MUJOCO_GL` (`egl`, `osmesa` or `glx`) and `MUJOCO_EGL_DEVICE_ID` as LIBERO is to see them.

    EGL's devices are numbered by `MUJOCO_EGL_DEVICE_ID` alone, from 0. Raises ValueError if a variable of the
    environment says nonsense or contradicts another.
    """
    given = os.environ.get("MUJOCO_GL", "")
    word = given.strip().lower()
    chosen = "egl" if word in OTHER_WORDS else word
    if chosen not in ("egl", "osmesa", "glx"):
        raise ValueError(f"MUJOCO_GL={given} is no way to draw that MuJoCo knows; unset it, or set it to egl or osmesa")
    platform = os.environ.get("PYOPENGL_PLATFORM", "")
    if chosen in NEEDS and platform.lower() not in ("", chosen):
        raise ValueError(f"PYOPENGL_PLATFORM={platform} contradicts MUJOCO_GL={chosen}; unset PYOPENGL_PLATFORM")
    device = os.environ.get("MUJOCO_EGL_DEVICE_ID", "").strip() or "0"
    if not (device.isascii() and device.isdigit()):
        raise ValueError(f"MUJOCO_EGL_DEVICE_ID={device} is not the number of a device, from 0; unset it, or set one")
    return {"MUJOCO_GL": chosen, "MUJOCO_EGL_DEVICE_ID": device}


def no_rendering(error: Exception) -> str:
    """What to tell the user when OpenGL does not work, in one sentence."""
    chosen = variables()["MUJOCO_GL"]
    return (
        f"LIBERO cannot render with MUJOCO_GL={chosen} ({type(error).__name__}: {' '.join(str(error).split())}); "
        f"{remedy(chosen)}"
    )


def remedy(chosen: str) -> str:
    """What to do about a backend that does not work. Nobody is told to install what is there."""
    if chosen == "glx":
        return "it needs a display: set MUJOCO_GL=egl"
    if all(any(_loads(name) for name in group) for group in NEEDS[chosen]):
        return "its libraries are installed: see Graphics in docs/libero.md for what else it needs"
    if chosen == "osmesa":
        return "install libosmesa6, or unset MUJOCO_GL to draw with EGL"
    return (
        "install the GPU's driver with EGL, or without a GPU libegl1, libegl-mesa0 and libgl1-mesa-dri "
        "(or libosmesa6, and set MUJOCO_GL=osmesa)"
    )


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
