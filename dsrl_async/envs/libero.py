"""LIBERO behind the chunk-at-a-time protocol: the published physics and images bit for bit, several times as fast.

LIBERO (on robosuite 1.4) does the following at every step or reset. This module does not, and no number or pixel
changes:

* It renders all cameras at every step. Here MuJoCo's abstract scenes keep what the cameras would show, within
  microseconds, and `observe` draws them. The moment is robosuite's own: an observable of ours is sampled in the same
  one of a step's 25 substeps as robosuite's cameras, shortly before the end of the step.
* It computes each of the 25 substeps three times: in its own forward pass, in the controller, and in `mj_step`. Here
  a substep is computed once: MuJoCo's `mj_step1`, then the controller, which needs only positions and velocities, then
  `mj_step2`.
* A reset compiles the scene anew and renders eight times. Here the compiled scene stays, and what an episode changes
  in it is restored: the places of the furniture, what is visible, and the gripper's last command. One quirk is kept:
  every reset in LIBERO adds the samplers that open and close drawers, doors and knobs once more, and so draws more
  random numbers than the one before.
* It computes observables that no policy sees.

LIBERO's own `reset` is not used: it repeats for ever when an exception is raised in it, such as by broken rendering.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsrl_async.envs import libero_files
from dsrl_async.envs.images import resize_with_pad, write_agent_image
from dsrl_async.envs.libero_cameras import Cameras
from dsrl_async.envs.libero_presets import PRESETS
from dsrl_async.envs.protocol import ChunkOutcome, EnvironmentRecord, check_chunk
from dsrl_async.envs.simulator import import_libero, mujoco

logger = logging.getLogger(__name__)

IDLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""The action while objects settle: stay, with the gripper open."""
CHANGED_BY_EPISODES = ("body_pos", "body_quat", "site_rgba")
"""The fields of a compiled scene that LIBERO changes."""
RESET_TRIALS = 100  # in each, robosuite makes 5000 attempts to place the objects


class Scene(NamedTuple):
    """Where an episode starts."""

    task: int
    """Number of the task in its suite."""
    init_state: int
    """Number of the task's published initial state."""
    seed: int
    """Seed of numpy's global generator before the reset, which places the fixtures: the initial state does not."""
    resets: int
    """Number of resets of a new scene after the seed; the last one counts."""


