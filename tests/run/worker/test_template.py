"""The process that actors are forked from, and its children, which belong to the process that asked for them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dsrl_async.host.processes import Program, wait_all
from dsrl_async.run.worker.template import Template
from dsrl_async.shm import events
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import counter_fields

PROGRAM = """
import os, time
memory = []
def prepare(job):
    if job["fault"] == "prepare":
        raise RuntimeError("no scene")
    if job["fault"] == "fork":
        fork, calls = os.fork, []
        def once():
            calls.append(1)
            if len(calls) == 2:
                raise BlockingIOError("the limit of processes is reached")
            return fork()
        os.fork = once
    print("preparing")
    memory.append(bytearray(os.urandom(1 << 20) * 100))
    return "prepared"
def main(job, prepared):
    print("actor", job["number"], job["incarnation"], prepared)
    if job["number"] == 0:
        raise ValueError("something\\nis wrong")
    if job["number"] == 1:
        os.eventfd_write(job["notify_fds"][0], 7)
    if job["number"] == 2:
        time.sleep(1000)
"""


@pytest.fixture
def template_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Template]]:
    (tmp_path / "acts.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # what is buffered must not be printed by every actor
    arena, found = Arena.create(counter_fields(3)), []
    wake, notify = [events.create() for _ in range(3)], events.create()

    def start(fault: str = "") -> Template:
        program = Program("acts", {"fault": fault})
        template = Template(arena, 0, {}, wake, [notify], tmp_path / "template.log", program=program)
        found.append(template)
        deadline = time.monotonic() + 60
        while not template.prepared:
            assert time.monotonic() < deadline
            assert template.popen.poll() is None, (tmp_path / "template.log").read_text()
            time.sleep(0.01)
        return template

    start.notified = lambda: events.wait(notify, 20.0)  # type: ignore[attr-defined]
    yield start
    for template in found:
        template.close()
    events.close([*wake, notify])
    arena.close()


def test_actors_are_our_children_and_share_what_was_prepared(
    template_of: Callable[..., Template], tmp_path: Path
) -> None:
    template = template_of()
    logs = [tmp_path / f"{lane}.log" for lane in range(3)]
    actors = [template.fork(lane, 5, log, lambda: None) for lane, log in enumerate(logs)]
    assert {child.pid for child in psutil.Process().children()} >= {actor.pid for actor in actors[2:]}
    assert [actor.wait(20) for actor in actors[:2]] == [1, 0]
    assert template_of.notified()  # type: ignore[attr-defined]
    assert logs[1].read_text() == "actor 1 5 prepared\n"
    assert logs[0].read_text().strip().endswith("is wrong")
    sleeper = psutil.Process(actors[2].pid)
    assert sleeper.name() == "actor-002"
    assert sleeper.memory_info().rss > 100e6 > 5 * sleeper.memory_full_info().uss
    assert actors[2].poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        actors[2].wait(0.05)
    template.close()
    assert template.popen.returncode == 0
    assert sleeper.is_running()
    actors[2].kill()
    assert wait_all(actors, time.monotonic() + 20)
    assert actors[2].returncode == -9


def test_actors_meet_what_the_template_could_not_prepare(template_of: Callable[..., Template], tmp_path: Path) -> None:
    assert template_of("prepare").fork(1, 1, tmp_path / "log", lambda: None).wait(20) == 0
    assert (tmp_path / "log").read_text() == "actor 1 1 None\n"
    assert "no scene" in (tmp_path / "template.log").read_text()


def test_a_dead_template_is_an_error(template_of: Callable[..., Template], tmp_path: Path) -> None:
    template = template_of()
    template.popen.kill()
    template.popen.wait()
    with pytest.raises(RuntimeError, match="template of the environment workers"):
        template.fork(1, 1, tmp_path / "log", lambda: None)


def test_a_process_that_cannot_be_made_is_an_error_at_once(
    template_of: Callable[..., Template], tmp_path: Path
) -> None:
    template = template_of("fork")
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="no process could be made"):
        template.fork(1, 1, tmp_path / "log", lambda: None)
    assert time.monotonic() - begin < 20
    assert template.problem is not None
    assert template.forked == 0


def test_actors_end_with_the_process_that_asked_for_them(tmp_path: Path) -> None:
    (tmp_path / "acts.py").write_text(PROGRAM)
    code = f"""
import os, sys, time
sys.path.insert(0, {str(tmp_path)!r})
os.environ["PYTHONPATH"] = {str(tmp_path)!r} + os.pathsep + os.environ.get("PYTHONPATH", "")
from pathlib import Path
from dsrl_async.host.processes import Program
from dsrl_async.shm import events
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import counter_fields
from dsrl_async.run.worker.template import Template
log = Path({str(tmp_path)!r}) / "log"
wake = [events.create() for _ in range(3)]
program = Program("acts", {{"fault": ""}})
template = Template(Arena.create(counter_fields(3)), 0, {{}}, wake, [events.create()], log, program=program)
while not template.prepared:
    time.sleep(0.01)
print(template.fork(2, 1, log, lambda: None).pid, template.popen.pid, flush=True)
time.sleep(1000)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    started = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
    assert len(started) == 2
    owner.kill()
    owner.communicate()
    assert psutil.wait_procs(started, timeout=10)[1] == []
