"""The shapes of the tabletop, for those that do not need its simulator."""

from __future__ import annotations

from dsrl_async.envs.protocol import EnvironmentSpec

TABLETOP = EnvironmentSpec(
    cameras=2, image_size=64, state_dim=8, action_dim=7, prompts=("put the block on the red plate",)
)
