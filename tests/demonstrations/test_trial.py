"""What is tried in a child."""

from __future__ import annotations

import resource
import time
from multiprocessing.connection import Connection

from dsrl_async.demonstrations import trial


def say_core_limit(sender: Connection) -> None:
    sender.send_bytes(str(resource.getrlimit(resource.RLIMIT_CORE)[0]).encode())


def test_a_crash_leaves_no_core_file() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        assert trial.problem(say_core_limit, seconds=30) == "0"
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


def sleep(sender: Connection) -> None:
    time.sleep(600)


def test_what_never_comes_back_is_ended() -> None:
    said = trial.problem(sleep, seconds=0.1)
    assert said == "it was not read within 0 s; it is damaged, or its disk is very slow"
