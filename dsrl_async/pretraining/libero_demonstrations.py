"""Demonstrations of the scripted LIBERO expert, in the HDF5 layout of LIBERO's own (docs/libero_demonstrations.md).

They mix several ways of doing the task: sides of the bowl's rim, carry heights and speeds. In two thirds of the
episodes the executed action carries Gaussian noise while the recorded action is the expert's clean one (DART: Laskey
et al., "DART: Noise Injection for Robust Imitation Learning", 2017), and some first grasps miss, so that a policy that
imitates them also learns to recover.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dsrl_async import __version__
from dsrl_async.config.load import validate
from dsrl_async.config.shapes import SAC_IMAGE_SIZE
from dsrl_async.demonstrations import hdf5
from dsrl_async.envs import environment_record, libero_files
from dsrl_async.envs.shipped import libero_versions
from dsrl_async.pretraining.libero_expert import SIDES, LiberoExpert, Way, situation

if TYPE_CHECKING:
    from dsrl_async.envs.libero import LiberoEnvironment

NOISE_SCALES = (0.0, 0.15, 0.3)
"""Standard deviations of the noise in a translation, as fractions of the largest action."""
ROTATION_NOISE = 1 / 3
"""Noise in a rotation, as a fraction of that in a translation."""
CARRY_HEIGHTS = (0.08, 0.16)
SPEEDS = (0.7, 1.0)
SLOPPY_FRACTION = 0.12
SLOPPY_OFFSET = (0.040, 0.050)
"""Distance in metres by which the first grasp closes beside the rim, inside or outside the bowl."""
HOVER_FRAMES = 8
"""Number of frames recorded after the hand has released the bowl on the plate."""
MAX_STEPS = 220
ATTEMPTS = 4
"""Upper limit on the attempts per wanted episode; a task that needs more is broken."""
CHUNK_FRAMES = 8
"""Number of frames in a compressed piece of the file."""


class Attempt(NamedTuple):
    """The choices for an attempt, made before it starts."""

    init_state: int
    scene_seed: int
    """Seed for `LiberoEnvironment.reset`, which decides where the fixtures stand."""
    way: Way
    noise_scale: float
    sloppy_offset: float
    noise_seed: int


class Demonstration(NamedTuple):
    """A recorded episode of T frames. Frame t is what a policy would see before action t."""

    attempt: Attempt
    fields: dict[str, NDArray[Any]]
    """Name in the file -> array whose first axis is T."""


def draw_attempt(seed: int, task: int, number: int, init_states: Sequence[int]) -> Attempt:
    """Attempt `number` (from 0) at a task. It depends only on the arguments; the initial states take turns."""
    random = np.random.default_rng([seed, task, number])
    way = Way(
        side=float(random.choice(SIDES[task])),
        carry_height=float(random.uniform(*CARRY_HEIGHTS)),
        speed=float(random.uniform(*SPEEDS)),
    )
    sloppy = random.random() < SLOPPY_FRACTION
    offset = random.choice([-1, 1]) * random.uniform(*SLOPPY_OFFSET) if sloppy else 0.0
    return Attempt(
        init_state=init_states[number % len(init_states)],
        scene_seed=int(random.integers(2**31)),
        way=way,
        noise_scale=float(random.choice(NOISE_SCALES)),
        sloppy_offset=float(offset),
        noise_seed=int(random.integers(2**31)),
    )


def environment_for(suite: str, task: int, image_size: int, render_quality: str) -> LiberoEnvironment:
    """One task with images as in LIBERO's files. A reset with number k starts from initial state k."""
    from dsrl_async.envs.libero import LiberoEnvironment

    settings = {
        "name": suite,
        "task_ids": [task],
        "scene_order": "cycled",
        "seeding": "episode",
        "render_quality": render_quality,
        "render_size": image_size,
        "image_size": image_size,
        "rotate_images": False,
    }
    environment = LiberoEnvironment(environment_record(validate({"env": settings}).env.model_dump()))
    # LIBERO's files have these too, which our policies do not see. They are sampled at the same moment as the images.
    for name in ("robot0_eef_quat", "robot0_joint_pos"):
        environment.domain._observables[name]._enabled = True
    return environment


