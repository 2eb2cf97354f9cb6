"""Silence is counted only while the watcher itself was awake."""

from __future__ import annotations

import time

import pytest

from dsrl_async.host.vigil import Vigil


def test_silence_from_before_a_freeze_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    vigil = Vigil(patience_s=4.0)
    for _ in range(40):
        now += 0.9  # a slow watcher is not held up
        vigil.look()
    assert vigil.silent_s(101.0) == pytest.approx(35.0)
    now += 30.0
    vigil.look()
    assert vigil.silent_s(101.0) == 0.0
    now += 0.5
    vigil.look()
    assert vigil.silent_s(101.0) == 0.5
    assert vigil.silent_s(now) == 0.0
