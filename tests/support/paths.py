"""Where the files of this repository are that tests look at."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS, DOCS, SCRIPTS = ROOT / "configs", ROOT / "docs", ROOT / "scripts"
FIXTURES = ROOT / "tests" / "fixtures"
