"""The tables of docs/gpu.md are those that the command beside them prints."""

from __future__ import annotations

import subprocess
import sys

from support.paths import DOCS, SCRIPTS


def test_the_guide_has_the_tables_of_the_command() -> None:
    command = [sys.executable, str(SCRIPTS / "studies" / "gpu_on_paper.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    tables = printed.strip().split("\n\n")
    assert len(tables) == 3
    guide = (DOCS / "gpu.md").read_text()
    assert [table for table in tables if table not in guide] == []
