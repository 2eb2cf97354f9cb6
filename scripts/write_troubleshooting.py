"""Writes the questions of docs/troubleshooting.md from `dsrl_async/doctor/questions.yaml`; with `--check`, says whether
they are up to date."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from dsrl_async.doctor.questions import Question, questions

PAGE = Path(__file__).resolve().parent.parent / "docs" / "troubleshooting.md"
BEGIN, END = "<!-- questions: made by scripts/write_troubleshooting.py -->\n", "<!-- end of the questions -->\n"


def section(question: Question) -> Iterator[str]:
    yield from ("", f"### {question.question}", "", question.answer, "", "To find out:", "")
    for command in question.find_out:
        yield f"* `{command.run}`: {command.tells}."
    if question.example:
        yield from ("", "```bash", *question.example.splitlines(), "```")
    yield from ("", "What helps:", "")
    for remedy in question.mend:
        yield f"* {remedy}"
    yield from ("", f"More: {', '.join(f'[{page}]({page})' for page in question.more)}.")
    if question.messages:
        yield from ("", f"Messages: {', '.join(f'`{message}`' for message in question.messages)}.")


def page(text: str) -> str:
    """The page with its questions as they are to be."""
    before, _, rest = text.partition(BEGIN)
    lines = [line for question in questions() for line in section(question)]
    return before + BEGIN + "\n".join([*lines, "", ""]) + END + rest.partition(END)[2]


if __name__ == "__main__":
    written = PAGE.read_text()
    if sys.argv[1:] == ["--check"]:
        sys.exit(None if written == page(written) else f"{PAGE} is out of date; run {sys.argv[0]}")
    PAGE.write_text(page(written))
