"""The pool of environment workers: what goes wrong is one sentence, and nothing is left behind in any case."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsrl_async.config.load import validate
from dsrl_async.envs import environment_spec
from dsrl_async.host import processes
from dsrl_async.host.processes import Program
from dsrl_async.run.worker.pool import WorkerLost, WorkerPool, check_alive
from dsrl_async.shm import events
from dsrl_async.shm.memory import run_fields

PR_GET_CHILD_SUBREAPER = 37
PROGRAM = """
import os, signal, time
from dsrl_async.shm import events
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters
from dsrl_async.shm.slots import Slots

def prepare(job):
    fault, fork, template, forks = job["fault"], os.fork, os.getpid(), []
    if fault == "the template ends":
        print("no scene")
        os._exit(3)
    if fault == "the template crashes":
        os.kill(template, signal.SIGSEGV)
    if fault == "the template hangs":
        time.sleep(1000)
    def faulty_fork():
        if os.getpid() == template:
            forks.append(1)
            if fault == "the template is killed between two forks" and len(forks) == 2:
                os.kill(template, signal.SIGKILL)
            if fault == "forks are slow":
                time.sleep(0.3)
        elif fault == "no forks":
            raise BlockingIOError("the limit of processes is reached")
        return fork()
    os.fork = faulty_fork

def main(job, prepared):
    lane, fault = job["number"], job["fault"] if job["number"] == 1 else ""
    arena = Arena.attach(job["arena"])
    if fault == "a worker fails":
        raise ValueError("no such\\nscene is known")
    if fault == "a worker is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "a worker hangs":
        time.sleep(1000)
    Slots(arena).request(lane, job["incarnation"], 1)
    events.notify(job["notify_fds"][0])
    while not events.wait(job["wake_fd"], 0.05):
        Counters(arena).actor_heartbeat_ns[lane] = time.monotonic_ns()
"""


def open_files() -> list[str]:
    """What the open descriptors of this process are, except for the one that lists them."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except OSError:
            continue
    return sorted(found)


def processes_of(mark: str) -> list[psutil.Process]:
    """All other processes, whosever children they are, that were started with `mark` in their environment's path."""
    return [
        found
        for found in psutil.process_iter(["environ"])
        if mark in (found.info["environ"] or {}).get("PYTHONPATH", "") and found.pid != os.getpid()
    ]


@pytest.fixture
def pool_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., WorkerPool]]:
    """Makes pools of three workers with a fault, and looks afterwards at what is left of them."""
    (tmp_path / "acts.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gc.collect()  # what tests before have left
    children, files, memory = psutil.Process().children(), open_files(), mapped_memory()

    def pool_of(fault: str = "", heartbeat_timeout_s: float = 60.0, **options: Any) -> WorkerPool:
        config = validate({"actors": 3, "heartbeat_timeout_s": heartbeat_timeout_s})
        fields = run_fields(config, environment_spec(config.env.model_dump()), config.env.chunk)
        program = Program("acts", {"fault": fault, "mark": str(tmp_path)})
        return WorkerPool(config, fields, program=program, **options)

    yield pool_of
    gc.collect()  # what an exception still holds
    assert psutil.Process().children() == children
    assert processes_of(str(tmp_path)) == []
    assert open_files() == files
    assert mapped_memory() == memory
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("acts.py", "__pycache__")] == []
    takes_orphans = ctypes.c_int()
    assert ctypes.CDLL(None).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(takes_orphans)) == 0
    assert takes_orphans.value == 0


def mapped_memory() -> int:
    """How many pieces of shared memory this process has mapped."""
    return Path("/proc/self/maps").read_text().count("memfd:dsrl_async")


def start(pool: WorkerPool) -> None:
    pool.await_template()
    pool.fork_workers()
    pool.await_observations()


def test_workers_start_play_and_end(pool_of: Callable[..., WorkerPool], tmp_path: Path) -> None:
    looks: list[float] = []
    with pool_of(meanwhile=lambda: looks.append(time.monotonic())) as pool:
        start(pool)
        found = [psutil.Process(pid) for pid in pool.pids]
        assert len(processes_of(str(tmp_path))) == 4
        assert [process.name() for process in found] == ["template", "actor-000", "actor-001", "actor-002"]
        titles = [process.cmdline()[0] for process in found]
        of_workers = [f"dsrl_async: environment worker {number}" for number in ("000", "001", "002")]
        assert titles == ["dsrl_async: template of the environment workers", *of_workers]
        pool.end_template()
        assert not psutil.pid_exists(pool.pids[0])
        for lane in range(3):
            pool.check(lane)
        for fd in pool.wake_fds:
            events.notify(fd)
        pool.await_end()
        assert [worker.returncode for worker in pool.workers] == [0, 0, 0]
    assert len(looks) > 3  # as long as the template imports


