"""Where groups run on one machine: their processes, variables, cores, and how they end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from dsrl_async.groups import placing
from dsrl_async.groups.placing import Ended, LocalPlacement, Placed, cores_of

MEMBER = """
import json, os, signal, sys, time
job = json.load(sys.stdin)
variables = [os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "MUJOCO_EGL_DEVICE_ID")]
print(json.dumps([*variables, sys.argv]), flush=True)
if job["end"] is not None:
    print("this group has no sugar", flush=True)
    sys.exit(job["end"])
signal.signal(signal.SIGTERM, signal.SIG_DFL if job["heeds"] else signal.SIG_IGN)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def short_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group's process that only prints what it is given."""
    (tmp_path / "short_member.py").write_text(MEMBER)
    monkeypatch.setattr(placing, "MEMBER", "short_member")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
    monkeypatch.setattr(placing, "END_S", 1.0)


def job(run_dir: Path, end: int | None = None, heeds: bool = True) -> dict[str, object]:
    return {"run_dir": str(run_dir), "end": end, "heeds": heeds, "secret": "s3cret" * 20_000}


def wait_for(placement: LocalPlacement, kind: type, seconds: float = 20.0) -> list[Placed | Ended]:
    found: list[Placed | Ended] = []
    until = time.monotonic() + seconds
    while not any(isinstance(event, kind) for event in found):
        assert time.monotonic() < until
        found += placement.poll()
        time.sleep(0.01)
    return found


def test_a_group_gets_its_gpus_and_its_end_is_told_in_words(tmp_path: Path) -> None:
    placement = LocalPlacement(2, [["0", "1"], ["2", "3"]])
    placement.start(1, 7, job(tmp_path / "1", end=3))
    placed, ended = wait_for(placement, Ended)
    assert placed == Placed(1, 7, "this machine, GPU 2, 3")
    assert ended == Ended(1, 7, "exit code 3: this group has no sugar", fatal=True)
    log = (tmp_path / "1" / placing.LOG).read_text()
    assert log.startswith('["2,3", "2", ["')
    assert "s3cret" not in log  # neither an argument nor a variable has it


@pytest.mark.parametrize("heeds", [True, False])
def test_all_groups_end_within_seconds(heeds: bool, tmp_path: Path) -> None:
    placement = LocalPlacement(2)
    for group in range(2):
        placement.start(group, 1, job(tmp_path / str(group), heeds=heeds))
    until = time.monotonic() + 20
    while not all((tmp_path / str(group) / placing.LOG).read_text() for group in range(2)):
        assert time.monotonic() < until
        time.sleep(0.01)
    begin = time.monotonic()
    placement.close()
    assert time.monotonic() - begin < 5
    signals = {signal.SIGTERM} if heeds else {signal.SIGKILL}
    assert {event.how for event in placement.poll() if isinstance(event, Ended)} == {
        f"killed by {number.name}" for number in signals
    }


def test_a_group_that_is_killed_can_be_started_again(tmp_path: Path) -> None:
    placement = LocalPlacement(1)
    placement.start(0, 1, job(tmp_path))
    placement.end(0)
    assert wait_for(placement, Ended)[-1] == Ended(0, 1, "killed by SIGKILL")
    placement.start(0, 2, job(tmp_path, end=0))
    assert wait_for(placement, Ended)[-1] == Ended(0, 2, "exit code 0: this group has no sugar")
    placement.end(0)  # there is nothing to end
    placement.close()


def test_cores_are_shared_out_where_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(1, 8)))
    assert cores_of(3) == [[1, 2], [3, 4], [5, 6, 7]]
    assert cores_of(4) == []
