"""The embedded environment: a gripper puts a block on the red one of three plates.

MuJoCo simulates the physics. Images are ray-cast with MuJoCo's own ray routines and need no OpenGL. The gripper slides
along three axes and never rotates, so each camera's rays have constant directions in the world and are computed once.
The table top is a texture (wood grain and the episode's plates), looked up where a ray meets the plane z = 0; only the
block and the gripper are intersected with rays, and they cast a shadow.

All lengths are in metres; z points up, x towards the front camera, and z = 0 is the table top.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsrl_async.envs.images import write_agent_image
from dsrl_async.envs.protocol import ChunkOutcome, check_chunk
from dsrl_async.envs.simulator import mujoco
from dsrl_async.envs.tabletop_spec import TABLETOP

LAYOUTS = ("fixed", "swap2", "shuffle")
COLOURS = ("red", "yellow", "blue")
PLATE_LOCATIONS = np.array([[0.05, 0.155], [0.05, -0.155], [-0.16, 0.0]])
"""Centres of the plates before jitter: left of the table's centre, right of it and behind it."""
PLATE_RADIUS = 0.05
PLATE_JITTER = 0.01
BLOCK_SPREAD = 0.045
"""The block starts within this distance of the centre along x and y."""
ACTION_SCALE = 0.03
"""Distance in metres that the gripper moves in one environment step at a translation component of 1."""
FINGER_OPEN = 0.034
"""Joint position of a finger of the open gripper; 0 is closed, 0.02 holds the block."""
LANDING_RADIUS = 0.055
"""The block is on a plate when their centres are closer than this."""
RAISED_HEIGHT = 0.10
"""The gripper is raised when its grasp point is higher than this."""

_SUBSTEPS = 20
_WORKSPACE_LOW = np.array([-0.24, -0.24, 0.018])
_WORKSPACE_HIGH = np.array([0.20, 0.24, 0.22])
_START = np.array([0.0, 0.0, 0.14])
_START_JITTER = 0.02
_LIGHT = np.array([0.35, 0.35, 1.3], np.float32)

_MJCF = """
<mujoco model="tabletop">
  <compiler angle="radian"/>
  <option timestep="0.005" integrator="implicitfast" cone="elliptic" impratio="5"/>
  <default>
    <geom group="1" friction="1.2 0.02 0.0005" condim="4"/>
    <default class="slide"><joint type="slide" damping="1"/></default>
    <default class="finger">
      <joint type="slide" range="-0.002 0.036" limited="true" damping="1"/>
      <geom type="box" mass="0.05" rgba="0.82 0.83 0.86 1"/>
    </default>
    <default class="hand"><geom type="box" contype="0" conaffinity="0"/></default>
  </default>
  <worldbody>
    <geom name="table" type="plane" size="1 1 0.1" group="0"/>
    <camera name="front" pos="0.50 0 0.58" xyaxes="0 1 0 -0.675 0 0.738" fovy="37"/>
    <body name="block" pos="0 0 0.025">
      <freejoint/>
      <geom name="block" type="box" size="0.02 0.02 0.025" mass="0.05" rgba="0.20 0.66 0.36 1"/>
    </body>
    <body name="hand" gravcomp="1">
      <joint name="x" class="slide" axis="1 0 0"/>
      <joint name="y" class="slide" axis="0 1 0"/>
      <joint name="z" class="slide" axis="0 0 1"/>
      <geom class="hand" size="0.017 0.056 0.012" pos="0 0 0.068" mass="0.3" rgba="0.25 0.27 0.32 1"/>
      <geom class="hand" size="0.013 0.013 0.06" pos="0 0 0.14" mass="0.1" rgba="0.93 0.93 0.94 1"/>
      <camera name="wrist" pos="0.08 0 0.075" xyaxes="0 1 0 -0.84 0 0.54" fovy="76"/>
      <body name="left" gravcomp="1">
        <joint name="left" class="finger" axis="0 1 0"/>
        <geom class="finger" size="0.009 0.006 0.036" pos="0 0.006 0.021"/>
      </body>
      <body name="right" gravcomp="1">
        <joint name="right" class="finger" axis="0 -1 0"/>
        <geom class="finger" size="0.009 0.006 0.036" pos="0 -0.006 0.021"/>
      </body>
    </body>
  </worldbody>
  <actuator>
    <position joint="x" kp="2000" kv="64"/>
    <position joint="y" kp="2000" kv="64"/>
    <position joint="z" kp="2000" kv="64"/>
    <position joint="left" kp="300" kv="7"/>
    <position joint="right" kp="300" kv="7"/>
  </actuator>
</mujoco>
"""