def axis_angle(quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation vector float64[3], in radians, of a unit quaternion (x, y, z, w), with an angle from 0 to 2 pi.

    It equals robosuite's `quat2axisangle`, on which LIBERO's policies are trained, to the last bit.
    """
    w = min(1.0, max(-1.0, float(quaternion[3])))
    sine = math.sqrt(1.0 - w * w)
    vector: NDArray[np.float64] = quaternion[:3] * 2.0 * math.acos(w) / sine if sine else np.zeros(3)
    return vector


class LiberoEnvironment:
    """One LIBERO suite; see `dsrl_async.envs.Environment` for the protocol, `EnvConfig` for the settings.

    An action is float32[7]: translation (3) and rotation (3) of the hand, clipped to [-1, 1], and the gripper command,
    -1 to open and 1 to close. The state is float32[8]: hand position (m), hand orientation (`axis_angle`) and the two
    finger positions (m). Only one task's scene is in memory at a time; drawing another task compiles its scene. A
    single task's scene is compiled at once, so that a process which then forks has done it for all workers: OpenGL,
    which does not survive a fork, is not used before the first image.

    Raises ValueError if LIBERO is not usable or a setting does not fit it.
    """

    def __init__(self, record: EnvironmentRecord, agent_cameras: Sequence[int] = (0,)) -> None:
        self.spec, config = record.spec(), record.settings
        self._agent_cameras = agent_cameras
        self.suite: str = config["name"]
        self.tasks = libero_files.selected_tasks(self.suite, config["task_ids"])
        self.max_episode_steps: int = config["max_episode_steps"]
        self.settling_steps: int = config["settling_steps"]
        self.seeding: str = config["seeding"]
        self.fixtures_seed = PRESETS[config["preset"]].seed
        """Seed for the fixtures' places, unless `seeding` is by episode."""
        self._order, self._rotate = config["scene_order"], config["rotate_images"]
        self._render_size: int = config["render_size"]
        self._antialias: bool = config["antialias"]
        self._fast = config["render_quality"] == "fast"
        self._init_states = {task: libero_files.init_states(self.suite, task) for task in self.tasks}
        chosen = config["init_states"]
        self._init_state_ids = {
            task: libero_files.selected_init_states(self.suite, task, chosen) for task in self.tasks
        }
        self._numbered: list[tuple[int, int]] = []
        self._domains = import_libero()
        self._task: int | None = None
        self.domain: Any = None
        """LIBERO's environment of the present task (`BDDLBaseDomain`), for the scripted expert and the recorder."""
        self._property_samplers: list[Any] = []
        self._compiled: dict[str, NDArray[Any]] = {}
        self._cameras: Cameras | None = None
        self._steps = 0
        self._ended = True
        logger.info("LIBERO with %s", ", ".join(f"{name} {number}" for name, number in record.versions().items()))
        if self._fast:
            logger.warning("env.render_quality is fast: pictures differ from those of published checkpoints")
        if len(self.tasks) == 1:
            self._load(self.tasks[0])

    # The episode

    def number_scenes(self) -> None:
        """From now on an episode's number counts through the whole suite, as in an evaluation, and is the scene's.

        Whoever chooses the numbers keeps to this environment's tasks.
        """
        states = [
            len(libero_files.init_states(self.suite, task)) for task in range(len(libero_files.task_names(self.suite)))
        ]
        self._numbered = [(task, state) for task, count in enumerate(states) for state in range(count)]

    def scene(self, seed: int, number: int) -> Scene:
        """Where episode `number` starts. `cycled` goes through all initial states of a task, then the next task's."""
        random = np.random.default_rng(seed)
        if self._numbered:
            task, state = self._numbered[number % len(self._numbered)]
            return self._with_fixtures(task, state, random)
        pairs = [(task, state) for task in self.tasks for state in self._init_state_ids[task]]
        task, state = pairs[int(random.integers(len(pairs))) if self._order == "sampled" else number % len(pairs)]
        return self._with_fixtures(task, state, random)

    def _with_fixtures(self, task: int, state: int, random: np.random.Generator) -> Scene:
        if self.seeding == "episode":
            return Scene(task, state, int(random.integers(2**32)), 1)
        return Scene(task, state, self.fixtures_seed, state + 1 if self.seeding == "task" else 1)

    def reset(self, seed: int, number: int = 0) -> int:
        """Starts the episode that `seed` and `number` determine. Returns its task_index.

        Raises ValueError if the scene cannot be set up.
        """
        scene = self.scene(seed, number)
        if scene.task != self._task:
            self._load(scene.task)
        domain = self.domain
        np.random.seed(scene.seed)  # noqa: NPY002  robosuite draws from the global generator
        for count in range(1, scene.resets + 1):
            self._reset_scene(count)
        self._start_from(self._init_states[scene.task][scene.init_state])
        for _ in range(self.settling_steps):
            self.step(np.array(IDLE_ACTION))
        assert domain.timestep == self.settling_steps
        self._steps = 0
        self._ended = False
        return self.tasks.index(scene.task)

    def _load(self, task: int) -> None:
        """Compiles a task's scene."""
        self.close()
        try:
            with self._noting_compiled():
                wrapper = self._domains.env_wrapper.ControlEnv(
                    bddl_file_name=str(libero_files.bddl_file(self.suite, task)),
                    has_offscreen_renderer=False,  # `Cameras` draws
                    use_camera_obs=False,
                    hard_reset=False,
                )
        except Exception as error:
            raise ValueError(
                f"task {task} of {self.suite} cannot be set up: {type(error).__name__}: {error}"
            ) from error
        self.domain = wrapper.env
        self._property_samplers = list(self.domain.object_property_initializers)
        model = self._model
        width, of_states = 1 + model.nq + model.nv, self._init_states[task].shape[1]
        if of_states != width:
            file = libero_files.init_states_file(self.suite, task)
            raise ValueError(
                f"{file} holds init states of {of_states} numbers, and the scene of task {task} has {width}; "
                "they belong to other BDDL files or assets"
            )
        assert model.opt.integrator != mujoco.mjtIntegrator.mjINT_RK4, "mj_step1 and mj_step2 cannot do Runge-Kutta"
        self._cameras = Cameras(model, self._render_size, self._fast)
        self._add_observable(self._cameras)
        # A first reset and step make numba compile or load robosuite's functions. Later ones do not depend on them.
        self._reset_scene(1)
        self.step(np.array(IDLE_ACTION))
        self._task = task
        mujoco.mj_clearCache(mujoco.mj_getCache())  # the compiler's files are not needed again
        ctypes.CDLL(None).malloc_trim(0)

    @contextlib.contextmanager
    def _noting_compiled(self) -> Iterator[None]:
        """Keeps the fields that episodes change, as they were when a scene was compiled inside this context.

        LIBERO's constructor changes them too, and compiling a second time takes a tenth of a worker's start.
        """
        from robosuite.utils.binding_utils import MjSim

        stock = vars(MjSim)["from_xml_string"]

        def compile_scene(xml: str) -> Any:
            simulation = stock.__get__(None, MjSim)(xml)
            model = simulation.model._model
            self._compiled = {name: getattr(model, name).copy() for name in CHANGED_BY_EPISODES}
            return simulation

        MjSim.from_xml_string = compile_scene
        try:
            yield
        finally:
            MjSim.from_xml_string = stock

    @property
    def _model(self) -> Any:
        return self.domain.sim.model._model

    @property
    def data(self) -> Any:
        """MuJoCo's `MjData` of the present task."""
        return self.domain.sim.data._data

    def _add_observable(self, cameras: Cameras) -> None:
        """Replaces robosuite's observables with one that keeps what `observe` needs."""
        from robosuite.utils.observables import Observable, sensor

        domain = self.domain
        needed = [domain._observables[f"robot0_{name}"]._sensor for name in ("eef_pos", "eef_quat", "gripper_qpos")]
        for name in domain.observation_names:
            domain.modify_observable(name, "enabled", False)

        @sensor(modality="proprio")
        def moment(cache: dict[str, Any]) -> NDArray[np.float64]:
            cameras.capture(self.data)
            position, orientation, fingers = (read(cache) for read in needed)
            return np.concatenate((position, axis_angle(orientation), fingers))

        domain.add_observable(Observable("moment", moment, sampling_rate=domain.control_freq))

    def _reset_scene(self, count: int) -> None:
        """Does what LIBERO's reset number `count` (from 1) of a scene does, without compiling it.

        It tries again, at most RESET_TRIALS times, if robosuite finds no place for the objects.
        """
        from robosuite.utils.errors import RandomizationError

        domain = self.domain
        domain.object_property_initializers = self._property_samplers * (count + 1)
        for _ in range(RESET_TRIALS):
            for name, values in self._compiled.items():
                getattr(self._model, name)[:] = values
            for robot in domain.robots:
                robot.gripper.current_action = np.zeros(robot.gripper.dof)
            with contextlib.suppress(RandomizationError):
                domain.reset()
                return
        raise ValueError(f"no place was found for the objects of task {self._task} in {RESET_TRIALS} trials")

    def _start_from(self, state: NDArray[np.float64]) -> None:
        """Does what LIBERO's `set_init_state` does."""
        domain = self.domain
        domain.sim.set_state_from_flattened(state)
        domain.sim.forward()
        domain._check_success()
        domain._post_process()
        domain._update_observables(force=True)

    def step(self, action: NDArray[Any]) -> bool:
        """Does what robosuite's and LIBERO's `step` do (25 substeps), even after the end of the episode.

        Returns whether the goal holds.
        """
        domain = self.domain
        sim, model, data = domain.sim, self._model, self.data
        domain.timestep += 1
        # The controller begins with `sim.forward()` but reads only positions and velocities.
        sim.forward = lambda: mujoco.mj_step1(model, data)
        try:
            for substep in range(int(domain.control_timestep / domain.model_timestep)):
                domain._pre_action(action, policy_step=substep == 0)
                mujoco.mj_step2(model, data)
                domain._update_observables()
        finally:
            del sim.forward
        domain.cur_time += domain.control_timestep
        reward, _, _ = domain._post_action(action)
        return bool(reward > 0)

    def step_chunk(self, action_chunk: NDArray[np.float32]) -> ChunkOutcome:
        """Executes the actions float32[k, 7] (k >= 1) until the episode ends.

        Raises ValueError if the chunk's shape is wrong, an action is not finite or the episode has ended.
        """
        check_chunk(action_chunk, self.spec.action_dim)
        if self._ended:
            raise ValueError("the episode has ended; call reset before step_chunk")
        for index, action in enumerate(action_chunk):
            success = self.step(action)
            self._steps += 1
            truncated = not success and self._steps >= self.max_episode_steps
            if success or truncated:
                self._ended = True
                return ChunkOutcome(index + 1, index if success else -1, success, truncated)
        return ChunkOutcome(len(action_chunk), -1, False, False)

    # Images

    def observe(self, images: NDArray[np.uint8], sac_image: NDArray[np.uint8], state: NDArray[np.float32]) -> None:
        """Writes LIBERO's observation after the last step.

        It consists of images uint8[2, size, size, 3] (agentview, wrist), sac_image uint8[64, 64, 3 * n] (the
        agent's cameras) and state float32[8]. Raises ValueError if OpenGL does not work.
        """
        for camera, image in enumerate(images):
            image[:] = resize_with_pad(self._frame(camera), len(image), self._antialias)
        write_agent_image(sac_image, map(self._frame, self._agent_cameras))
        state[:] = self.domain._observables["moment"].obs

    def render(self, size: int = 256, camera: int = 0) -> NDArray[np.uint8]:
        """An upright image for people, uint8[size, size, 3], from camera 0 (agentview) or 1 (wrist)."""
        return resize_with_pad(self._frame(camera), size)

    def _frame(self, camera: int) -> NDArray[np.uint8]:
        assert self._cameras is not None, "reset comes before the first image"
        frame = self._cameras.frame(camera)
        # OpenGL's rows go from bottom to top. LIBERO leaves them so, and its policies turn them.
        return np.ascontiguousarray(frame[::-1, ::-1]) if self._rotate else frame

    def close(self) -> None:
        """Frees the scene and its graphics."""
        if self._cameras is not None:
            self._cameras.close()
        if self.domain is not None:
            self.domain.close()
        self.domain = self._cameras = self._task = None
