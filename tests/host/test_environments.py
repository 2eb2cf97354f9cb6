"""What is known of a user's environment is asked of a child process, once, and nothing of it is imported here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.user_environments import INSTALLED, env_settings, found_in

from dsrl_async import envs
from dsrl_async.config.settings import ConfigError
from dsrl_async.host import environments, probe
from dsrl_async.host.environments import environment_record, environment_spec

NOTING = """
import os, signal, sys, time
print("hello, without an end of the line", end="")
with open("asked", "a") as file:
    file.write("x")
def hang(): time.sleep(60)
def crash(): os.kill(os.getpid(), signal.SIGSEGV)
def leave(): os._exit(0)
def close(): sys.stdout.close()
def refuse(): raise KeyError("x")
"""


def test_a_child_says_the_same_as_would_be_found_here() -> None:
    settings = env_settings("reaching", {"reach": 0.5}, max_episode_steps=9)
    with found_in(INSTALLED):
        asked = environment_record(settings)
        assert environment_spec(settings) == asked.spec()
        assert "reaching" not in sys.modules
        here = envs.environment_record(settings)
    functions = ("spec", "make", "check")
    fields = [name for name in here.__dataclass_fields__ if name not in functions]
    assert {name: getattr(asked, name) for name in fields} == {name: getattr(here, name) for name in fields}
    assert asked.spec() == here.spec()


def test_shipped_environments_need_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "ask", None)
    assert environment_record(env_settings("tabletop")).name == "tabletop"
    assert environment_record(env_settings("libero_goal")).name == "libero_goal"


def test_a_child_is_asked_once_whatever_comes_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "noting.py").write_text(NOTING)
    monkeypatch.chdir(tmp_path)  # which a child finds modules in
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"^env\.name: noting\.py, line 10: KeyError: 'x'$"):
            environment_record(env_settings("noting:refuse"))
    assert (tmp_path / "asked").read_text() == "x"


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("hang", "no answer within 1 s"),
        ("crash", "killed by SIGSEGV"),
        ("leave", "it ended before it answered"),
        ("close", "exit code 1: ValueError: I/O operation on closed file."),
    ],
)
def test_a_child_that_does_not_answer_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, why: str
) -> None:
    (tmp_path / "noting.py").write_text(NOTING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environments, "TIME_LIMIT_S", 1.0 if function == "hang" else 60.0)
    with pytest.raises(ConfigError) as caught:
        environment_record(env_settings(f"noting:{function}"))
    assert str(caught.value) == f"env.name: the process that was to say what noting:{function} is did not answer: {why}"
