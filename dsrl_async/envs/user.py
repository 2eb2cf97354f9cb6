"""Environments that do not come with this package: found by `env.name`, asked what they are, and looked after.

What `describe` returns is plain data, so that the processes which must not import a user's module can ask one that may.
"""

from __future__ import annotations

import functools
import json
import math
import operator
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsrl_async import users_code
from dsrl_async.config.strict_yaml import is_text
from dsrl_async.envs.images import resize_with_pad, write_agent_image
from dsrl_async.envs.libero_files import there_are
from dsrl_async.envs.protocol import (
    ChunkOutcome,
    Environment,
    EnvironmentRecord,
    EnvironmentSpec,
    Settings,
    UserEnvironment,
    UserSimulation,
)
from dsrl_async.envs.shipped import IMPORTS_BYTES
from dsrl_async.untrusted import shown
from dsrl_async.users_code import FAULTS, blamed

GROUP = "dsrl_async.environments"
"""The entry points under which installed packages name their environments."""
ADAPTERS = {
    "gymnasium": "dsrl_async.envs.gymnasium_adapter:make_environment",
    "robosuite": "dsrl_async.envs.robosuite_adapter:make_environment",
}
"""Names for functions of this package that make an environment of what their options say."""
USER_SETTINGS = frozenset({"options"})
METHODS = ("reset", "step_chunk", "observe", "close")
NUMBERS = (int, float, np.integer, np.floating)


class Loaded(NamedTuple):
    """A user's environment, found and checked."""

    environment: UserEnvironment
    spec: EnvironmentSpec
    module: str
    file: str
    packages: tuple[str, ...]


def user_record(settings: Settings, described: Mapping[str, Any]) -> EnvironmentRecord:
    """What is known of a user's environment, of which `described` is what `describe` says."""
    spec = EnvironmentSpec.of_plain(described["spec"])
    steps = settings["max_episode_steps"]
    steps = described["episode_steps"] if steps is None else steps

    def make(agent_cameras: Sequence[int]) -> Environment:
        return _make(settings, steps, agent_cameras)

    return EnvironmentRecord(
        name=settings["name"],
        settings=settings,
        own_settings=USER_SETTINGS,
        spec=lambda: spec,
        make=make,
        check=lambda: (),
        needs_opengl=described["needs_opengl"],
        rate_hz=described["rate_hz"],
        episode_steps=steps,
        worker_bytes=described["worker_bytes"],
        template_bytes=IMPORTS_BYTES,
        packages=tuple(described["packages"]),
        evaluation_episodes=described["evaluation_episodes"],
        file=described["file"],
        survives_fork=False,
    )


def describe(settings: Settings) -> dict[str, Any]:
    """What is known of a user's environment, JSON-ready. It imports the user's module.

    Raises ValueError, in a sentence that names the setting or the line that is to be mended, if there is no such
    environment or what the function returns cannot be used.
    """
    loaded = _load(settings["name"], json.dumps(settings["options"]))
    described = loaded.environment
    return {
        "spec": loaded.spec,
        "episode_steps": operator.index(described.episode_steps),
        "rate_hz": operator.index(described.rate_hz),
        "needs_opengl": bool(described.needs_opengl),
        "worker_bytes": operator.index(described.worker_bytes),
        "evaluation_episodes": operator.index(described.evaluation_episodes),
        "packages": loaded.packages,
        "file": loaded.file,
    }


def answer(settings: Settings) -> dict[str, Any]:
    """What `describe` says as `described`, or why it cannot as `refused`: for a process that is asked by another."""
    try:
        return {"described": describe(settings)}
    except ValueError as error:
        return {"refused": str(error)}


@functools.cache  # in a worker it is there already: the template has loaded it
def _load(name: str, options: str) -> Loaded:
    target, distribution = _target(name)
    found = users_code.find("env.name", name, target)
    made = users_code.call("env.name", name, found, (), json.loads(options), sentences=name in ADAPTERS)
    spec = _check(name, made)
    packages = tuple(dict.fromkeys([*([distribution] if distribution else []), *made.packages]))
    return Loaded(made, spec, found.module, found.file, packages)


