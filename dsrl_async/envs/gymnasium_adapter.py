"""Any `gymnasium.Env` with a Box of actions, as an environment of this package: `--env.name gymnasium`.

`make_environment` describes its options. What it tells of an environment is found out in a child process: the simulator
is imported in the environment workers only.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsrl_async.config.files import how_to_install
from dsrl_async.envs import graphics, observations, options
from dsrl_async.envs.images import resize_with_pad
from dsrl_async.envs.inspection import ask_in_a_child
from dsrl_async.envs.protocol import ChunkOutcome, EnvironmentSpec, UserEnvironment, check_chunk
from dsrl_async.untrusted import in_one_line, shown

ACTIONS = ("unchanged", "clip", "rescale")
NO_LIMIT = 1_000_000_000
"""Steps after which gymnasium may truncate an episode: the worker does that."""
PACKAGES = ("gymnasium", "mujoco", "dm-control")
WORKER_BYTES = 500 << 20
SEED_BITS = 31
"""Environments take seeds below 2^31, some take no larger ones."""


@dataclass(frozen=True)
class Options:
    """The options of `make_environment`, checked."""

    id: str | None
    make: str | None
    kwargs: dict[str, Any]
    cameras: tuple[str, ...]
    state: tuple[str, ...]
    prompts: tuple[str, ...]
    task: str | None
    success: str
    reward_at_least: float
    actions: str
    state_transform: str | None
    action_transform: str | None
    episode_steps: int | None
    rate_hz: int | None
    image_size: int
    rotate_images: bool


def make_environment(
    id: str | None = None,
    make: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    cameras: str | Sequence[str] | None = None,
    state: str | Sequence[str] = observations.WHOLE,
    prompt: str | Sequence[str] = "do the task",
    task: str | None = None,
    success: str | Mapping[str, float] = "is_success",
    actions: str = "unchanged",
    state_transform: str | None = None,
    action_transform: str | None = None,
    episode_steps: int | None = None,
    rate_hz: int | None = None,
    image_size: int = 224,
    rotate_images: bool = False,
    worker_mb: int = WORKER_BYTES >> 20,
) -> UserEnvironment:
    """What is known of a `gymnasium.Env`, from `env.options`.

    Keys of nested observations are joined by `/` or `.`.

    Args:
        id: the environment's id, with the module that registers it in front if that is not gymnasium's own:
            `gym_aloha:gym_aloha/AlohaTransferCube-v0`.
        make: instead of `id`, `package.module:function`, which returns the environment.
        kwargs: keyword arguments for `gymnasium.make`, or for that function.
        cameras: the keys of the observation that are images; null: the image of `render()`, which is then called at
            decisions only.
        state: the key of the robot's state, or several, which are joined; by default an observation that is no mapping.
        prompt: the instruction, or a list of all of them.
        task: the key of the instruction's number in `prompt`, or of its text, in what `reset` gives as info, or in the
            observation.
        success: a key of info; or `terminated`, for environments that terminate in success only; or
            `{reward_at_least: 4}`; or `package.module:function`, called after each step with the keyword arguments
            `env`, `observation`, `reward`, `terminated` and `info`.
        actions: `unchanged`: as the policy gives them; `clip`: to the action space; `rescale`: from [-1, 1] to it.
        state_transform: `package.module:function`, which makes of the state what the policy is given.
        action_transform: `package.module:function`, which makes of an action of the policy one of the environment, of
            the same width, before `actions` applies.
        episode_steps: environment steps of an episode; null: the `max_episode_steps` that it is registered with.
        rate_hz: environment steps per second; null: `metadata["render_fps"]`, or else 10.
        image_size: height and width of the policy's images, padded with black where a camera is not square.
        rotate_images: turn the images by 180 degrees, for cameras that hang upside down.
        worker_mb: upper estimate of a worker's private memory in MiB.

    Raises ValueError, which names the option, if one is wrong or does not fit the environment.
    """
    threshold = 0.0
    if isinstance(success, Mapping):
        if set(success) != {"reward_at_least"}:
            raise options.refusal("success", "a text, or {reward_at_least: NUMBER}", dict(success))
        threshold, success = options.number("success: reward_at_least", success["reward_at_least"]), "reward_at_least"
    known = options.mapping("kwargs", kwargs)
    if "max_episode_steps" in known:
        raise ValueError("env.options: kwargs may not have max_episode_steps, write episode_steps beside kwargs")
    if (id is None) == (make is None):
        raise ValueError("env.options: give either id, such as CartPole-v1, or make, such as package.module:function")
    chosen = Options(
        id=None if id is None else options.text("id", id),
        make=None if make is None else options.text("make", make),
        kwargs=known,
        cameras=() if cameras is None else options.texts("cameras", cameras),
        state=options.texts("state", state),
        prompts=options.texts("prompt", prompt),
        task=None if task is None else options.text("task", task),
        success=options.text("success", success),
        reward_at_least=threshold,
        actions=options.choice("actions", actions, ACTIONS),
        state_transform=None if state_transform is None else options.text("state_transform", state_transform),
        action_transform=None if action_transform is None else options.text("action_transform", action_transform),
        episode_steps=None if episode_steps is None else options.whole("episode_steps", episode_steps),
        rate_hz=None if rate_hz is None else options.whole("rate_hz", rate_hz),
        image_size=options.whole("image_size", image_size),
        rotate_images=options.flag("rotate_images", rotate_images),
    )
    if len(chosen.prompts) > 1 and chosen.task is None:
        raise ValueError("env.options: several prompts need task, the key that says which one is an episode's")
    worker_bytes = options.whole("worker_mb", worker_mb) << 20
    name = chosen.id or chosen.make
    found = ask_in_a_child(functools.partial(_inspect, chosen), f"env.options: {name} cannot be made")
    spec = EnvironmentSpec(
        cameras=len(chosen.cameras) or 1,
        image_size=chosen.image_size,
        state_dim=found["state_dim"],
        action_dim=found["action_dim"],
        prompts=chosen.prompts,
    )
    return UserEnvironment(
        spec=spec,
        make=functools.partial(GymnasiumEnvironment, chosen, spec),
        episode_steps=found["episode_steps"],
        rate_hz=found["rate_hz"],
        needs_opengl=found["needs_opengl"],
        worker_bytes=worker_bytes,
        packages=(str(name).partition(":")[0].partition(".")[0], *PACKAGES),
    )


def _inspect(chosen: Options) -> dict[str, Any]:
    """What is known of the environment, JSON-ready."""
    env = _make(chosen)
    for name in ("state_transform", "action_transform"):
        if (transform := getattr(chosen, name)) is not None:
            options.function(name, transform)
    if ":" in chosen.success:
        options.function("success", chosen.success)
    steps = chosen.episode_steps
    if steps is None and env.spec is not None:
        steps = env.spec.max_episode_steps if chosen.id is None else _registered_steps(env.spec.id)
    if steps is None:
        raise ValueError("env.options: episode_steps is needed, since the environment is registered without a limit")
    rate_hz = chosen.rate_hz or max(1, round(env.metadata.get("render_fps") or 10))
    modules = {module.partition(".")[0] for module in sys.modules}
    return {
        "state_dim": _state_width(env, chosen),
        "action_dim": _action_width(env),
        "episode_steps": int(steps),
        "rate_hz": rate_hz,
        "needs_opengl": bool(modules & {"mujoco", "dm_control"}),
    }


# ---- making it


def _make(chosen: Options) -> Any:
    """Makes the environment; raises ValueError if it is none that can be steered."""
    os.environ.update(graphics.variables())  # for MuJoCo and dm_control, which else may look for a display
    try:
        import gymnasium
    except ImportError as error:
        raise ValueError(f"env.options: gymnasium is not installed: {how_to_install('gymnasium')}") from error
    if chosen.make is not None:
        env = options.function("make", chosen.make)(**chosen.kwargs)
        _check_kind(env, chosen.make)
        return env
    assert chosen.id is not None
    kwargs = chosen.kwargs
    if not chosen.cameras and "render_mode" not in kwargs:
        kwargs = {**kwargs, "render_mode": "rgb_array"}
    try:
        env = gymnasium.make(chosen.id, max_episode_steps=NO_LIMIT, disable_env_checker=True, **kwargs)
    except gymnasium.error.UnregisteredEnv as error:
        hint = "" if ":" in chosen.id else "; if a package registers it, write that in front, like my_package:MyTask-v0"
        raise ValueError(f"env.options: id: {in_one_line(error).rstrip('.?')}{hint}") from error
    _check_kind(env, chosen.id)
    return env


def _check_kind(env: Any, name: str) -> None:
    import gymnasium

    if any(kind.__module__.partition(".")[0] == "gym" for kind in type(env).__mro__):
        raise ValueError(
            f"env.options: {name} is an environment of the old package gym, not of gymnasium; let a function for make "
            "return shimmy.GymV26CompatibilityV0(env=...) around it"
        )
    if not isinstance(env, gymnasium.Env):
        raise ValueError(
            f"env.options: {name} makes no gymnasium.Env, but a {type(env).__module__}.{type(env).__name__}"
        )


def _registered_steps(id: str) -> int | None:
    import gymnasium

    return gymnasium.spec(id).max_episode_steps


def _state_width(env: Any, chosen: Options) -> int:
    """Width of the state, by the observation space, without a reset."""
    from gymnasium import spaces

    space = env.observation_space
    as_mapping = _as_mapping(space)
    width = 0
    for key in chosen.state:
        part = observations.get(as_mapping, key, "state", "the observation space")
        if isinstance(part, Mapping):
            inner = ", ".join(observations.keys_of(part))
            raise ValueError(f"env.options: state: {shown(key)} is a mapping; name what is in it, such as {inner}")
        if not isinstance(part, spaces.Box | spaces.Discrete | spaces.MultiBinary | spaces.MultiDiscrete):
            raise ValueError(f"env.options: state: {shown(key)} must be numbers, and is a {type(part).__name__}")
        if len(part.shape or ()) > 2:
            raise ValueError(f"env.options: state: {shown(key)} has the shape {part.shape}, as an image has")
        width += int(np.prod(part.shape or ()))
    for key in chosen.cameras:
        observations.get(as_mapping, key, "cameras", "the observation space")
    if chosen.state_transform is not None:
        transform = options.function("state_transform", chosen.state_transform)
        width = len(np.asarray(transform(np.zeros(width, np.float32))).reshape(-1))
    if not width:
        raise ValueError("env.options: state must name at least one number")
    return width


def _as_mapping(space: Any) -> Any:
    """A space whose Dict spaces are mappings."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return {key: _as_mapping(part) for key, part in space.spaces.items()}
    return space


