"""Demonstrations in HDF5 with anything in them: accepted, or refused in one sentence (support/fuzzing.py).

Children read many files each. The library in C never comes back from some and crashes over others; these are read once
more as the program reads them, which has to survive it.
"""

from __future__ import annotations

import multiprocessing
import random
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from support.demonstrations import write_file
from support.fuzzing import EXAMPLES, RESULTS, changed, judged

from dsrl_async.demonstrations import hdf5
from dsrl_async.pretraining import libero

FORK = multiprocessing.get_context("fork")
PATIENCE_S = 5.0
WORDS = [
    *(
        b"\x00" * 8,
        b"\xff" * 8,
        b"\x01\x00\x00\x00",
        b"TREE",
        b"HEAP",
        b"SNOD",
        b"GCOL",
        b"OHDR",
        b"demo_0",
        b"actions",
    ),
    *(np.full(8, value, "<f4").tobytes() for value in (np.nan, np.inf, 1e30)),
    *(number.to_bytes(8, "little") for number in (7, 8, 96, 800, 2048, 2**31, 2**40, 2**63)),
]


def read_many(file: Path, original: bytes, seeds: range, sender: Connection) -> None:
    """Reads a changed file for each seed, and sends the seed before, and what was wrong with the reader after it."""
    hdf5._problem = lambda *_: None  # type: ignore[assignment]  # this process is the one that may hang
    file.write_bytes(original)
    libero.read_frames(file.parent, 8, 1, Console(quiet=True))  # which imports modules the first time
    for seed in seeds:
        file.write_bytes(changed(original, random.Random(seed), WORDS))
        sender.send(seed)
        try:
            with judged("demonstrations", file.parent, names=str(file)):
                frames = libero.read_frames(file.parent, 8, 1, Console(quiet=True))
                assert bool(frames.action.isfinite().all())
        except BaseException as error:
            sender.send(f"seed {seed}: {type(error).__name__}: {error}")
    sender.send(dict(RESULTS))


def test_demonstrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a_demo.hdf5"
    write_file(file)
    original = file.read_bytes()
    monkeypatch.setattr(hdf5, "SECONDS", 3.0)
    complaints, begin, survived = [], 0, 0
    while begin < EXAMPLES:
        receiver, sender = FORK.Pipe(duplex=False)
        seeds = range(begin, EXAMPLES)
        child = FORK.Process(target=read_many, args=(file, original, seeds, sender), daemon=True)
        child.start()
        sender.close()
        try:
            while receiver.poll(PATIENCE_S):
                said = receiver.recv()
                if isinstance(said, dict):
                    RESULTS.update(said)
                    begin = EXAMPLES
                    break
                if isinstance(said, str):
                    complaints.append(said)
                else:
                    begin = said
            else:
                raise EOFError  # it does not come back
        except EOFError:
            child.kill()
            child.join()
            with pytest.raises(ValueError, match=r"it is damaged|cannot be used"):
                libero.read_frames(tmp_path, 8, 1, Console(quiet=True))
            survived, begin = survived + 1, begin + 1
        finally:
            child.kill()
            child.join()
            receiver.close()
    print(f"{EXAMPLES} files, {survived} over which the library hung or crashed; the last child: {dict(RESULTS)}")
    assert not complaints, complaints[:5]
