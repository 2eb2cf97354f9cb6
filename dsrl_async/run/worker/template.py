"""The process that actors are forked from: what all of them would do when they start is done in it, once.

That is imports, and compiling the scene of the only task of a run or an evaluation (`worker.prepare`): seconds and
hundreds of megabytes with LIBERO. A forked actor shares that memory with the others, as far as nobody writes to it, and
takes the time that OpenGL takes, which does not survive a fork.

An actor is a child of the launched process, as if that had started it: the template forks twice, the process in between
ends, and the kernel gives the orphan to its nearest ancestor that asked for such (`PR_SET_CHILD_SUBREAPER`).
"""

from __future__ import annotations

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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from dsrl_async.host import processes
from dsrl_async.host.processes import Program
from dsrl_async.shm.arena import Arena
from dsrl_async.shm.counters import Counters

PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 15, 36
FORK_S = 30.0  # until a forked actor has told its number; an actor that died before that never will
BEAT_S = 1.0
WAIT_POLL_S, FORK_POLL_S = 0.005, 0.05
CLOSE_S = 1.0  # a template that waits for requests ends at once
REQUEST_BYTES = 1 << 16
WORKER = Program("dsrl_async.run.worker.worker")
"""What an environment worker runs, unless a benchmark says otherwise."""


class Forked:
    """A child that was forked by the template, with what is used of a `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        """As of a Popen: None while it runs, negative for a signal."""

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired if it still runs after `timeout` seconds."""
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
    """The template of a run's actors, in the process that owns them. One actor is asked for at a time.

    Args:
        arena: the run's shared memory.
        seed: of the run.
        env_config: as from `EnvConfig.model_dump()`.
        wake_fds: of each actor, on which it waits for answers.
        notify_fds: on which the actors announce observations.
        log: to which the template's output is appended.
        incarnation: which template of this run it is, from 1.
        evaluation: makes actors play the episodes that they are given (`shm.assignments`) and end:
            {"video_dir": str or None, "rate_hz": int, of the films, "begin_with": int or None, the number of an episode
            whose scene is made before any actor is forked}.
        program: what an actor runs: a module with `prepare` and `main` as in `worker`.
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
    ) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it was inherited as ignored, nobody could be waited for
        self.forked = 0
        """Actors so far."""
        self.problem: str | None = None
        """Why it is of no use any more, if it is not."""
        self._asked: float | None = None  # time.monotonic of the request that is not answered yet
        self._counters, self._incarnation, self._wake_fds = Counters(arena), incarnation, list(wake_fds)
        self._connection, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        job = {
            "program": program.module,
            "arena": arena.describe(),
            "seed": seed,
            "env": env_config,
            "notify_fds": list(notify_fds),
            "evaluation": evaluation,
            "socket_fd": child.fileno(),
            "incarnation": incarnation,
            **program.settings,
        }
        fds = [arena.fd, child.fileno(), *self._wake_fds, *notify_fds]
        with child:
            self.popen = processes.start("dsrl_async.run.worker.template", job, fds, log, threads=1)

    @property
    def prepared(self) -> bool:
        """Whether it is ready to fork actors."""
        return int(self._counters.template_prepared[0]) == self._incarnation

    def ask(self, number: int, incarnation: int, log: Path) -> None:
        """Have actor `number` started, its output appended to `log`; `answer` is to be called until it gives it."""
        assert self._asked is None
        request = {
            "number": number,
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
        """The actor that was asked for, None if it is not there yet after `wait_s`.

        `last`: this is not called again; an actor that is not there by now will end by itself.

        Raises RuntimeError if there will be none; the template is of no use then.
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
        """`ask` and `answer` in one; `meanwhile` is called now and then, and may raise."""
        self.ask(number, incarnation, log)
        while (actor := self.answer(FORK_POLL_S)) is None:
            meanwhile()
        return actor

    def _fail(self, problem: str) -> NoReturn:
        self._connection.close()
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0)
        self.problem = f"it could not start an actor: {problem}"
        raise RuntimeError(f"the template of the actors is of no use: {problem}")

    def close(self) -> None:
        """End the template; its actors live on."""
        self._connection.close()
        if not self.prepared or not processes.wait_all([self.popen], time.monotonic() + CLOSE_S):
            processes.kill_all([self.popen])


def main(argument: str) -> None:
    """Run the template as a process; `argument` is the JSON of `Template`."""
    job = json.loads(argument)
    processes.prepare_child(job["parent"])
    counters = Counters(Arena.attach(job["arena"]))
    counters.template_heartbeat_ns[0] = time.monotonic_ns()  # a scene that hangs while it is made is found out
    program = importlib.import_module(job["program"])
    prepared = None
    try:
        prepared = program.prepare(job)
    except Exception:
        traceback.print_exc()  # each actor will meet the same, and end with it
    gc.collect()
    gc.freeze()  # a later collection would write to memory that the actors share
    connection = socket.socket(fileno=job["socket_fd"])
    counters.template_prepared[0] = job["incarnation"]
    asked = select.poll()
    asked.register(connection, select.POLLIN)
    while True:
        counters.template_heartbeat_ns[0] = time.monotonic_ns()
        if not asked.poll(BEAT_S * 1000):
            continue
        asking = connection.recv(REQUEST_BYTES)
        if not asking:  # closed
            return
        between = os.fork()
        if between == 0:
            code = 1
            try:
                between = os.getpid()
                if os.fork() == 0:
                    _be_actor(program.main, job | json.loads(asking), prepared, connection, between)
                code = 0
            finally:
                os._exit(code)
        if os.waitpid(between, 0)[1] != 0:
            connection.send(b"no process could be made; is there memory, and is the limit of processes reached?")


def _be_actor(
    run: Callable[[dict[str, Any], Any], None],
    job: dict[str, Any],
    prepared: Any,
    connection: socket.socket,
    between: int,
) -> None:
    """Never returns."""
    code = 1
    try:
        while os.getppid() == between:
            time.sleep(0.001)
        processes.prepare_child(job["parent"])
        connection.send(str(os.getpid()).encode())  # before anything that may fail, and by the only one who knows
        connection.close()
        output = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        ctypes.CDLL(None).prctl(PR_SET_NAME, f"actor-{job['number']:03d}".encode())
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
