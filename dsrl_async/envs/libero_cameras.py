"""What LIBERO's two cameras show: kept at the moment at which LIBERO would draw it, drawn when it is needed."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsrl_async.envs import light_graphics
from dsrl_async.envs.graphics import no_rendering
from dsrl_async.envs.simulator import mujoco

CAMERAS = ("agentview", "robot0_eye_in_hand")
CONTEXT_SIZE = {"max_width": 640, "max_height": 480}  # as in robosuite; drawing uses a buffer of its own
MAX_SCENE_GEOMS = 1000  # robosuite's
FAST_MESH_FACES = 600
"""Upper limit on a mesh's faces if `render_quality` is fast."""
FAST_TEXTURE_SIZE = 512
"""Upper limit on the pixels along a texture's longer side if `render_quality` is fast."""


class Cameras:
    """The cameras of a compiled scene. Frames are square with `render_size` pixels; `fast` is `render_quality: fast`.

    OpenGL, which does not survive a fork, is not used before the first frame is drawn.
    """

    def __init__(self, model: mujoco.MjModel, render_size: int, fast: bool) -> None:
        self._model, self._size = model, render_size
        buffer = model.vis.global_
        buffer.offwidth, buffer.offheight = max(render_size, buffer.offwidth), max(render_size, buffer.offheight)
        self._drawn: mujoco.MjModel | None = model  # until the graphics have their own copy of meshes and textures
        if fast:
            model.vis.quality.offsamples = 0
            self._drawn = light_graphics.lighter(model, FAST_MESH_FACES, FAST_TEXTURE_SIZE)
            light_graphics.release_pages(model.tex_data)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[:2] = 0, 1  # hides the shapes for collisions and shows those for the eye
        self._perturbation = mujoco.MjvPerturb()
        self._scenes = [mujoco.MjvScene(model, maxgeom=MAX_SCENE_GEOMS) for _ in CAMERAS]
        for scene in self._scenes:
            scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] &= not fast
        self._frames: list[NDArray[np.uint8]] = []
        self._opengl: Any = None
        self._context: Any = None

    def capture(self, data: mujoco.MjData) -> None:
        """Keeps what the cameras show now, within microseconds."""
        camera = mujoco.MjvCamera()
        camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        for name, scene in zip(CAMERAS, self._scenes, strict=True):
            camera.fixedcamid = self._model.camera(name).id
            mujoco.mjv_updateScene(
                self._model, data, self._options, self._perturbation, camera, mujoco.mjtCatBit.mjCAT_ALL, scene
            )
        self._frames = []

    def frame(self, camera: int) -> NDArray[np.uint8]:
        """The captured frame of camera 0 (agentview) or 1 (wrist), uint8[render_size, render_size, 3].

        Its rows go from bottom to top, as in OpenGL and LIBERO. It is drawn at most once. Raises ValueError if OpenGL
        does not work.
        """
        if not self._frames:
            if self._context is None:
                self._start_opengl()
            self._opengl.make_current()
            viewport = mujoco.MjrRect(0, 0, self._size, self._size)
            for scene in self._scenes:
                frame = np.empty((self._size, self._size, 3), np.uint8)
                mujoco.mjr_render(viewport, scene, self._context)
                mujoco.mjr_readPixels(frame, None, viewport, self._context)
                self._frames.append(frame)
        return self._frames[camera]

    def _start_opengl(self) -> None:
        problem = None
        try:
            from robosuite.utils.binding_utils import GLContext

            opengl = GLContext(**CONTEXT_SIZE)
            opengl.make_current()
            context = mujoco.MjrContext(self._drawn, mujoco.mjtFontScale.mjFONTSCALE_150)
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
            self._opengl, self._context = opengl, context
        except Exception as error:
            # It is raised below, once the remains of the context are gone: they print complaints of their own.
            problem = no_rendering(error)
        if problem is not None:
            raise ValueError(problem)
        assert self._drawn is not None
        light_graphics.release_pages(self._drawn.tex_data)  # the graphics have their own copy
        self._drawn = None
        ctypes.CDLL(None).malloc_trim(0)

    def close(self) -> None:
        """Frees the graphics. Nothing can be drawn afterwards."""
        if self._context is not None:
            self._opengl.make_current()
            self._context.free()
            self._opengl.free()
        self._opengl = self._context = self._drawn = None
        self._scenes, self._frames = [], []