def _target(name: str) -> tuple[str, str | None]:
    """The `module:function` that a name stands for, and the distribution that says so; raises ValueError."""
    if ":" in name:
        users_code.check_path("env.name", name)
        return name, None
    if name in ADAPTERS:
        return ADAPTERS[name], None
    users_code.see_working_directory()
    found = {point.value: point for point in entry_points(group=GROUP) if point.name == name}
    if len(found) > 1:
        raise ValueError(f"env.name: several packages have a {name}; choose one of {', '.join(sorted(found))}")
    for value, point in found.items():
        return value, point.dist.name if point.dist is not None else None
    installed = sorted({point.name for point in entry_points(group=GROUP)})
    names = ", ".join(["tabletop", *there_are(), *ADAPTERS, *installed])
    raise ValueError(
        f"env.name: there is no environment {shown(name)}; choose one of {names}, or one of your own, like "
        "package.module:function"
    )


# ---- what a function returns


def _check(name: str, made: Any) -> EnvironmentSpec:
    """The spec of what a function has returned; raises ValueError if there is something wrong with that."""

    def require(condition: bool, what: str, value: Any) -> None:
        if not condition:
            raise ValueError(f"env.name: {name} returns {what}, which {shown(value)} is not")

    def require_number(what: str, value: Any, least: int = 1) -> int:
        require(_is_whole(value) and value >= least, f"{what}, a whole number of at least {least}", value)
        return operator.index(value)

    if not isinstance(made, UserEnvironment):
        raise ValueError(f"env.name: {name} must return a dsrl_async.envs.UserEnvironment, which {shown(made)} is not")
    spec = made.spec
    require(isinstance(spec, EnvironmentSpec), "as spec a dsrl_async.envs.EnvironmentSpec", spec)
    numbers = {
        field: require_number(f"as spec.{field}", getattr(spec, field))
        for field in ("cameras", "image_size", "state_dim", "action_dim")
    }
    prompts = spec.prompts
    require(isinstance(prompts, tuple | list) and len(prompts) > 0, "as spec.prompts a tuple of texts", prompts)
    for prompt in prompts:
        fine = isinstance(prompt, str) and bool(prompt.strip()) and is_text(prompt)
        require(fine, "as one of spec.prompts a text", prompt)
    require(callable(made.make), "as make a function", made.make)
    require_number("as episode_steps", made.episode_steps)
    require_number("as rate_hz", made.rate_hz)
    require(isinstance(made.needs_opengl, bool), "as needs_opengl True or False", made.needs_opengl)
    require_number("as worker_bytes", made.worker_bytes, 0)
    require_number("as evaluation_episodes", made.evaluation_episodes)
    packages = made.packages
    fine = isinstance(packages, tuple | list) and all(isinstance(package, str) for package in packages)
    require(fine, "as packages a tuple of distributions' names", packages)
    return EnvironmentSpec(**numbers, prompts=tuple(map(str, prompts)))