@pytest.mark.parametrize(
    ("fault", "options", "kind", "sentence"),
    [
        ("the template ends", {}, RuntimeError, r"the environment workers' template ended \(exit code 3\): no scene"),
        ("the template crashes", {}, WorkerLost, r"the environment workers' template ended \(killed by SIGSEGV\)"),
        (
            "the template hangs",
            {"heartbeat_timeout_s": 1.5},
            WorkerLost,
            "the environment workers' template has given no sign of life for 2 s",
        ),
        (
            "the template hangs",
            {"start_limit_s": 0.5},
            RuntimeError,
            r"the environment workers' template was not ready within 0\.5 s",
        ),
        (
            "no forks",
            {},
            RuntimeError,
            "the template of the environment workers is of no use: no process could be made.*the limit .* is reached",
        ),
        (
            "the template is killed between two forks",
            {},
            RuntimeError,
            "the template of the environment workers is of no use: it .*",
        ),
        ("a worker fails", {}, RuntimeError, r"environment process 1 ended \(exit code 1\): scene is known"),
        ("a worker is killed", {}, WorkerLost, r"environment process 1 ended \(killed by SIGKILL\)"),
        (
            "a worker hangs",
            {"heartbeat_timeout_s": 1.5},
            WorkerLost,
            "environment process 1 has given no sign of life for 2 s",
        ),
        ("a worker hangs", {"start_limit_s": 3.0}, RuntimeError, "an environment worker was not ready within 3 s"),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    pool_of: Callable[..., WorkerPool], fault: str, options: dict[str, Any], kind: type[RuntimeError], sentence: str
) -> None:
    with pytest.raises(RuntimeError, match=f"^{sentence}$") as caught, pool_of(fault, **options) as pool:
        start(pool)
    assert caught.type is kind


def test_an_exception_inside_ends_the_workers(pool_of: Callable[..., WorkerPool]) -> None:
    def broken(pool: WorkerPool) -> None:
        start(pool)
        raise KeyError(len(pool.workers))

    with pytest.raises(KeyError, match="3"), pool_of() as pool:
        broken(pool)


class Interrupt:
    """Raises KeyboardInterrupt when it is called for the `last` time."""

    def __init__(self, last: int) -> None:
        self.left = last

    def __call__(self) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_an_interrupt_while_the_template_prepares(pool_of: Callable[..., WorkerPool]) -> None:
    with pytest.raises(KeyboardInterrupt), pool_of("the template hangs", meanwhile=Interrupt(30)) as pool:
        start(pool)


def test_an_interrupt_while_a_worker_is_forked_ends_it_too(pool_of: Callable[..., WorkerPool]) -> None:
    interrupt = Interrupt(0)
    with pool_of("forks are slow", meanwhile=interrupt) as pool:
        pool.await_template()
        interrupt.left = 1
        with pytest.raises(KeyboardInterrupt):
            pool.fork_workers()
        assert pool.workers == []


def test_what_cannot_be_started_leaves_nothing(
    pool_of: Callable[..., WorkerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*arguments: Any, **options: Any) -> None:
        raise BlockingIOError("no further process")

    with monkeypatch.context() as patched:
        patched.setattr(processes, "start", start)
        with pytest.raises(BlockingIOError, match="no further process"), pool_of():
            pass


def test_an_environment_process_that_hangs_or_ends_is_reported(tmp_path: Path) -> None:
    log = tmp_path / "actor-000.log"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        check_alive("process 0", process, 10.0, 60.0, log)
        with pytest.raises(RuntimeError, match=r"process 0 has given no sign of life for 9\d s"):
            check_alive("process 0", process, 90.0, 60.0, log)
        process.communicate(b"\n")
        log.write_text("something\nno more memory\n")
        with pytest.raises(RuntimeError, match=r"process 0 ended \(exit code 0\): no more memory"):
            check_alive("process 0", process, 0.0, 60.0, log)
