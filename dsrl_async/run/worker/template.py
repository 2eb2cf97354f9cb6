"""The process that environment workers are forked from: it does once what all of them would do when they start.

That is the imports, and compiling the scene if a run or an evaluation has only one task (`worker.prepare`): seconds and
hundreds of megabytes with LIBERO. A forked worker shares that memory with the others as long as nobody writes to it. It
only has to set up OpenGL, which does not survive a fork.

A worker is a child of the process that asked for it, as if that had started it: the template forks twice, the process
in between ends, and the kernel gives the orphan to its nearest ancestor that takes such in (`PR_SET_CHILD_SUBREAPER`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dsrl_async.host import processes
from dsrl_async.host.logs import open_log
from dsrl_async.host.processes import Program
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters, Start

PR_SET_CHILD_SUBREAPER = 36
FORK_S = 30.0  # until a forked worker has told its process number; one that died before that never will
BEAT_S = 1.0
WAIT_POLL_S, FORK_POLL_S = 0.005, 0.05
CLOSE_S = 1.0  # a template that waits for requests answers and ends at once
REQUEST_BYTES = 1 << 16
TITLES = {"actor": "environment worker", "evaluation": "environment worker of the evaluation"}
WORKER = Program("dsrl_async.run.worker.worker")
"""What an environment worker runs, unless a benchmark says otherwise."""


class TemplateError(RuntimeError):
    """The template cannot start a worker, and will not start any other; the error is one sentence."""


class Forked:
    """A child that the template has forked, with the part of `subprocess.Popen` that is used here."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        """None while the child runs, and negative if a signal ended it, as in a Popen."""

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; raise subprocess.TimeoutExpired if the child still runs after `timeout` seconds."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(WAIT_POLL_S)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Template:
    """The template, as the process that owns its workers sees it. It is asked for one worker at a time.

    Args:
        arena: the shared memory.
        seed: the seed of the run or the evaluation.
        env_config: the environment's settings, as `EnvConfig.model_dump()` returns them.
        wake_fds: for each lane, the event on which its worker waits for answers.
        notify_fds: the events that a worker sets when it has an observation.
        log: the file to which the template's output is appended.
        incarnation: how many templates this run has had, this one included.
        evaluation: makes the workers of some lanes play the episodes that they are given (`shm.assignments`) and then
            end: {"from_lane": the first of them, "video_dir": directory of films or None, "rate_hz": frames per second
            of the films, "preview": whether a GIF is made of each, "begin_with": number of the episode whose scene is
            compiled before any worker is forked, or None}.
        program: what a worker runs: a module with `prepare` and `main` as in `worker`.
        step_discount: the discount of a step within a decision, see `worker.Lane`.
        agent_cameras: the numbers of the cameras that the agent sees.

    Attributes:
        popen: the template's process.
        forked: the number of workers that it has started.
        problem: why it is of no use any more, or None.

    Raises OSError if there can be no further process.
    """

    def __init__(
        self,
        arena: Arena,
        seed: int,
        env_config: Mapping[str, Any],
        wake_fds: Iterable[int],
        notify_fds: Iterable[int],
        log: Path,
        incarnation: int = 1,
        evaluation: Mapping[str, Any] | None = None,
        program: processes.Program = WORKER,
        step_discount: float = 1.0,
        agent_cameras: Sequence[int] = (0,),
    ) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it was inherited as ignored, nobody could be waited for
        self.forked = 0
        self.problem: str | None = None
        self._asked: float | None = None  # time.monotonic of the request that is not answered yet
        self._counters, self._incarnation, self._wake_fds = Counters(arena), incarnation, list(wake_fds)
        self._connection, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        job = {
            "program": program.module,
            "arena": arena.describe(),
            "seed": seed,
            "env": env_config,
            "agent_cameras": list(agent_cameras),
            "notify_fds": list(notify_fds),
            "evaluation": evaluation,
            "step_discount": step_discount,
            "socket_fd": child.fileno(),
            "incarnation": incarnation,
            **program.settings,
        }
        fds = [arena.fd, child.fileno(), *self._wake_fds, *notify_fds]
        try:
            with child:
                self.popen = processes.start("dsrl_async.run.worker.template", job, fds, log, threads=1)
        except BaseException:
            self._connection.close()
            raise

    @property
    def prepared(self) -> bool:
        """Whether it is ready to fork workers."""
        return int(self._counters.template_prepared[0]) == self._incarnation

    def ask(self, number: int, incarnation: int, log: Path, name: str | None = None) -> None:
        """Ask for the worker of lane `number`, which appends its output to `log`; `answer` must be called for it.

        Its process has the given name, by default `actor-000` for lane 0.

        Raises TemplateError.
        """
        assert self._asked is None
        request = {
            "number": number,
            "name": name or f"actor-{number:03d}",
            "incarnation": incarnation,
            "wake_fd": self._wake_fds[number],
            "log": str(log),
        }
        if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1) != 0:
            self._fail("this system gives no process its orphaned descendants (PR_SET_CHILD_SUBREAPER)")
        try:
            self._connection.send(json.dumps(request).encode())
        except OSError as error:
            self._fail(f"it takes no request: {error}")
        self._asked = time.monotonic()

    def answer(self, wait_s: float = 0.0, last: bool = False) -> Forked | None:
        """Return the worker that was asked for, or None if it is not there after `wait_s` seconds.

        Raises TemplateError if there will be none. So it does with `last`, which says that nobody will ask again: a
        worker that is not there yet then ends by itself.
        """
        assert self._asked is not None
        if last or time.monotonic() - self._asked > FORK_S:
            last = True
            self._connection.shutdown(socket.SHUT_RD)  # what is sent from now on is an error there
        self._connection.settimeout(max(wait_s, 0.001))
        try:
            answer = self._connection.recv(REQUEST_BYTES)
        except TimeoutError:
            return None
        except OSError as error:
            self._fail(str(error))
        if not answer.isdigit():
            self._fail(answer.decode() or (f"no answer within {FORK_S:g} s" if last else "it has ended"))
        self._asked = None
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0)  # other orphans are not ours
        self.forked += 1
        return Forked(int(answer))

    def fork(self, number: int, incarnation: int, log: Path, meanwhile: Callable[[], object]) -> Forked:
        """Ask for a worker and wait for it; `meanwhile` is called now and then, and may raise. Raises TemplateError."""
        self.ask(number, incarnation, log)
        while (worker := self.answer(FORK_POLL_S)) is None:
            meanwhile()
        return worker

    def _fail(self, problem: str) -> NoReturn:
        self._connection.close()
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0)
        self.problem = f"it could not start an environment worker: {problem}"
        raise TemplateError(f"the template of the environment workers is of no use: {problem}")

    def close(self) -> None:
        """End the template; its workers live on, but for one that was asked for and not taken."""
        if self._asked is not None and self.problem is None:
            with contextlib.suppress(TemplateError):
                if (worker := self.answer(CLOSE_S) or self.answer(last=True)) is not None:
                    processes.kill_all([worker])
        self._connection.close()
        if not self.prepared or not processes.wait_all([self.popen], time.monotonic() + CLOSE_S):
            processes.kill_all([self.popen])


def main(argument: str) -> None:
    """Run the template as a process; `argument` is the JSON that `Template` wrote."""
    job = json.loads(argument)
    processes.prepare_child(job["parent"])
    processes.name_process("template", "template of the environment workers")
    counters = Counters(Arena.attach(job["arena"]))
    counters.template_heartbeat_ns[0] = time.monotonic_ns()  # so that a scene which hangs is noticed
    counters.note_start(Start.LOADING, counters.template_start)
    program = importlib.import_module(job["program"])
    counters.note_start(Start.PREPARING, counters.template_start)
    prepared = None
    try:
        prepared = program.prepare(job)
    except Exception:
        traceback.print_exc()  # each worker meets the same error, and ends with it
    gc.collect()
    gc.freeze()  # a later collection would write to memory that the workers share
    connection = socket.socket(fileno=job["socket_fd"])
    counters.template_prepared[0] = job["incarnation"]
    asked = select.poll()
    asked.register(connection, select.POLLIN)
    while True:
        counters.template_heartbeat_ns[0] = time.monotonic_ns()
        if not asked.poll(BEAT_S * 1000):
            continue
        asking = connection.recv(REQUEST_BYTES)
        if not asking:  # the owner has closed the connection
            return
        between = os.fork()
        if between == 0:
            code = 1
            try:
                between = os.getpid()
                if os.fork() == 0:
                    _be_worker(program.main, job | json.loads(asking), prepared, connection, between)
                code = 0
            except OSError:
                traceback.print_exc()
            finally:
                os._exit(code)
        if os.waitpid(between, 0)[1] != 0:
            connection.send(b"no process could be made; is there memory, and is the limit of processes reached?")


def _be_worker(
    run: Callable[[dict[str, Any], Any], None],
    job: dict[str, Any],
    prepared: Any,
    connection: socket.socket,
    between: int,
) -> None:
    """Run a worker in this process, which was forked for it; never return."""
    code = 1
    try:
        while os.getppid() == between:
            time.sleep(0.001)
        processes.prepare_child(job["parent"])
        kind, _, number = job["name"].partition("-")
        processes.name_process(job["name"], f"{TITLES[kind]} {number}")
        connection.send(str(os.getpid()).encode())  # before anything that may fail, and by the only one who knows
        connection.close()
        output = open_log(Path(job["log"]))
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        run(job, prepared)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