def record_episode(environment: LiberoEnvironment, attempt: Attempt) -> Demonstration | None:
    """Plays an attempt. Returns None if the bowl is not released on the plate within `MAX_STEPS` steps."""
    environment.reset(attempt.scene_seed, attempt.init_state)
    random = np.random.default_rng(attempt.noise_seed)
    expert = LiberoExpert(attempt.way, attempt.sloppy_offset)
    domain, size = environment.domain, environment.spec.image_size
    sac_image = np.empty((SAC_IMAGE_SIZE, SAC_IMAGE_SIZE, 3), np.uint8)
    frames: list[dict[str, NDArray[Any]]] = []
    hovered = 0
    while len(frames) < MAX_STEPS + HOVER_FRAMES and hovered < HOVER_FRAMES:
        images, robot_state = np.empty((2, size, size, 3), np.uint8), np.empty(8, np.float32)
        environment.observe(images, sac_image, robot_state)
        now = situation(environment)
        action = expert.action(now)
        moment = domain._observables["moment"].obs
        frame = {
            "actions": action,
            "states": domain.sim.get_state().flatten(),
            "robot_states": np.concatenate((moment[6:8], moment[:3], domain._observables["robot0_eef_quat"].obs)),
            "obs/agentview_rgb": images[0],
            "obs/eye_in_hand_rgb": images[1],
            "obs/ee_pos": moment[:3],
            "obs/ee_ori": moment[3:6],
            "obs/ee_states": moment[:6],
            "obs/gripper_states": moment[6:8],
            "obs/joint_states": domain._observables["robot0_joint_pos"].obs.copy(),
            "obs/robot_state": robot_state,
            "obs/target_position": now.bowl.astype(np.float32),
            "obs/goal_position": now.plate.astype(np.float32),
        }
        executed = action.copy()
        noise = attempt.noise_scale * random.standard_normal(6)
        noise[3:] *= ROTATION_NOISE
        executed[:6] = np.clip(executed[:6] + noise, -1, 1)
        # `step_chunk` would end the episode at a success.
        success = environment.step(executed)
        frames.append({**frame, "executed_actions": executed, "rewards": np.asarray(success, np.uint8)})
        hovered += success and expert.phase == "raise"
    if hovered < HOVER_FRAMES or not frames[-1]["rewards"]:
        return None
    fields = {name: np.stack([frame[name] for frame in frames]) for name in frames[0]}
    fields["dones"] = np.zeros(len(frames), np.uint8)
    fields["dones"][-1] = 1
    return Demonstration(attempt, fields)


def write_demonstration(data: h5py.Group, number: int, demonstration: Demonstration) -> None:
    """Adds `data/demo_<number>`."""
    group = data.create_group(f"demo_{number}")
    attempt, frames = demonstration.attempt, len(demonstration.fields["actions"])
    group.attrs.update(
        num_samples=frames,
        init_state=attempt.init_state,
        scene_seed=attempt.scene_seed,
        way=f"side {attempt.way.side:g}",
        **attempt.way._asdict(),
        noise_scale=attempt.noise_scale,
        sloppy_offset=attempt.sloppy_offset,
    )
    for name, values in demonstration.fields.items():
        pictures = values.dtype == np.uint8 and values.ndim == 4
        packed = {"compression": "gzip", "compression_opts": 1, "shuffle": False} if pictures else {}
        chunks = (min(CHUNK_FRAMES, frames), *values.shape[1:]) if pictures else None
        group.create_dataset(name, data=values, chunks=chunks, **packed)


class Request(NamedTuple):
    """Which demonstrations to record of one task, and where."""

    suite: str
    task: int
    init_states: tuple[int, ...]
    episodes: int
    seed: int
    image_size: int
    render_quality: str
    out: str


def record_task(request: Request, advance: Callable[[], None] = lambda: None) -> Path:
    """Writes `<out>/<task name>_demo.hdf5`, which appears when it is complete. An existing file stays as it is.

    `advance` is called after each kept episode. Raises ValueError if an existing file was made for another request or
    too few attempts succeed.
    """
    path = file_of(request)
    if path.exists():
        check_file(request)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = environment_for(request.suite, request.task, request.image_size, request.render_quality)
    attempted: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    partial = path.with_suffix(".partial")
    try:
        with h5py.File(partial, "w") as file:
            data = file.create_group("data")
            for number in range(ATTEMPTS * request.episodes):
                attempt = draw_attempt(request.seed, request.task, number, request.init_states)
                demonstration = record_episode(environment, attempt)
                name = f"side {attempt.way.side:g}, noise {attempt.noise_scale:g}"
                attempted[name] += 1
                if demonstration is None:
                    continue
                write_demonstration(data, kept.total(), demonstration)
                data[f"demo_{kept.total()}"].attrs["attempt"] = number
                kept[name] += 1
                advance()
                if kept.total() == request.episodes:
                    break
            else:
                raise ValueError(
                    f"task {request.task}: only {kept.total()} of {attempted.total()} attempts succeeded; "
                    "try other initial states or fewer episodes"
                )
            ways = {name: [kept[name], attempted[name]] for name in sorted(attempted)}
            _describe(data, request, environment, ways)
        partial.rename(path)
    finally:
        environment.close()
        partial.unlink(missing_ok=True)
    return path


def file_of(request: Request) -> Path:
    """The file of a task's demonstrations."""
    return Path(request.out) / f"{libero_files.task_names(request.suite)[request.task]}_demo.hdf5"