_OBJECT_GROUPS = np.array([0, 1, 0, 0, 0, 0], dtype=np.uint8)
"""Rays are intersected only with geoms of group 1, block and gripper; the table is a texture."""
# In newer MuJoCo releases rays also return normals, through an argument without a default.
_NO_NORMALS = {"normal": None} if "normal:" in mujoco.mj_multiRay.__doc__ else {}

_PLATE_RGB = {"red": (214, 48, 42), "yellow": (240, 190, 40), "blue": (48, 98, 206)}
_TEXTURE_HALF_WIDTH = 0.6
_TEXTURE_SIZE = 600
_TEXELS_PER_METRE = _TEXTURE_SIZE / (2 * _TEXTURE_HALF_WIDTH)
_SHADOW = 0.62
_UNIT = np.ones(1, np.float32)


@cache
def _table_texture() -> NDArray[np.uint8]:
    """The wooden boards and the dark floor around them, uint8[_TEXTURE_SIZE, _TEXTURE_SIZE, 3] over (x, y)."""
    centres = (np.arange(_TEXTURE_SIZE) + 0.5) / _TEXELS_PER_METRE - _TEXTURE_HALF_WIDTH
    x, y = np.meshgrid(centres, centres, indexing="ij")
    random = np.random.default_rng(0)
    board = np.floor((y + _TEXTURE_HALF_WIDTH) / 0.12).astype(int)
    tone = random.uniform(-0.035, 0.035, board.max() + 1)[board]
    phase = random.uniform(0, 2 * np.pi, board.max() + 1)[board]
    grain = 0.022 * np.sin(90 * y + 7 * np.sin(4 * x + phase) + phase) + 0.012 * np.sin(340 * y + 5 * x)
    seam = np.abs((y + _TEXTURE_HALF_WIDTH) % 0.12 - 0.06) > 0.0585
    brightness = 1 + tone + grain - 0.05 * seam
    wood = brightness[..., None] * np.array([205.0, 175.0, 138.0])
    on_table = (np.abs(x + 0.03) < 0.36) & (np.abs(y) < 0.40)
    texture = np.where(on_table[..., None], wood, np.array([62.0, 66.0, 74.0]))
    texture = np.clip(texture, 0, 255).astype(np.uint8)
    texture.flags.writeable = False
    return texture


def _paint_plate(texture: NDArray[np.uint8], centre: NDArray[np.float64], rgb: tuple[int, int, int]) -> None:
    """Draws a plate with a bright rim and a soft contact shadow into `texture`."""
    reach = PLATE_RADIUS + 0.008
    low = np.floor((centre - reach + _TEXTURE_HALF_WIDTH) * _TEXELS_PER_METRE).astype(int)
    high = np.ceil((centre + reach + _TEXTURE_HALF_WIDTH) * _TEXELS_PER_METRE).astype(int)
    patch = texture[low[0] : high[0], low[1] : high[1]]
    x, y = (
        (np.arange(low[i], high[i], dtype=np.float32) + 0.5) / _TEXELS_PER_METRE - _TEXTURE_HALF_WIDTH - centre[i]
        for i in range(2)
    )
    radius = np.hypot(x[:, None], y[None, :])
    pixel = 1 / _TEXELS_PER_METRE
    coverage = np.clip((PLATE_RADIUS - radius) / pixel + 0.5, 0, 1)[..., None]
    rim = np.clip(1 - np.abs(radius - 0.87 * PLATE_RADIUS) / 0.0035, 0, 1)[..., None]
    shade = np.clip((reach - radius) / (reach - PLATE_RADIUS), 0, 1)[..., None]
    plate = np.array(rgb, np.float32) * (1 - 0.12 * rim) + 255 * 0.30 * rim
    ground = patch * (1 - 0.35 * shade)
    patch[:] = np.clip(ground + coverage * (plate - ground), 0, 255)


class _Rays(NamedTuple):
    """The rays of one camera at one resolution. Their directions are constant because no camera rotates."""

    directions: NDArray[np.float32]
    """float32[3, N], unit vectors in the world."""
    ground_offset: NDArray[np.float32]
    """float32[2, N], (x, y) from the camera to the point where a ray meets the table, per metre of camera height."""


class _Ground(NamedTuple):
    """The points where a camera's rays meet the plane of the table."""

    texel: NDArray[np.int32]
    """int32[N], flat index into the texture."""
    from_light: NDArray[np.float32]
    """float32[3, N], vectors from the light to the points."""
    light_distance: NDArray[np.float32]
    """float32[N], lengths of `from_light`."""


