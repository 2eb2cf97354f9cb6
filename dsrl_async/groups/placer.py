"""The process that owns the Ray library: asks Ray for hosts, watches them, and fetches the groups' logs.

Ray's library ends its process when the cluster's head is gone, so that must not be the one that owns the ring. It talks
with `ray_placement.RayPlacement` in lines of JSON, through a socket that it inherits; it ends when that is closed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsrl_async import __version__
from dsrl_async.config.files import how_to_install
from dsrl_async.groups.ray_host import Host, Look
from dsrl_async.host import processes

logger = logging.getLogger(__name__)

VARIABLES = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_DEDUP_LOGS": "0"}
"""What a user's environment may override: no usage statistics, and nobody is served who has not the cluster's token."""
TICK_S, TELL_S = 0.1, 1.0
AGAIN_S = 1.0
"""How long after Ray could not reach a host it is asked again."""
LONGEST_TEMPORARY = 40
"""Bytes of the name of a directory for temporary files in which Ray has room for the names of its sockets."""
END_S = 10.0
"""How long groups may take for a clean end before they are killed."""


def prepare_environment() -> None:
    """Set Ray's variables, which it reads when it is imported."""
    os.environ.update({name: os.environ.get(name, value) for name, value in VARIABLES.items()})
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TEMPORARY:
        os.environ.setdefault("RAY_TMPDIR", "/tmp")


def connect(address: str) -> Any:
    """Connect to the cluster at `address`, or for `auto` to the one that this machine belongs to, or else start one on
    this machine; returns the library.

    Raises ValueError with a sentence.
    """
    prepare_environment()
    try:
        import ray
    except ImportError as error:
        raise ValueError(f"ray: the library cannot be imported ({error}); {how_to_install('ray')}") from error
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.WARNING}
    try:
        try:
            ray.init(address, **options)
        except ConnectionError:
            if address != "auto":
                raise
            make_token()
            ray.init("local", **options)
    except Exception as error:  # of many kinds: no such cluster, no token, another version of Ray or Python
        where = "no Ray cluster can be reached or started here" if address == "auto" else f"no Ray cluster at {address}"
        raise ValueError(f"{where}: {first_sentence(error)}{_doubt(address)}") from error
    return ray


def _doubt(address: str) -> str:
    """What may be wrong where somebody answers at an address and Ray only says that it cannot connect."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError, ValueError), socket.create_connection((host, int(port)), 3):
        return "; somebody answers there, but not with this machine's token (~/.ray/auth_token), or is another Ray"
    return ""


def make_token() -> None:
    """Make the token of a cluster on this machine, if there is none, which only this user may read."""
    path = Path.home() / ".ray" / "auth_token"
    if os.environ["RAY_AUTH_MODE"] != "token" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(secrets.token_hex(32))


def first_sentence(error: BaseException) -> str:
    """What an error of Ray's says, which may be pages long, on one line."""
    cause = getattr(error, "cause", None) or error  # of a RayTaskError: what was raised on the other machine
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {' '.join(lines)[:300]}"


@dataclass(eq=False)
class Asked:
    """A group, from when it is asked for until it has ended."""

    group: int
    incarnation: int
    job: dict[str, Any]
    lines: list[str]
    """What the group has been told since its start."""
    host: Any
    """Handle of a `Host`."""
    answer: Any
    """Reference to what it has been asked last; None while it is not to be asked."""
    where: str | None = None
    """None before it is placed."""
    again: float = 0.0
    known: dict[str, int] = field(default_factory=dict)