def _action_width(env: Any) -> int:
    from gymnasium import spaces

    space = env.action_space
    if not isinstance(space, spaces.Box) or space.dtype is None or space.dtype.kind != "f":
        raise ValueError(
            f"env.options: the action space of {type(env.unwrapped).__name__} is {space}, and only a Box of real "
            "numbers can be steered"
        )
    return int(np.prod(space.shape))


# ---- playing it


@contextlib.contextmanager
def no_rendering_of_dm_control() -> Iterator[None]:
    """Makes `Physics.render` of dm_control return black at once.

    An environment of dm_control renders in every step and reset (each camera of its observation), which takes a hundred
    times as long as its physics, and pictures of `render()` are all that is used here.
    """
    engine: Any = sys.modules.get("dm_control.mujoco.engine")
    if engine is None:
        yield
        return
    stock = engine.Physics.render
    engine.Physics.render = _black
    try:
        yield
    finally:
        engine.Physics.render = stock


def _black(
    physics: Any,
    height: int = 240,
    width: int = 320,
    camera_id: Any = -1,
    overlays: Any = (),
    depth: bool = False,
    segmentation: bool = False,
    *rest: Any,
    **others: Any,
) -> NDArray[Any]:
    """Has the arguments of dm_control's `Physics.render`."""
    if depth:
        return np.zeros((height, width), np.float32)
    if segmentation:
        return np.zeros((height, width, 2), np.int32)
    return np.zeros((height, width, 3), np.uint8)


