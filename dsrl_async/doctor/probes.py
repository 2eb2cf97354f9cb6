"""What may crash or hang in C code (OpenGL, CUDA), asked in a process of its own with a time limit.

`ask` starts this module, which prints its answer as one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from typing import Any

from dsrl_async.host import processes

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


class Unanswered(Exception):
    """Why a probe gave no answer: a phrase, such as `killed by SIGSEGV`."""


def ask(probe: str, time_limit_s: float, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """The answer of a function of this module, run with the variables of `environment`; raises Unanswered.

    The process ends with this call, however that ends, or with its parent.
    """
    job = json.dumps({"probe": probe, "parent": os.getpid()})
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "dsrl_async.doctor.probes", job],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=dict(os.environ) if environment is None else environment,
        )
        try:
            code = process.wait(time_limit_s)
        except subprocess.TimeoutExpired:
            raise Unanswered(f"no answer within {time_limit_s:g} s") from None
        finally:
            processes.kill_all([process])
        output.seek(0)
        errors.seek(0)
        lines, complaints = (file.read().decode(errors="replace").split("\n") for file in (output, errors))
    if code:
        said = next((line.strip() for line in reversed(complaints) if line.strip()), "without a message")
        raise Unanswered(f"{processes.how_ended(code)}{'' if code < 0 else f': {said}'}")
    answer: dict[str, Any] = json.loads(next(line for line in reversed(lines) if line))
    if "error" in answer:
        raise Unanswered(answer["error"])
    return answer


def egl_devices() -> dict[str, Any]:
    """How many devices EGL can enumerate; `MUJOCO_EGL_DEVICE_ID` numbers them from 0."""
    os.environ["PYOPENGL_PLATFORM"] = "egl"
    from mujoco.egl import egl_ext

    return {"devices": len(egl_ext.eglQueryDevicesEXT())}


def render() -> dict[str, Any]:
    """Makes the context that LIBERO makes (robosuite's, or MuJoCo's own without it) and draws two cameras in it.

    `seconds` is the median time of the two pictures of a scene of two bodies, read back.
    """
    import mujoco
    import numpy as np

    if find_spec("robosuite") is not None:
        from robosuite.utils.binding_utils import GLContext
    else:
        from mujoco import GLContext
    context = GLContext(max_width=RENDER_SIZE, max_height=RENDER_SIZE)
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
    """What torch finds, and whether cupy, which page-locks the shared memory, is there."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "built_for": torch.version.cuda}
    found["available"] = torch.cuda.is_available()
    if found["available"]:
        free, total = torch.cuda.mem_get_info()
        found |= {"device": torch.cuda.get_device_name(), "free_bytes": free, "total_bytes": total}
        found["cupy"] = find_spec("cupy") is not None
    return found


def main(argument: str) -> None:
    job = json.loads(argument)
    processes.prepare_child(job["parent"])
    try:
        answer = {"egl_devices": egl_devices, "render": render, "cuda": cuda}[job["probe"]]()
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    print(json.dumps(answer), flush=True)
    os._exit(0)  # what is left of a broken OpenGL context complains, or crashes, when Python takes it apart


if __name__ == "__main__":
    main(sys.argv[1])
