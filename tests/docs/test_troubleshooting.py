"""The messages that the troubleshooting page explains are those that the code says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from support.paths import ROOT


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
    messages = explained((ROOT / "docs/troubleshooting.md").read_text())
    assert len(messages) > 40
    assert unsaid(messages, said) == []


@pytest.mark.parametrize("mistake", ["replay.capacity must be above …", "… is no longer a key: …"])
def test_a_message_that_nobody_says_is_found(mistake: str, said: list[str]) -> None:
    assert len(unsaid([mistake], said)) == 1