class GymnasiumEnvironment:
    """A `gymnasium.Env`; see `dsrl_async.envs.protocol.UserSimulation` for the protocol and `make_environment` for the
    options.

    An episode ends with its first successful step, whether or not the environment goes on. It has failed for good if
    the environment terminates without success.

    Attributes:
        env: the environment.
    """

    def __init__(self, chosen: Options, spec: EnvironmentSpec) -> None:
        self.spec = spec
        self.env = _make(chosen)
        self._chosen = chosen
        self._state_transform = self._function("state_transform")
        self._action_transform = self._function("action_transform")
        self._success = options.function("success", chosen.success) if ":" in chosen.success else None
        self._observation: Any = None
        self._pictures: list[NDArray[np.uint8]] = []
        self._ended = True
        self._told_success = chosen.success in ("terminated", "reward_at_least") or self._success is not None
        self._infos = 0
        self._last_info: list[Any] = []

    def _function(self, name: str) -> Callable[..., Any] | None:
        value = getattr(self._chosen, name)
        return None if value is None else options.function(name, value)

    def reset(self, seed: int, number: int = 0) -> int:
        """Starts the episode that `seed` determines. Returns its task_index.

        Raises ValueError if `success` names a key that no info of the episodes so far has had.
        """
        if self._infos and not self._told_success:
            raise ValueError(
                f"env.options: success: none of the {self._infos} infos so far has {shown(self._chosen.success)}; the "
                f"last one has {', '.join(map(str, self._last_info)) or 'nothing'}; name one of these, or write "
                "terminated, {reward_at_least: NUMBER} or package.module:function"
            )
        with self._without_rendering():
            answer = self.env.reset(seed=seed % 2**SEED_BITS)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise ValueError("reset must return (observation, info), as gymnasium's environments do")
        self._observation, info = answer
        self._pictures = []
        self._ended = False
        return self._task(info)

    def _task(self, info: Mapping[str, Any]) -> int:
        prompts, key = self.spec.prompts, self._chosen.task
        if key is None:
            return 0
        told = observations.find(info, key)
        if told is observations.MISSING:
            told = observations.get(self._observation, key, "task", "the observation (nor info)")
        if isinstance(told, str):
            if told not in prompts:
                raise ValueError(f"env.options: prompt does not have {shown(told)}, which {key} is")
            return prompts.index(told)
        number = int(np.asarray(told).reshape(()))
        if not 0 <= number < len(prompts):
            raise ValueError(f"env.options: {key} is {number}, and there are {len(prompts)} prompts, from 0")
        return number

    def step_chunk(self, action_chunk: NDArray[np.float32]) -> ChunkOutcome:
        """Executes the actions float32[k, action_dim] (k >= 1) until the episode ends.

        Raises ValueError if the chunk's shape is wrong, an action is not finite or the episode has ended.
        """
        check_chunk(action_chunk, self.spec.action_dim)
        if self._ended:
            raise ValueError("the episode has ended; call reset before step_chunk")
        self._pictures = []
        rewards: list[float] = []
        with self._without_rendering():
            for action in action_chunk:
                answer = self.env.step(self._action(action))
                if not isinstance(answer, tuple) or len(answer) != 5:
                    raise ValueError(
                        "step must return (observation, reward, terminated, truncated, info), as gymnasium's "
                        "environments do; one of the old package gym returns four"
                    )
                self._observation, reward, terminated, truncated, info = answer
                rewards.append(float(reward))
                success = self._succeeds(reward, bool(terminated), info)
                if success or terminated or truncated:
                    self._ended = True
                    break
        steps = len(rewards)
        return ChunkOutcome(
            steps=steps,
            success_step=steps - 1 if success else -1,
            terminated=success or bool(terminated),
            truncated=not success and not terminated and bool(truncated),
            rewards=tuple(rewards),
        )

    def _action(self, action: NDArray[np.float32]) -> NDArray[Any]:
        space, how = self.env.action_space, self._chosen.actions
        if self._action_transform is not None:
            action = np.asarray(self._action_transform(action))
        action = action.reshape(space.shape)
        if how == "rescale":
            action = space.low + (np.clip(action, -1, 1) + 1) * (space.high - space.low) / 2
        elif how == "clip":
            action = np.clip(action, space.low, space.high)
        return action.astype(space.dtype)

    def _succeeds(self, reward: Any, terminated: bool, info: Mapping[str, Any]) -> bool:
        chosen = self._chosen
        if self._success is not None:
            return bool(
                self._success(
                    env=self.env, observation=self._observation, reward=reward, terminated=terminated, info=info
                )
            )
        if chosen.success == "terminated":
            return terminated
        if chosen.success == "reward_at_least":
            return float(reward) >= chosen.reward_at_least
        told = observations.find(info, chosen.success)
        self._infos, self._last_info = self._infos + 1, list(info)
        if told is observations.MISSING:
            return False
        self._told_success = True
        return bool(np.any(told))

    def observe(self, images: NDArray[np.uint8], state: NDArray[np.float32]) -> None:
        """Writes the images and the state after the last step."""
        pictures = self._frames()
        for image, picture in zip(images, pictures, strict=True):
            image[:] = resize_with_pad(picture, len(image))
        values = observations.vector(self._observation, self._chosen.state, "state")
        if self._state_transform is not None:
            values = np.asarray(self._state_transform(values), np.float32).reshape(-1)
        if values.shape != state.shape:
            raise ValueError(f"env.options: state has {len(values)} numbers, and the observation space {len(state)}")
        state[:] = values

    def render(self, size: int = 256, camera: int = 0) -> NDArray[np.uint8]:
        """An image for people, uint8[size, size, 3]."""
        return resize_with_pad(self._frames()[camera], size)

    def _frames(self) -> list[NDArray[np.uint8]]:
        """What the cameras show now, as they give it."""
        if not self._pictures:
            if self._chosen.cameras:
                self._pictures = [
                    observations.image(observations.get(self._observation, key, "cameras"), f"env.options: {key}")
                    for key in self._chosen.cameras
                ]
            else:
                self._pictures = [observations.image(self.env.render(), "what render() returns")]
            if self._chosen.rotate_images:
                self._pictures = [np.ascontiguousarray(picture[::-1, ::-1]) for picture in self._pictures]
        return self._pictures

    @contextlib.contextmanager
    def _without_rendering(self) -> Iterator[None]:
        with contextlib.nullcontext() if self._chosen.cameras else no_rendering_of_dm_control():
            yield

    def close(self) -> None:
        """Frees what the environment holds."""
        self.env.close()
