"""What is said while a command has nothing else to show."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from dsrl_async.host import waiting as module
from dsrl_async.host.waiting import waiting


def test_without_a_terminal_only_a_long_wait_is_said_in_its_newest_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    monkeypatch.setattr(module, "AGAIN_S", 0.2)
    console = Console(file=io.StringIO(), width=20)
    with waiting("quick", console):
        pass
    with waiting("loading the policy [1]", console) as say:
        say("reading the replay buffer, 3 of 16 lanes")
        deadline = time.monotonic() + 10
        while console.file.getvalue().count("\n") < 2:  # type: ignore[attr-defined]  # it is a StringIO
            assert time.monotonic() < deadline
            time.sleep(0.01)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "quick" not in text
    assert text.splitlines()[0] == "reading the replay buffer, 3 of 16 lanes, 0 s so far"


def test_on_a_terminal_it_is_said_at_once_and_goes_away() -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=True, _environ={"TERM": "xterm"})
    with waiting("loading [the policy]", console):
        pass
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "loading [the policy]" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "\x1b[2K" in text[text.rindex("loading") :]  # the line is removed