def check_file(request: Request) -> None:
    """Raises ValueError if the existing file of the task was made for another request."""
    path = file_of(request)
    wanted = {
        "num_demos": request.episodes,
        "seed": request.seed,
        "init_states": list(request.init_states),
        "image_size": request.image_size,
        "render_quality": request.render_quality,
    }
    with hdf5.opened(path) as data:
        for name, value in wanted.items():
            found = data.attrs[name]
            if (found.tolist() if hasattr(found, "tolist") else found) != value:
                raise ValueError(
                    f"{path} has {name} {found}, not {value}; give the same options, another directory, or remove it"
                )


def _describe(data: h5py.Group, request: Request, environment: LiberoEnvironment, ways: dict[str, list[int]]) -> None:
    name = libero_files.task_names(request.suite)[request.task]
    language = libero_files.instruction(name)
    bddl = f"{request.suite}/{name}.bddl"
    domain_name = type(environment.domain).__name__
    env_args = {
        "type": 1,
        "env_name": domain_name,
        "problem_name": domain_name,
        "bddl_file": bddl,
        "env_kwargs": {
            "robots": ["Panda"],
            "controller": "OSC_POSE",
            "control_freq": environment.domain.control_freq,
            "camera_names": ["robot0_eye_in_hand", "agentview"],
            "camera_heights": request.image_size,
            "camera_widths": request.image_size,
        },
    }
    demos = list(data.values())
    data.attrs.update(
        env_name=domain_name,
        env_args=json.dumps(env_args),
        problem_info=json.dumps({"problem_name": domain_name, "language_instruction": language}),
        bddl_file_name=bddl,
        macros_image_convention="opengl",
        num_demos=len(demos),
        total=int(sum(demo.attrs["num_samples"] for demo in demos)),
        suite=request.suite,
        task=name,
        task_id=request.task,
        language_instruction=language,
        seed=request.seed,
        init_states=list(request.init_states),
        versions=json.dumps({**libero_versions(), "dsrl_async": __version__, "numpy": np.__version__}),
        render_quality=request.render_quality,
        image_size=request.image_size,
        settling_steps=environment.settling_steps,
        kept_and_attempted=json.dumps(ways),
    )


_counter: Any = None


def _share(counter: Any) -> None:
    global _counter
    _counter = counter


def _advance() -> None:
    with _counter.get_lock():
        _counter.value += 1


def _call(function: Callable[..., Any], argument: Any) -> Any:
    return function(argument, _advance)


def spread(
    function: Callable[..., Any], arguments: Sequence[Any], processes: int, total: int, description: str
) -> list[Any]:
    """Runs `function(argument, advance)` for each argument in `processes` processes and returns the results in order.

    A progress bar shows how many of `total` calls of `advance` have been made. When all have ended, raises what the
    first failure raised, or ValueError if a process was killed.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    # multiprocessing's Pool would wait for ever for the result of a killed process.
    with ProcessPoolExecutor(processes, context, _share, (counter,)) as pool, Progress(*columns) as progress:
        bar = progress.add_task(description, total=total)
        results = [pool.submit(_call, function, argument) for argument in arguments]
        while wait(results, timeout=0.5).not_done:
            progress.update(bar, completed=counter.value)
        progress.update(bar, completed=counter.value)
    try:
        return [result.result() for result in results]
    except BrokenProcessPool as error:
        raise ValueError("a process was killed; if memory ran out, use fewer processes") from error


def make_demonstrations(requests: Sequence[Request], processes: int) -> list[Path]:
    """Records the requests in `processes` processes and returns the files, which depend only on the requests.

    Raises ValueError as `record_task` does, or if a number is not positive, the suite is unknown to the expert or a
    task has no such initial state.
    """
    if processes < 1 or any(request.episodes < 1 for request in requests):
        raise ValueError("the numbers of episodes and processes must be at least 1")
    for request in requests:
        if request.suite != "libero_spatial":
            raise ValueError(f"the scripted expert knows libero_spatial only, not {request.suite}")
        if file_of(request).exists():
            check_file(request)
            continue
        count = len(libero_files.init_states(request.suite, request.task))
        if not set(request.init_states) <= set(range(count)):
            raise ValueError(f"task {request.task} has initial states 0 to {count - 1} only")
    missing = [request for request in requests if not file_of(request).exists()]
    if missing:
        started = time.monotonic()
        total = sum(request.episodes for request in missing)
        spread(record_task, missing, min(processes, len(missing)), total, "Recording demonstrations")
        frames = 0
        for request in missing:
            with hdf5.opened(file_of(request)) as data:
                frames += hdf5.attribute(data, "total", int)
        wall = time.monotonic() - started
        print(f"{frames} frames in {wall:.0f} s, {frames / wall:.1f} per second")
    return [file_of(request) for request in requests]