def _camera_rays(rotation: NDArray[np.float64], fovy: float, size: int) -> _Rays:
    """Rays through the pixel centres of a square image. `rotation` maps camera to world; `fovy` is in degrees."""
    grid = ((np.arange(size) + 0.5) / size * 2 - 1) * np.tan(np.radians(fovy) / 2)
    right, down = np.meshgrid(grid, grid)
    directions = rotation @ np.stack([right, -down, -np.ones_like(right)]).reshape(3, -1)
    directions /= np.linalg.norm(directions, axis=0)
    assert directions[2].max() < -1e-3, "every ray must meet the table plane"
    return _Rays(directions.astype(np.float32), (-directions[:2] / directions[2]).astype(np.float32))


def _ground_of(rays: _Rays, origin: NDArray[np.float32]) -> _Ground:
    """The points where `rays` from `origin` (float32[3]) meet the table."""
    ground = rays.ground_offset * origin[2] + origin[:2, None]
    texel = ((ground + np.float32(_TEXTURE_HALF_WIDTH)) * np.float32(_TEXELS_PER_METRE)).astype(np.int32)
    np.clip(texel, 0, _TEXTURE_SIZE - 1, out=texel)
    from_light = np.empty((3, ground.shape[1]), np.float32)
    from_light[:2] = ground - _LIGHT[:2, None]
    from_light[2] = -_LIGHT[2]
    distance = np.sqrt(np.einsum("ij,ij->j", from_light, from_light))
    return _Ground(texel[0] * np.int32(_TEXTURE_SIZE) + texel[1], from_light, distance)


