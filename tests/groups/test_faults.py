"""Runs with groups of real processes, of which any may be killed: no row is missing, repeated or torn, none is left.

The variable DSRL_GROUP_FAULTS=N asks for the long matrix, of N faults; its table is docs/measurements/groups.md's.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.counting import pictures
from support.group_faults import ACTORS, GROUPS, MINE, VICTIMS, Fault, GroupRun, check_lane

FAULTS = int(os.environ.get("DSRL_GROUP_FAULTS", "0"))
FAULTS_PER_RUN = 10


@pytest.fixture
def directory() -> Iterator[Path]:
    """With a short name, since there will be sockets in it."""
    path = Path(tempfile.mkdtemp(prefix="dsrl_groups-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_all_kinds_of_processes_killed_at_once(directory: Path) -> None:
    run = GroupRun(directory)
    run.wait_working()
    assert run.figures()["processes"].keys() >= {"learner", "downlink", "supervisor"}
    for victim in ("actor", "uplink", "inference", *MINE):
        run.hit(victim, 0)
    run.hit("group", 1)
    run.wait_working()
    summary = run.end()
    assert summary["returncode"] == 0, summary["stderr"]
    assert summary["exit_reason"] == "terminated"
    assert summary["restarts"] == {"downlink": 1, "learner": 1, "group": 1}
    first, second = summary["groups"]
    assert {kind: first["restarts"][kind] for kind in ("actor", "uplink", "inference")} == {
        "actor": 1,
        "uplink": 1,
        "inference": 1,
    }
    assert not any(second["restarts"].values())
    assert run.check(summary) > GROUPS * ACTORS * 10
    assert run.left_over() == []


def lane_of(*environments: tuple[int, int]) -> dict[str, np.ndarray]:
    """The rows that environments leave in lane 1 of group 1: of each the mark, and how many observations it made."""
    mark = np.concatenate([np.full(count, mark) for mark, count in environments])
    count = np.concatenate([np.arange(count) for _, count in environments])
    state = np.zeros((len(mark), 8), np.float32)
    state[:, :4] = np.stack([np.ones_like(mark), np.ones_like(mark), mark, count], axis=-1)
    image = np.repeat(count % 256, 64 * 64 * 3).astype(np.uint8).reshape(len(mark), -1)
    image[:, :8] = pictures(*state[:, :4].astype(np.int64).T)
    complete = np.append(mark[1:] == mark[:-1], False)
    return {"state": state, "image": image, "complete": complete}


def test_rows_that_are_missing_repeated_or_torn_are_found() -> None:
    whole, ended = lane_of((1001, 40), (1002, 30), (2001, 20)), {(1, 1, 1002): 30, (1, 1, 2001): 20}
    check_lane(whole, 1, 1, ended)
    rows = np.arange(90)
    faults = {
        "missing": np.delete(rows, 55),
        "the last one missing": rows[:-1],
        "the first one missing": rows[1:],
        "the first one of another environment missing": np.delete(rows, 40),
        "the last one of another environment missing": np.delete(rows, 69),
        "repeated": np.insert(rows, 20, 20),
        "in another order": np.r_[rows[:10], 11, 10, rows[12:]],
        "of an older environment": np.r_[rows[:80], 60, rows[80:]],
    }
    for chosen in faults.values():
        with pytest.raises(AssertionError):
            check_lane({column: values[chosen] for column, values in whole.items()}, 1, 1, ended)
    torn = {column: values.copy() for column, values in whole.items()}
    torn["image"][33] = torn["image"][34]
    with pytest.raises(AssertionError):
        check_lane(torn, 1, 1, ended)


def matrix() -> Iterator[tuple[str, int, int, float]]:
    """Victim, group, how many times in a row, and for how many seconds it is stopped instead."""
    while True:
        for times, seconds in ((1, 0.0), (2, 0.0), (1, 4.0)):
            for index, victim in enumerate(VICTIMS):
                yield victim, index % GROUPS, times, seconds


@pytest.mark.skipif(FAULTS == 0, reason="long: DSRL_GROUP_FAULTS=N")
@pytest.mark.timeout(24 * 3600)
def test_matrix_of_faults() -> None:
    planned, rows = matrix(), 0
    faults: list[Fault] = []
    while len(faults) < FAULTS:
        directory = Path(tempfile.mkdtemp(prefix="dsrl_groups-", dir="/tmp"))
        run = GroupRun(directory)
        run.wait_working()
        for _ in range(min(FAULTS_PER_RUN, FAULTS - len(faults))):
            victim, group, times, seconds = next(planned)
            run.fault(victim, group, times, seconds)
            print(run.faults[-1], flush=True)
        summary = run.end()
        assert summary["returncode"] == 0, summary["stderr"]
        rows += run.check(summary)
        assert run.left_over() == []
        faults += run.faults
        shutil.rmtree(directory)
        print(f"{len(faults)} faults, {rows} rows", flush=True)
    print(table(faults), f"{rows:,} rows checked", sep="\n")


def table(faults: list[Fault]) -> str:
    """A table in Markdown."""
    lines = ["| process | fault | times | all go on after, median and longest |", "|---|---|---|---|"]
    for key in sorted({fault[:2] for fault in faults}):
        seconds = [fault.recovered_s for fault in faults if fault[:2] == key]
        took = f"{statistics.median(seconds):.1f} s, {max(seconds):.1f} s"
        lines.append(f"| {key[0]} | {key[1]} | {len(seconds)} | {took} |")
    return "\n".join(lines)
