"""Demonstrations in files that somebody else may have made: what a run takes from them, whatever their layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dsrl_async.demonstrations.episode import Demonstration, Wanted

__all__ = ["Demonstration", "Wanted", "read"]


def read(path: Path, wanted: Wanted) -> Iterator[Demonstration]:
    """Yield the demonstrations of a file, of the layout that its name's ending says.

    What one of them gives can be used until the next is asked for. Raises ValueError with one sentence that names the
    file, for whatever is wrong with it.
    """
    if path.suffix == ".safetensors":
        from dsrl_async.demonstrations import recorded

        yield from recorded.read(path, wanted)
    elif path.suffix in (".hdf5", ".h5"):
        try:
            import h5py  # noqa: F401
        except ImportError as error:
            raise ValueError(f"{path} is read with h5py, which is not installed: pip install h5py") from error
        from dsrl_async.demonstrations import libero

        yield from libero.read(path, wanted)
    elif (path / "meta" / "info.json").exists():
        raise ValueError(
            f"{path} is a LeRobotDataset, which is not read yet; supported are LIBERO's HDF5 and what "
            "dsrl_async.pretraining.make_tabletop_demonstrations writes"
        )
    else:
        raise ValueError(
            f"{path} must end in .hdf5 (LIBERO's layout) or .safetensors (what "
            "dsrl_async.pretraining.make_tabletop_demonstrations writes)"
        )