class TabletopEnvironment:
    """One simulated table; see `dsrl_async.envs.Environment` for the protocol.

    `layout` says where the red plate may lie: at location 0 ("fixed"); at location 0 or 1, with the yellow plate at the
    other, so that only the image tells ("swap2"); or anywhere, with the colours in any order ("shuffle"). An episode is
    truncated after `max_episode_steps` environment steps.

    An action is float32[7]: the translation of the grasp point in units of ACTION_SCALE (clipped to [-1, 1]), three
    unused rotation components, and the gripper command (> 0 closes). The state is float32[8]: the grasp point (m),
    three zeros and the two finger positions (m).

    Raises ValueError if the layout is unknown or the step limit is not positive.
    """

    def __init__(self, layout: str = "swap2", max_episode_steps: int = 50, agent_cameras: Sequence[int] = (0,)) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"unknown tabletop layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
        if max_episode_steps < 1:
            raise ValueError(f"max_episode_steps must be at least 1, not {max_episode_steps}")
        self.spec = TABLETOP
        self._agent_cameras = list(agent_cameras)
        self.layout = layout
        self.max_episode_steps = max_episode_steps
        self.plate_positions = PLATE_LOCATIONS.copy()
        """float64[3, 2], centre of the plate at each location in this episode."""
        self.plate_colours: tuple[str, ...] = COLOURS
        """Colour of the plate at each location in this episode."""
        self._model = mujoco.MjModel.from_xml_string(_MJCF)
        self._data = mujoco.MjData(self._model)
        self._hand = slice(*self._qpos_range("x", "z"))
        self._fingers = slice(*self._qpos_range("left", "right"))
        self._objects = np.flatnonzero(self._model.geom_group == 1)
        self._object_radii = self._model.geom_rbound[self._objects]
        self._geom_rgb = (self._model.geom_rgba[:, :3] * 255).astype(np.float32)
        self._geom_size = self._model.geom_size.astype(np.float32)
        self._texture = _table_texture().copy()
        self._cameras = (self._model.camera("front").id, self._model.camera("wrist").id)
        self._rays: dict[tuple[int, int], tuple[_Rays, _Ground]] = {}
        self._steps = 0
        self._ended = True

    def _qpos_range(self, first: str, last: str) -> tuple[int, int]:
        return self._model.joint(first).qposadr[0], self._model.joint(last).qposadr[0] + 1

    # The episode

    def reset(self, seed: int, number: int = 0) -> int:
        """Starts the episode that `seed` (>= 0) alone determines. Returns its task_index, 0."""
        random = np.random.default_rng(seed)
        if self.layout == "fixed":
            self.plate_colours = COLOURS
        elif self.layout == "swap2":
            self.plate_colours = COLOURS if random.random() < 0.5 else ("yellow", "red", "blue")
        else:
            self.plate_colours = tuple(COLOURS[i] for i in random.permutation(3))
        self.plate_positions = PLATE_LOCATIONS + random.uniform(-PLATE_JITTER, PLATE_JITTER, (3, 2))
        self._texture[:] = _table_texture()
        for colour, position in zip(self.plate_colours, self.plate_positions, strict=True):
            _paint_plate(self._texture, position, _PLATE_RGB[colour])

        mujoco.mj_resetData(self._model, self._data)
        self._data.qpos[:2] = random.uniform(-BLOCK_SPREAD, BLOCK_SPREAD, 2)
        self._data.qpos[self._hand] = _START + random.uniform(-_START_JITTER, _START_JITTER, 3)
        self._data.qpos[self._fingers] = FINGER_OPEN
        mujoco.mj_forward(self._model, self._data)
        self._steps = 0
        self._ended = False
        return 0

    def step(self, action: NDArray[np.float32]) -> None:
        """Applies one action for 0.1 s, even after the end of the episode."""
        hand = self._data.qpos[self._hand]
        target = hand + np.clip(action[:3], -1, 1) * ACTION_SCALE
        self._data.ctrl[:3] = np.clip(target, _WORKSPACE_LOW, _WORKSPACE_HIGH)
        self._data.ctrl[3:] = 0.0 if action[6] > 0 else FINGER_OPEN
        mujoco.mj_step(self._model, self._data, nstep=_SUBSTEPS)
        self._steps += 1

    def step_chunk(self, action_chunk: NDArray[np.float32]) -> ChunkOutcome:
        """Executes the actions float32[k, 7] (k >= 1) until the episode ends.

        Raises ValueError if the chunk's shape is wrong, an action is not finite or the episode has ended.
        """
        check_chunk(action_chunk, self.spec.action_dim)
        if self._ended:
            raise ValueError("the episode has ended; call reset before step_chunk")
        for index, action in enumerate(action_chunk):
            self.step(action)
            success = self.success()
            truncated = not success and self._steps >= self.max_episode_steps
            if success or truncated:
                self._ended = True
                return ChunkOutcome(index + 1, index if success else -1, success, truncated)
        return ChunkOutcome(len(action_chunk), -1, False, False)

    # The simulator's state; the policy sees only what `observe` writes

    @property
    def gripper_position(self) -> NDArray[np.float64]:
        """float64[3], the point between the finger tips."""
        return self._data.qpos[self._hand].copy()

    @property
    def finger_positions(self) -> NDArray[np.float64]:
        """float64[2]; 0 is closed, 0.02 holds the block, FINGER_OPEN is open."""
        return self._data.qpos[self._fingers].copy()

    @property
    def block_position(self) -> NDArray[np.float64]:
        """float64[3], the block's centre."""
        return self._data.qpos[:3].copy()

    @property
    def red_plate(self) -> int:
        """The location of the red plate."""
        return self.plate_colours.index("red")

    def landed_on(self, plate: int) -> bool:
        """Whether the block rests, released, on the plate at location `plate` and the gripper is raised."""
        data = self._data
        distance = np.hypot(*(data.qpos[:2] - self.plate_positions[plate]))
        resting = data.qpos[2] < 0.03 and np.abs(data.qvel[:3]).max() < 0.05
        released = data.qpos[self._fingers].min() > 0.026
        return bool(distance < LANDING_RADIUS and resting and released and data.qpos[self._hand][2] > RAISED_HEIGHT)

    def success(self) -> bool:
        """Whether the block has landed on the red plate."""
        return self.landed_on(self.red_plate)

    # Images

    def observe(self, images: NDArray[np.uint8], sac_image: NDArray[np.uint8], state: NDArray[np.float32]) -> None:
        """Writes images uint8[2, 64, 64, 3] (front, wrist), sac_image uint8[64, 64, 3 * n] (the agent's cameras) and
        state float32[8].

        The arrays must be C-contiguous.
        """
        self._update_poses()
        for camera, image in enumerate(images):
            self._cast(camera, image)
        write_agent_image(sac_image, images[self._agent_cameras])
        state[:3] = self._data.qpos[self._hand]
        state[3:6] = 0
        state[6:] = self._data.qpos[self._fingers]

    def render(self, size: int = 256, camera: int = 0) -> NDArray[np.uint8]:
        """An antialiased image for people, uint8[size, size, 3], from camera 0 (front) or 1 (wrist)."""
        self._update_poses()
        image = np.empty((2 * size, 2 * size, 3), np.uint8)
        self._cast(camera, image)
        return image.reshape(size, 2, size, 2, 3).mean(axis=(1, 3)).astype(np.uint8)

    def close(self) -> None:
        """Frees the simulation. The environment cannot be used afterwards."""
        del self._data, self._model

    def _update_poses(self) -> None:
        """Moves geoms and cameras to the present joint positions, since mj_step leaves them a substep behind."""
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)

    def _intersect(
        self,
        origin: NDArray[np.float32],
        vectors: NDArray[np.float32],
        lengths: NDArray[np.float32],
    ) -> tuple[NDArray[np.intp], NDArray[np.int32], NDArray[np.float32]]:
        """The M rays that meet the block or the gripper, and where.

        The rays start at `origin` float32[3] along `vectors` float32[3, N] of `lengths` float32[N], or [1] if all are
        the same. Returns the rays' indices int[M], the id of the first geom that each meets int32[M], and the points
        float32[M, 3].
        """
        centres = self._data.geom_xpos[self._objects] - origin
        distances = np.sqrt((centres * centres).sum(axis=1))
        # MuJoCo tests each ray against each geom. Keeping only rays that come near a geom's bounding sphere halves the
        # time of a frame.
        sine = np.minimum(self._object_radii / distances, 1)
        cosine = np.where(sine < 1, np.sqrt(1 - sine**2) - 1e-4, -2).astype(np.float32)
        along = (centres / distances[:, None]).astype(np.float32) @ vectors
        near = np.flatnonzero((along >= np.multiply.outer(cosine, lengths)).any(axis=0))
        rays = vectors[:, near].T.astype(np.float64)
        geom = np.full(len(near), -1, np.int32)
        distance = np.empty(len(near))
        if len(near):
            mujoco.mj_multiRay(
                m=self._model,
                d=self._data,
                pnt=origin,
                vec=rays.reshape(-1),
                geomgroup=_OBJECT_GROUPS,
                flg_static=False,
                bodyexclude=-1,
                geomid=geom,
                dist=distance,
                nray=len(near),
                cutoff=mujoco.mjMAXVAL,
                **_NO_NORMALS,
            )
        hit = np.flatnonzero(geom >= 0)
        points = origin + rays[hit] * distance[hit, None]
        return near[hit], geom[hit], points.astype(np.float32)

    def _cast(self, camera: int, image: NDArray[np.uint8]) -> None:
        """Renders camera 0 (front) or 1 (wrist) into a C-contiguous uint8[size, size, 3]."""
        size = len(image)
        camera_id = self._cameras[camera]
        origin = self._data.cam_xpos[camera_id].astype(np.float32)
        if (camera, size) not in self._rays:
            rotation = self._data.cam_xmat[camera_id].reshape(3, 3)
            rays = _camera_rays(rotation, self._model.cam_fovy[camera_id], size)
            self._rays[camera, size] = rays, _ground_of(rays, origin)
        rays, ground = self._rays[camera, size]
        if camera != 0:  # the front camera does not move
            ground = _ground_of(rays, origin)
        pixels = image.reshape(-1, 3)
        np.take(self._texture.reshape(-1, 3), ground.texel, axis=0, out=pixels, mode="clip")
        shadowed, _, _ = self._intersect(_LIGHT, ground.from_light, ground.light_distance)
        pixels[shadowed] = pixels[shadowed] * np.float32(_SHADOW)
        hit, geom, points = self._intersect(origin, rays.directions, _UNIT)
        pixels[hit] = self._shade(geom, points)

    def _shade(self, geom: NDArray[np.int32], points: NDArray[np.float32]) -> NDArray[np.float32]:
        """Colours float32[N, 3] of surface points float32[N, 3] on box geoms int32[N].

        They follow Lambert's law under an overhead light, a little brighter on the front camera's side and darker near
        the table.
        """
        rotation = self._data.geom_xmat.reshape(-1, 3, 3).astype(np.float32)[geom]
        local = np.einsum("nij,ni->nj", rotation, points - self._data.geom_xpos.astype(np.float32)[geom])
        relative = local / self._geom_size[geom]
        row = np.arange(len(geom))
        axis = np.abs(relative).argmax(axis=1)
        normal = rotation[row, :, axis] * np.sign(relative[row, axis])[:, None]
        towards_light = _LIGHT / np.linalg.norm(_LIGHT)
        light = 0.55 + 0.5 * np.maximum(normal @ towards_light, 0) + 0.08 * normal[:, 0]
        light *= 0.8 + 0.2 * np.clip(points[:, 2] / 0.05, 0, 1)
        return np.clip(self._geom_rgb[geom] * light[:, None], 0, 255)