def _is_whole(value: Any) -> bool:
    """Whether a value is a whole number, of Python or NumPy."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


# ---- what an environment does


def _make(settings: Settings, episode_steps: int, agent_cameras: Sequence[int]) -> Environment:
    name = settings["name"]
    loaded = _load(name, json.dumps(settings["options"]))
    with _Blaming(name, loaded.module):
        simulation = loaded.environment.make()
    lacking = [method for method in METHODS if not callable(getattr(simulation, method, None))]
    if lacking:
        raise RuntimeError(f"the environment {name}: what make returns, {shown(simulation)}, has no {lacking[0]}")
    return GuardedEnvironment(name, loaded, episode_steps, agent_cameras, simulation)


class GuardedEnvironment:
    """A user's environment with what every other one does by itself: it ends episodes in time, and shows the agent its
    cameras. Nothing of it is taken for granted.

    The methods are those of `Environment`. They raise RuntimeError in a sentence that names the environment and what it
    did wrong, or the line of the user's code that raised something.
    """

    def __init__(
        self, name: str, loaded: Loaded, episode_steps: int, agent_cameras: Sequence[int], simulation: UserSimulation
    ) -> None:
        self.spec = loaded.spec
        self._name, self._episode_steps, self._simulation = name, episode_steps, simulation
        self._agent_cameras = list(agent_cameras)
        self._blaming = _Blaming(name, loaded.module)
        self._steps = 0
        self._observed = False

    def reset(self, seed: int, number: int = 0) -> int:
        with self._blaming:
            task_index = self._simulation.reset(seed, number)
        self._steps = 0
        prompts = len(self.spec.prompts)
        self._require(
            _is_whole(task_index) and 0 <= task_index < prompts,
            f"reset must return a task_index, a whole number from 0 to {prompts - 1}, not {shown(task_index)}",
        )
        return int(task_index)

    def step_chunk(self, action_chunk: NDArray[np.float32]) -> ChunkOutcome:
        action_chunk = action_chunk[: self._episode_steps - self._steps]
        with self._blaming:
            outcome = self._simulation.step_chunk(action_chunk)
        self._require(
            isinstance(outcome, ChunkOutcome),
            f"step_chunk must return a dsrl_async.envs.ChunkOutcome, not {shown(outcome)}",
        )
        steps, success_step, most = outcome.steps, outcome.success_step, len(action_chunk)
        self._require(
            _is_whole(steps) and 1 <= steps <= most,
            f"step_chunk says that it executed {shown(steps)} steps of a chunk of {most}",
        )
        self._require(
            _is_whole(success_step) and -1 <= success_step < steps,
            f"step_chunk says that step {shown(success_step)} of {steps} was the first successful one; the first step "
            "is 0, and -1 means that there was none",
        )
        for field in ("terminated", "truncated"):
            value = getattr(outcome, field)
            self._require(
                isinstance(value, bool | np.bool_),
                f"step_chunk must return {field} as True or False, not {shown(value)}",
            )
        rewards = outcome.rewards
        self._require(
            len(rewards) in (0, steps)
            and all(isinstance(reward, NUMBERS) and math.isfinite(reward) for reward in rewards),
            f"step_chunk must return rewards for the {steps} steps that it executed, or none, not {shown(rewards)}",
        )
        ended = bool(outcome.terminated or outcome.truncated)
        self._require(
            ended or steps == most,
            f"step_chunk executed {steps} of {most} steps, although the episode is neither terminated nor truncated",
        )
        self._steps += int(steps)
        return outcome._replace(
            steps=int(steps),
            success_step=int(success_step),
            terminated=bool(outcome.terminated),
            truncated=not outcome.terminated and (bool(outcome.truncated) or self._steps >= self._episode_steps),
            rewards=tuple(map(float, rewards)),
        )

    def observe(self, images: NDArray[np.uint8], sac_image: NDArray[np.uint8], state: NDArray[np.float32]) -> None:
        state.fill(math.nan)  # what is not written is found
        noise = None if self._observed else np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
        if noise is not None:
            images[...] = noise  # which no camera shows
        with self._blaming:
            self._simulation.observe(images, state)
        self._require(
            bool(np.isfinite(state).all()),
            f"observe must write the state, {len(state)} finite numbers, and it is {shown(state.tolist())} now",
        )
        if noise is not None:
            for camera, (image, before) in enumerate(zip(images, noise, strict=True)):
                self._require(
                    not np.array_equal(image, before),
                    f"observe left images[{camera}] as it was; write into it, as in images[{camera}][:] = ...",
                )
            self._observed = True
        write_agent_image(sac_image, images[self._agent_cameras])

    def render(self, size: int, camera: int = 0) -> NDArray[np.uint8]:
        """An image for people, uint8 [size, size, 3]: what the environment's own `render` shows if it has one, or else
        what the policy sees."""
        render = getattr(self._simulation, "render", None)
        with self._blaming:
            if callable(render):
                frame = np.asarray(render(size, camera))
            else:
                images = np.zeros((self.spec.cameras, self.spec.image_size, self.spec.image_size, 3), np.uint8)
                self._simulation.observe(images, np.zeros(self.spec.state_dim, np.float32))
                frame = images[camera]
        fine = frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3
        self._require(fine, f"render must return uint8 [{size}, {size}, 3], not {frame.dtype} {list(frame.shape)}")
        return resize_with_pad(frame, size)

    def close(self) -> None:
        with self._blaming:
            self._simulation.close()

    def _require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise RuntimeError(f"the environment {self._name}: {problem}")


class _Blaming:
    """Makes a RuntimeError, which names the user's line, of what a user's code raises inside the `with`."""

    def __init__(self, name: str, module: str) -> None:
        self._name, self._module = name, module

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, FAULTS):
            raise RuntimeError(f"the environment {self._name}: {blamed(error, self._module)}") from error
