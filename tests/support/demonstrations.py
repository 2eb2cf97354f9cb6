"""Demonstrations in HDF5 as small as they can be."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from dsrl_async.pretraining import libero


def write_file(path: Path, frames: int = 3, size: int = 8) -> None:
    """Two demonstrations of a made-up task."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update(suite="libero_spatial", task="a", task_id=0, seed=5, language_instruction="do it")
        data.attrs.update(versions="{}", render_quality="fast", image_size=size, settling_steps=10)
        for number in range(2):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["init_state"] = number
            demo["actions"] = np.zeros((frames, 7), np.float32)
            observed = demo.create_group("obs")
            for name in libero.CAMERAS:
                observed.create_dataset(name, data=np.zeros((frames, size, size, 3), np.uint8), compression="gzip")
            for name, width in (("robot_state", 8), ("target_position", 3), ("goal_position", 3)):
                observed[name] = np.zeros((frames, width), np.float32)
