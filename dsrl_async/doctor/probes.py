"""What may crash or hang in C code (OpenGL, CUDA); the checks `ask` for it in a process of its own."""

from __future__ import annotations

import os
import statistics
import time
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from dsrl_async.host.probe import cuda_devices

RENDER_SIZE = 256
FRAMES = 5
SCENE = """
<mujoco>
  <visual><global offwidth="{size}" offheight="{size}"/></visual>
  <worldbody>
    <light pos="0 0 3"/>
    <geom type="plane" size="2 2 .1"/>
    <geom type="box" size=".1 .1 .1" pos="0 0 .1"/>
    <camera name="front" pos="0 -1 1" xyaxes="1 0 0 0 .7 .7"/>
    <camera name="side" pos="1 0 1" xyaxes="0 1 0 -.7 0 .7"/>
  </worldbody>
</mujoco>
"""


def egl_devices() -> dict[str, Any]:
    """How many devices EGL can enumerate; `MUJOCO_EGL_DEVICE_ID` numbers them from 0."""
    os.environ["PYOPENGL_PLATFORM"] = "egl"
    import dsrl_async.envs.simulator  # noqa: F401  it loads MuJoCo, of which the next line imports a part

    return {"devices": len(import_module("mujoco.egl.egl_ext").eglQueryDevicesEXT())}


def render() -> dict[str, Any]:
    """Makes the context that LIBERO makes (robosuite's, or MuJoCo's own without it) and draws two cameras in it.

    `seconds` is the median time of the two pictures of a scene of two bodies, read back.
    """
    import numpy as np

    from dsrl_async.envs import graphics
    from dsrl_async.envs.simulator import import_robosuite, mujoco

    if find_spec("robosuite") is not None:
        contexts = import_robosuite()
    else:
        os.environ.update(graphics.variables())
        backend = os.environ["MUJOCO_GL"]
        contexts = import_module("mujoco." + {"glx": "glfw"}.get(backend, backend))
    context = contexts.GLContext(max_width=RENDER_SIZE, max_height=RENDER_SIZE)
    context.make_current()
    from OpenGL import GL  # type: ignore[import-untyped]

    model = mujoco.MjModel.from_xml_string(SCENE.format(size=RENDER_SIZE))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    scene, graphics = mujoco.MjvScene(model, 100), mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
    mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, graphics)
    camera, options = mujoco.MjvCamera(), mujoco.MjvOption()
    camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
    viewport, pixels = mujoco.MjrRect(0, 0, RENDER_SIZE, RENDER_SIZE), np.zeros((RENDER_SIZE, RENDER_SIZE, 3), np.uint8)
    times = []
    for _ in range(FRAMES):
        begin = time.perf_counter()
        for camera.fixedcamid in range(model.ncam):
            mujoco.mjv_updateScene(model, data, options, None, camera, mujoco.mjtCatBit.mjCAT_ALL, scene)
            mujoco.mjr_render(viewport, scene, graphics)
            mujoco.mjr_readPixels(pixels, None, viewport, graphics)
        times.append(time.perf_counter() - begin)
    if pixels.max() == pixels.min():
        raise RuntimeError("the pictures are empty")
    return {
        "renderer": GL.glGetString(GL.GL_RENDERER).decode(),
        "version": GL.glGetString(GL.GL_VERSION).decode(),
        "seconds": statistics.median(times),
    }


def cuda() -> dict[str, Any]:
    """What torch finds (see `probe.cuda_devices`), its first device, and how observations would get there (`Uploads`),
    with the reason if not the best way."""
    import torch

    found = {"torch": torch.__version__, "built_for": torch.version.cuda, **cuda_devices()}
    if found["devices"] and not found["faults"][0]:
        found["device"] = torch.cuda.get_device_name(0)
        found |= _uploads()
    return found


def _uploads() -> dict[str, Any]:
    import torch

    from dsrl_async.run.inference.copies import SLOTS, prepare_uploads
    from dsrl_async.shm.arena import Arena

    memory = Arena.create({SLOTS + "state": ((1, 8), "float32")})
    way = prepare_uploads(memory, torch.device("cuda", 0))
    return {"uploads": int(way.uploads), "uploads_reason": way.reason}