class Placer:
    """Asks Ray for hosts as the other end of `link` wishes, until that is closed.

    `resources` are those of a host, as Ray takes them: `num_gpus`, `num_cpus`.
    """

    def __init__(self, ray: Any, link: socket.socket, resources: dict[str, float]) -> None:
        self.ray, self.link, self.resources = ray, link, resources
        self.host = ray.remote(max_restarts=0, max_task_retries=0, **resources)(Host)
        self.asked: dict[int, Asked] = {}
        self.heard = b""
        self.told = 0.0
        self.closing: float | None = None

    def run(self) -> None:
        self.tell("ready", len([node for node in self.ray.nodes() if node["Alive"]]), self.ray.cluster_resources())
        while self.heed():
            self.watch()
            now = time.monotonic()
            if now - self.told >= TELL_S:
                self.told = now
                self.tell("waits", self.waits())
                if self.closing is not None:
                    self.ask_to_end()
            if self.closing is not None and (not self.asked or now > self.closing):
                break
        for asked in list(self.asked.values()):
            self.ray.kill(asked.host)

    def tell(self, *words: Any) -> None:
        with contextlib.suppress(OSError):  # the other end is gone, as `heed` will find
            self.link.sendall(json.dumps(words).encode() + b"\n")

    # ---- what is asked

    def heed(self) -> bool:
        """Do what was asked for; returns False when nobody asks any more."""
        try:
            while part := self.link.recv(1 << 16, socket.MSG_DONTWAIT):
                self.heard += part
            return False
        except BlockingIOError:
            pass
        except OSError:
            return False
        *lines, self.heard = self.heard.split(b"\n")
        for line in lines:
            what, *words = json.loads(line)
            getattr(self, f"do_{what}")(*words)
        return True

    def do_start(self, group: int, incarnation: int, job: dict[str, Any], lines: list[str]) -> None:
        host = self.host.remote()
        self.asked[group] = Asked(group, incarnation, job, lines, host, host.start.remote(__version__, job))

    def do_tell(self, group: int, line: str) -> None:
        if (asked := self.asked.get(group)) is not None:
            asked.lines.append(line)

    def do_end(self, group: int) -> None:
        if (asked := self.asked.get(group)) is not None:
            self.ray.kill(asked.host)  # the group's process is tied to it
            self.give_up(asked, "killed")

    def do_close(self) -> None:
        self.closing, self.told = time.monotonic() + END_S, 0.0

    def ask_to_end(self) -> None:
        """Once a second, since a group that is just starting does not heed it yet."""
        for asked in list(self.asked.values()):
            if asked.where is None:
                self.do_end(asked.group)
            else:
                asked.host.end.remote()

    # ---- what becomes of it

    def watch(self) -> None:
        """Hear what hosts have answered, and ask them again."""
        now = time.monotonic()
        for asked in self.asked.values():
            if asked.answer is None and now >= asked.again:
                asked.answer = self.ask(asked)
        waiting = {asked.answer: asked for asked in self.asked.values() if asked.answer is not None}
        if not waiting:
            time.sleep(TICK_S)
            return
        for answer in self.ray.wait(list(waiting), num_returns=len(waiting), timeout=TICK_S)[0]:
            self.take(waiting[answer], answer)

    def ask(self, asked: Asked) -> Any:
        host = asked.host
        if asked.where is None:
            return host.start.remote(__version__, asked.job)
        return host.watch.remote(asked.known, asked.lines)

    def take(self, asked: Asked, answer: Any) -> None:
        asked.answer = None
        try:
            said = self.ray.get(answer)
        except self.ray.exceptions.ActorUnavailableError as error:  # not dead: the network may heal
            logger.warning("group %d cannot be reached: %s", asked.group, first_sentence(error))
            asked.again = time.monotonic() + AGAIN_S
            return
        except self.ray.exceptions.ActorDiedError as error:
            logger.warning("group %d: %s", asked.group, first_sentence(error))
            self.give_up(asked, f"its host has ended, {why_dead(error)}")
            return
        except Exception as error:
            logger.warning("group %d: %s", asked.group, first_sentence(error))
            self.ray.kill(asked.host)
            self.give_up(asked, first_sentence(error))
            return
        if asked.where is None:
            asked.where = said
            self.tell("placed", asked.group, asked.incarnation, said)
            return
        look: Look = said
        self.keep(asked, look)
        if look.ended is not None:
            with contextlib.suppress(Exception):
                self.ray.get(asked.host.leave.remote(), timeout=END_S)
            self.ray.kill(asked.host)
            self.give_up(asked, look.ended, look.fatal)

    def keep(self, asked: Asked, look: Look) -> None:
        """Write what a host has fetched to the group's directory here."""
        for name, part in look.parts.items():
            path = Path(asked.job["run_dir"]) / name
            is_log = name.endswith((".log", ".jsonl"))
            with contextlib.suppress(OSError):  # of a full disk, other files than logs are missing
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab" if is_log else "wb") as file:
                    file.write(part)
            asked.known[name] = asked.known.get(name, 0) + len(part)

    def give_up(self, asked: Asked, how: str, fatal: bool = False) -> None:
        del self.asked[asked.group]
        self.tell("ended", asked.group, asked.incarnation, how, fatal)

    def waits(self) -> dict[int, str]:
        """What groups wait for that are not placed."""
        pending = [asked.group for asked in self.asked.values() if asked.where is None]
        if not pending:
            return {}
        free = self.ray.available_resources()
        missing = [
            noun
            for noun, resource, need in (
                ("a GPU", "GPU", self.resources["num_gpus"]),
                ("a CPU", "CPU", self.resources["num_cpus"]),
            )
            if free.get(resource, 0) < need
        ]
        return dict.fromkeys(pending, " and ".join(missing) or "Ray to start it")


def why_dead(error: BaseException) -> str:
    """Ray's reason for an actor's death, without its many numbers."""
    text = " ".join(str(error).split())
    for sign, meaning in (
        ("node has died", "because its machine is gone"),
        ("node was terminated", "because its machine has left the cluster"),
        ("low on memory", "because Ray saw its machine run out of memory"),
    ):
        if sign in text:
            return meaning
    return "because Ray's process for it is gone"


def main(argument: str) -> int:
    job = processes.begin_child(argument, "placer")
    link = socket.socket(fileno=job["link_fd"])
    try:
        ray = connect(job["address"])
    except ValueError as error:
        logger.error("%s", error)
        print(error, file=sys.stderr)
        return processes.FATAL if isinstance(error.__cause__, ImportError) else 1
    Placer(ray, link, job["resources"]).run()
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
