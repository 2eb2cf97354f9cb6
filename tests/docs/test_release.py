"""A version is said in one place, and what else names it agrees: the changelog, and how to cite."""

from __future__ import annotations

import re

import pytest
import yaml
from support.paths import ROOT

import dsrl_async


def disagreements(version: str, changelog: str, citation: str) -> list[str]:
    """What is wrong with the newest section of the changelog, or with CITATION.cff."""
    found = []
    cited = yaml.safe_load(citation)
    sections = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    if sections[0] != "Unreleased":
        found.append("there is no section Unreleased for what comes next")
    released = re.fullmatch(r"(\d+\.\d+\.\d+), (\d{4}-\d\d-\d\d)", sections[1])
    if released is None or released[1] != version:
        found.append(f"the newest section is {sections[1]}, not one of {version} with its date")
    elif str(cited["date-released"]) != released[2]:
        found.append(f"CITATION.cff is of {cited['date-released']}")
    if cited["version"] != version:
        found.append(f"CITATION.cff has {cited['version']}")
    return found


def test_the_version_is_the_changelogs_and_the_citations() -> None:
    texts = [(ROOT / name).read_text() for name in ("CHANGELOG.md", "CITATION.cff")]
    assert disagreements(dsrl_async.__version__, *texts) == []


@pytest.mark.parametrize(
    ("version", "changelog", "citation", "words"),
    [
        (
            "1.1.0",
            "## Unreleased\n## 1.0.0, 2026-01-02\n",
            "version: 1.1.0\ndate-released: 2026-01-02",
            "newest section",
        ),
        ("1.0.0", "## Unreleased\n## 1.0.0\n", "version: 1.0.0\ndate-released: 2026-01-02", "newest section"),
        (
            "1.0.0",
            "## 1.0.0, 2026-01-02\n## 0.9.0, 2026-01-01\n",
            "version: 1.0.0\ndate-released: 2026-01-02",
            "Unreleased",
        ),
        ("1.0.0", "## Unreleased\n## 1.0.0, 2026-01-02\n", "version: 0.9.0\ndate-released: 2026-01-02", "has 0.9.0"),
        ("1.0.0", "## Unreleased\n## 1.0.0, 2026-01-02\n", "version: 1.0.0\ndate-released: 2026-01-01", "is of"),
    ],
)
def test_what_disagrees_is_found(version: str, changelog: str, citation: str, words: str) -> None:
    assert any(words in text for text in disagreements(version, changelog, citation))
