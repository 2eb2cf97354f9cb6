"""How published implementations play LIBERO, for the settings that are left open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dsrl_async.envs.libero_files import base_suite
from dsrl_async.envs.protocol import Settings


class Preset(NamedTuple):
    """How a published implementation plays LIBERO."""

    max_episode_steps: Mapping[str, int]
    """Steps after settling, of each of LIBERO's own suites; see `episode_steps`."""
    settling_steps: int
    seeding: str
    """See `EnvConfig.seeding`."""
    seed: int
    """Determines the fixtures' places unless `seeding` is by episode."""
    render_size: int
    antialias: bool
    """See `EnvConfig`."""


PRESETS = {
    # openpi: examples/libero/main.py
    "openpi": Preset(
        {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_90": 400, "libero_10": 520},
        settling_steps=10,
        seeding="task",
        seed=7,
        render_size=256,
        antialias=True,
    ),
    # RLinf: rlinf/envs/libero/libero_env.py; the steps are those of its configurations for Pi0, and of libero_90, for
    # which there is none, the environment's own; openpi's transforms make the images
    "rlinf": Preset(
        {"libero_spatial": 240, "libero_object": 240, "libero_goal": 320, "libero_90": 512, "libero_10": 480},
        settling_steps=15,
        seeding="fixed",
        seed=0,
        render_size=256,
        antialias=True,
    ),
    # LeRobot: src/lerobot/envs/libero.py and configs.py; policies/common/vla_utils.py makes the images
    "lerobot": Preset(
        {"libero_spatial": 280, "libero_object": 280, "libero_goal": 300, "libero_90": 400, "libero_10": 520},
        settling_steps=10,
        seeding="episode",
        seed=0,
        render_size=360,
        antialias=False,
    ),
}


OTHER_SUITES = "libero_90"
"""The suite whose steps those have that are named after none: its tasks come from scenes of every kind, too."""


def episode_steps(preset: Preset, suite: str) -> int:
    """Steps after settling; a variation of one of LIBERO's own suites has that suite's."""
    return preset.max_episode_steps.get(base_suite(suite), preset.max_episode_steps[OTHER_SUITES])


def with_preset(settings: Settings) -> dict[str, Any]:
    """The settings of a suite with the values of `preset` in place of nulls."""
    preset = PRESETS[settings["preset"]]
    values = {
        "max_episode_steps": episode_steps(preset, settings["name"]),
        "settling_steps": preset.settling_steps,
        "seeding": preset.seeding,
        "render_size": preset.render_size,
        "antialias": preset.antialias,
    }
    return {**settings, **{name: value for name, value in values.items() if settings[name] is None}}
