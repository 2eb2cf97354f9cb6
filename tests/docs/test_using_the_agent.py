"""The page about using an agent says what works."""

from __future__ import annotations

import re
from typing import Any

import pytest
from support.launched import FinishedRun
from support.paths import DOCS

PAGE = (DOCS / "using_the_agent.md").read_text()


def test_the_code_of_the_page_runs(finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks:
        assert "runs/NAME" in block or "agent" in names
        exec(block.replace("runs/NAME", str(finished_run.run_dir)), names)
    assert names["chunks"].shape == (2, 5, 7)
    assert names["actions"].shape == (5, 7)
    assert capsys.readouterr().out.strip() in ("success", "failure")
