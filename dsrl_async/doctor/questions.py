"""What people ask when something is wrong, how to find out, and what mends it: `questions.yaml`.

`doctor` shows a question beside the message that it is about, and docs/troubleshooting.md has all of them in the same
words (scripts/write_troubleshooting.py).
"""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

FILE = Path(__file__).parent / "questions.yaml"


class Command(NamedTuple):
    """A command that finds something out."""

    run: str
    tells: str


class Question(NamedTuple):
    """A question with its answer, in sentences with Markdown's backticks."""

    question: str
    answer: str
    find_out: tuple[Command, ...]
    mend: tuple[str, ...]
    """What helps, most likely first."""
    more: tuple[str, ...]
    """Pages of docs/ and their headings: `libero.md#graphics`."""
    example: str = ""
    """A file to begin with, if there is one."""
    messages: tuple[str, ...] = ()
    """What the program says in such a case; "…" stands for anything."""

    def is_about(self, message: str) -> bool:
        """Whether a message of the program, such as a finding's, is one of this question's."""
        return any(_pattern(known).search(message) for known in self.messages)


def _pattern(message: str) -> re.Pattern[str]:
    return re.compile(".*?".join(map(re.escape, message.split("…"))), re.DOTALL)


@functools.cache
def questions() -> tuple[Question, ...]:
    """All of them, in the order of the page."""
    return tuple(
        Question(
            question=entry["question"],
            answer=entry["answer"],
            find_out=tuple(Command(**command) for command in entry["find_out"]),
            mend=tuple(entry["mend"]),
            more=tuple(entry["more"]),
            example=entry.get("example", ""),
            messages=tuple(entry.get("messages", ())),
        )
        for entry in yaml.safe_load(FILE.read_text())
    )


def asked(messages: Iterable[str]) -> list[Question]:
    """The questions that these messages are about, each once and in the order of the page."""
    messages = list(messages)
    return [question for question in questions() if any(map(question.is_about, messages))]


def in_lines(question: Question, width: int) -> Iterator[str]:
    """A question and its answer for a terminal of `width` columns. Commands are not broken: they are to be copied."""

    def wrapped(text: str, first: str, next: str) -> list[str]:
        return textwrap.wrap(
            text,
            max(40, width),
            initial_indent=first,
            subsequent_indent=next,
            break_long_words=False,
            break_on_hyphens=False,
        )

    yield question.question
    yield from wrapped(question.answer, "  ", "  ")
    yield "  To find out:"
    for command in question.find_out:
        yield f"    {command.run}"
        yield from wrapped(command.tells, "        ", "        ")
    if question.example:
        yield "  An example:"
        yield from textwrap.indent(question.example, "    ").splitlines()
    yield "  What helps:"
    for remedy in question.mend:
        yield from wrapped(remedy, "  * ", "    ")
    yield f"  More: {', '.join(f'docs/{page}' for page in question.more)}"
