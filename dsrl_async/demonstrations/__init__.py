"""Demonstrations in files that somebody else may have made: what a run takes from them, whatever their layout."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

from dsrl_async.config.files import how_to_install
from dsrl_async.demonstrations.episode import Demonstration, Wanted
from dsrl_async.demonstrations.lerobot_info import INFO, read_info

__all__ = ["Demonstration", "Wanted", "read"]


def read(path: Path, wanted: Wanted) -> Iterator[Demonstration]:
    """Yield the demonstrations of a file, of the layout that its name's ending says, or of a directory.

    What one of them gives can be used until the next is asked for. Raises ValueError with one sentence that names the
    file, for whatever is wrong with it.
    """
    if (path / INFO).exists():
        info = read_info(path, wanted)
        _require("pyarrow", path)
        if any(camera.is_video for camera in info.cameras):
            _require("av", path)
        from dsrl_async.demonstrations import lerobot

        yield from lerobot.read(info, wanted)
    elif path.suffix == ".safetensors":
        from dsrl_async.demonstrations import recorded

        yield from recorded.read(path, wanted)
    elif path.suffix in (".hdf5", ".h5"):
        _require("h5py", path)
        from dsrl_async.demonstrations import libero

        yield from libero.read(path, wanted)
    else:
        raise ValueError(
            f"{path} must end in .hdf5 (LIBERO's layout) or .safetensors (what "
            "dsrl_async.pretraining.make_tabletop_demonstrations writes), or be the directory of a LeRobotDataset, "
            f"which has {INFO}"
        )


def _require(library: str, path: Path) -> None:
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise ValueError(
            f"{path} is read with {library}, which is not installed; {how_to_install('demonstrations')}"
        ) from error
