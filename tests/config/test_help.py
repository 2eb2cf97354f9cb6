"""What `--help` and `--help-all` show of the settings."""

from __future__ import annotations

import re
from typing import get_type_hints

import pytest
from support.commands import call

from dsrl_async.config.command_line import COMMANDS, COMMON
from dsrl_async.config.load import leaf_fields
from dsrl_async.config.settings import Config

SECTIONS = [Config, *(kind for kind in get_type_hints(Config).values() if hasattr(kind, "model_fields"))]


def shown(name: str, option: str) -> str:
    """What a command prints for `--help` or `--help-all`."""
    done = call(name, option)
    assert done.code == 0
    return done.stdout


def options(text: str) -> list[str]:
    """The options that a help describes, in order."""
    return re.findall(r"^ +(?:-h, )?--([\w.-]+)", text, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_one_screen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = shown(name, "--help")
    assert text.count("\n") <= 45
    assert name in ("bench", "report") or "--help-all shows" in text


def test_help_of_launch_shows_what_everyone_uses() -> None:
    flags = [key.replace("_", "-") for key in COMMON]
    assert options(shown("launch", "--help")) == ["help", "help-all", "config", *flags]


@pytest.mark.parametrize("columns", [80, 100, 120, 200])
def test_help_all_has_every_setting_once_in_a_group_for_each_section(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown("launch", "--help-all")
    assert max(map(len, text.splitlines())) <= min(columns, 120)
    flags = options(text)
    assert flags[: 3 + len(COMMON)] == options(shown("launch", "--help"))
    assert sorted(flags[3:]) == sorted(key.replace("_", "-") for key, _ in leaf_fields())
    titles = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    docstrings = [section.__doc__.removesuffix(".") for section in SECTIONS]
    assert titles == ["options", "settings that most runs use", *docstrings]


@pytest.mark.parametrize("name", ["evaluate", "plan", "doctor"])
def test_help_all_has_the_settings_that_a_command_takes(name: str) -> None:
    brief, everything = (options(shown(name, option)) for option in ("--help", "--help-all"))
    assert everything[: len(brief)] == brief
    settings = [key.replace("_", "-") for key, _ in leaf_fields()]
    if name == "evaluate":
        of_groups = "group.gpus", "group.cpus", "group.wait-s"
        sections = "env", "policy", "sac", "inference"
        settings = [key for key in settings if key.split(".")[0] in sections or key in of_groups]
        settings = ["device", "heartbeat-timeout-s", *settings]
    assert everything[len(brief) :] == settings


def test_a_setting_says_its_values_and_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    words = " ".join(shown("launch", "--help-all").split())
    for part in (
        r"--actors INT How many .* \(default 16\) --seed",
        r"--serial \[BOOL\] .* \(default false\)",
        r"--log.console VALUE .* \(auto \| live \| plain \| off; default auto\)",
        r"--sac.actor-betas VALUE .* \(\[float, float\]; default \[0.9, 0.999\]\)",
        r"--max-minutes FLOAT [^(]*again. --max-decisions",
    ):
        assert re.search(part, words), part
