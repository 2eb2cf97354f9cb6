"""A random Pi0 of ALOHA's shapes, for trying a run without a checkpoint: `python scripts/make_aloha_checkpoint.py DIR`.

It is small, and its norm stats are such that its actions stay around ALOHA's first pose.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from dsrl_async.envs.aloha import state_for_pi
from dsrl_async.pi0.config import CONFIG, NORM_STATS, Pi0Config
from dsrl_async.pi0.files import save_norm_stats
from dsrl_async.pi0.synthetic import write_checkpoint

FIRST_POSE = [0, -0.96, 1.16, 0, -0.3, 0, 0.1] * 2
"""The joints in radians and the gripper from 0 to 1, of both arms."""
SPREAD = 0.2


def aloha_config() -> Pi0Config:
    """A Pi0 with the shapes of openpi's pi0_aloha_sim outside, and small within."""
    return Pi0Config(
        cameras=1,
        robot_state_dim=14,
        robot_action_dim=14,
        patch_size=56,
        vision_width=64,
        vision_depth=2,
        vision_heads=2,
        vision_mlp=128,
        vlm_width=64,
        vlm_mlp=128,
        expert_width=64,
        expert_mlp=128,
        depth=2,
        heads=2,
        head_dim=32,
        vocab_size=128,
    )


def main(directory: Path) -> None:
    config = aloha_config()
    write_checkpoint(directory, config, "openpi")
    config.save(directory / CONFIG)
    mean = state_for_pi(np.array(FIRST_POSE)).tolist()
    stats = {key: {"mean": mean, "std": [SPREAD] * len(mean)} for key in ("state", "actions")}
    (found,) = directory.rglob(NORM_STATS)
    save_norm_stats(stats, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
