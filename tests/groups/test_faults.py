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

import pytest
from support.group_faults import ACTORS, GROUPS, MINE, VICTIMS, Fault, GroupRun

FAULTS = int(os.environ.get("DSRL_GROUP_FAULTS", "0"))
FAULTS_PER_RUN = 10


@pytest.fixture
def directory() -> Iterator[Path]:
    """With a short name, since there will be sockets in it."""
    path = Path(tempfile.mkdtemp(prefix="dsrl_groups-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.alone
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
