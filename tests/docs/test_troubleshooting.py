"""The troubleshooting page has the questions of the package, and explains messages that the code says, each once."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.paths import ROOT, SCRIPTS

import dsrl_async.doctor.command
import dsrl_async.evaluate.command
import dsrl_async.plan.command
import dsrl_async.report.command
from dsrl_async.config import command_line
from dsrl_async.config.command_line import Parser, load_config
from dsrl_async.config.settings import ConfigError
from dsrl_async.doctor.questions import Question, questions

PAGE = (ROOT / "docs/troubleshooting.md").read_text()
PARSERS: dict[str, Callable[[], Parser]] = {
    "launch": lambda: command_line.build_parser(all_settings=True),
    "evaluate": lambda: dsrl_async.evaluate.command.build_parser(all_settings=True),
    "plan": lambda: dsrl_async.plan.command.build_parser(all_settings=True),
    "doctor": lambda: dsrl_async.doctor.command.build_parser(all_settings=True),
    "report": dsrl_async.report.command.build_parser,
}
PLACEHOLDERS = re.compile(r"^([A-Z]+|…|.*\b(RUN|OLDER|NAME)\b.*|\$.*)$")
"""Words in the place of what a user has."""


def literals(source: str) -> Iterator[str]:
    """The strings in Python code; of an f-string the parts between its braces."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            yield node.value if isinstance(node.value, str) else node.value.decode(errors="replace")


def explained(page: str) -> list[str]:
    """The messages in the first column of a page's tables."""
    first_columns = re.findall(r"^\| (`.+?) \|", page, re.MULTILINE)
    return [message for column in first_columns for message in re.findall(r"`([^`]+)`", column)]


def unsaid(messages: list[str], said: list[str]) -> list[str]:
    """The parts of messages, which "…" separates, that are nowhere in what is said. Quotation marks do not count."""
    plain = [re.sub(r"[`'\"]", "", text) for text in said]
    parts = [re.sub(r"['\"]", "", part).strip() for message in messages for part in message.split("…")]
    return [part for part in parts if len(part) > 4 and not any(part in text for text in plain)]


@pytest.fixture(scope="module")
def said() -> list[str]:
    modules = (ROOT / "dsrl_async").rglob("*.py")
    return [*(text for path in modules for text in literals(path.read_text())), (ROOT / "scripts/setup.sh").read_text()]


def test_explained_messages_are_said(said: list[str]) -> None:
    messages = explained(PAGE)
    assert len(messages) > 40
    assert unsaid(messages, said) == []
    assert {question.question: unsaid([*question.messages], said) for question in questions()} == {
        question.question: [] for question in questions()
    }


def test_what_is_to_be_looked_for_in_a_log_is_said(said: list[str]) -> None:
    runs = [command.run for question in questions() for command in question.find_out if "runs/RUN/logs" in command.run]
    words = [word for run in runs for quoted in re.findall(r'grep .*?"(.+?)"', run) for word in quoted.split("|")]
    assert len(words) == 3
    assert unsaid(words, said) == []


def test_a_message_is_explained_once() -> None:
    """Either by a question or in a table."""
    assert [message for message in explained(PAGE) if any(question.is_about(message) for question in questions())] == []
    told = [message for question in questions() for message in question.messages]
    assert len(told) == len(set(told))


@pytest.mark.parametrize("mistake", ["replay.capacity must be above …", "… is no longer a key: …"])
def test_a_message_that_nobody_says_is_found(mistake: str, said: list[str]) -> None:
    assert len(unsaid([mistake], said)) == 1


def commands(question: Question) -> Iterator[tuple[str, list[str]]]:
    """Each command of this project that a question's answer gives, and its words; options alone are those of launch."""
    prose = " ".join([question.answer, *question.mend, *(command.tells for command in question.find_out)])
    spans = [*re.findall(r"`([^`]+)`", prose), *(command.run for command in question.find_out), question.example]
    for span in spans:
        if span.startswith("--"):
            yield "launch", shlex.split(span)
        for name, words in re.findall(r"python -m dsrl_async\.(\w+)([^;|>\n]*)", span):
            yield name, shlex.split(words)


def mistaken(name: str, words: list[str]) -> str:
    """What is wrong with a command, or nothing: options that it has not, values that settings cannot have."""
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    taken = set(PARSERS[name]()._option_string_actions)
    if name in ("doctor", "plan"):
        taken |= set(PARSERS["launch"]()._option_string_actions)
    if unknown := [option for option in options if option not in taken]:
        return f"{name} has no {unknown[0]}"
    pairs = itertools.pairwise([*words, "--"]) if name == "launch" else []
    given = [pair for pair in pairs if pair[0].startswith("--") and not pair[1].startswith("--")]
    settings = [word for option, value in given if not PLACEHOLDERS.match(value) for word in (option, value)]
    try:
        load_config(settings)
    except ConfigError as error:
        return str(error)
    return ""


def test_the_page_has_the_questions_of_the_package() -> None:
    command = [sys.executable, str(SCRIPTS / "write_troubleshooting.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_page_that_differs_from_the_questions_is_found(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "docs").mkdir()
    script = tmp_path / "scripts" / "write_troubleshooting.py"
    script.write_text((SCRIPTS / "write_troubleshooting.py").read_text())
    page = tmp_path / "docs" / "troubleshooting.md"
    page.write_text(PAGE.replace(questions()[3].mend[0], "Buy a larger machine.", 1))
    command = [sys.executable, str(script)]
    checked = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
    assert "is out of date" in checked.stderr
    subprocess.run(command, check=True)
    assert page.read_text() == PAGE


@pytest.mark.parametrize("question", questions(), ids=lambda question: question.question)
def test_what_a_question_advises_exists(question: Question) -> None:
    assert question.find_out
    assert question.mend
    assert [fault for name, words in commands(question) if (fault := mistaken(name, words))] == []


def test_advice_is_looked_at() -> None:
    found = [(name, words) for question in questions() for name, words in commands(question)]
    assert {name for name, _ in found} == set(PARSERS)
    assert len(found) > 60


@pytest.mark.parametrize(
    ("advice", "fault"),
    [
        ("`--actor 3`", "launch has no --actor"),
        ("`--sac.noise-layout slots`", "sac.noise_layout"),
        ("`python -m dsrl_async.evaluate --checkpoint runs/RUN --basis`", "evaluate has no --basis"),
    ],
)
def test_wrong_advice_is_found(advice: str, fault: str) -> None:
    ((name, words),) = commands(Question("Why?", "", (), (advice,), ()))
    assert fault in mistaken(name, words)


def test_the_batch_script_starts_a_run_and_then_goes_on_with_it(tmp_path: Path) -> None:
    (question,) = (question for question in questions() if question.example)
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    variables = {"SCRATCH": str(tmp_path), "SLURM_JOB_NAME": "mine", "SLURM_CPUS_PER_TASK": "4"}
    environment = os.environ | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run_dir = tmp_path / "runs" / "mine"

    def words() -> list[str]:
        command = ["bash", "-euc", question.example]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return done.stdout.splitlines()

    new = ["--cpus-per-task=4", "python", "-m", "dsrl_async.launch", "--run-dir", str(run_dir)]
    assert words()[: len(new)] == new
    (run_dir / "checkpoints").mkdir(parents=True)
    assert words()[: len(new)] == new
    (run_dir / "checkpoints" / "00000001-00000002").mkdir()
    (run_dir / "checkpoints" / "00000001-00000002" / "state.json").touch()
    assert words() == [*new[:4], "--resume", str(run_dir)]
