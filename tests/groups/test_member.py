"""How a group's process begins: in this one, without what would change this one for good."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from dsrl_async.groups import member
from dsrl_async.host import processes
from dsrl_async.host.signals import SIGNALS, WARNINGS, StopRequest


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (*SIGNALS, *WARNINGS, signal.SIGCHLD)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_signal_counts_from_the_first_moment_on(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes as the process is tied to its parent, which has other children ignore signals."""
    prepare, reasons = processes.prepare_child, list[str | None]()

    def prepare_and_end(*arguments: Any, **keywords: Any) -> None:
        if moment == "before":
            os.kill(os.getpid(), signal.SIGTERM)
        prepare(*arguments, **keywords)
        if moment == "after":
            os.kill(os.getpid(), signal.SIGTERM)

    def run(job: dict[str, Any], stop: StopRequest) -> dict[str, Any]:
        reasons.append(stop.reason)
        return {"exit_reason": "terminated"}

    monkeypatch.setattr(processes.ctypes, "CDLL", lambda name: SimpleNamespace(prctl=lambda *numbers: 0))
    monkeypatch.setattr(processes.faulthandler, "enable", lambda: None)
    monkeypatch.setattr(processes, "prepare_child", prepare_and_end)
    for name in ("name_process", "be_killed_like_others", "raise_descriptor_limit"):
        monkeypatch.setattr(processes, name, lambda *names: None)
    monkeypatch.setattr(member.logs, "set_up", lambda: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"group": 0}'))
    monkeypatch.setattr(member, "run", run)
    assert member.main() == 0
    assert reasons == ["terminated"]
