"""Writes docs/configuration.md from `dsrl_async/config/settings.py`; with `--check`, says whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from dsrl_async.config.command_line import type_name
from dsrl_async.config.load import leaf_fields, on_resume

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"


def table() -> str:
    lines = [
        "# Configuration",
        "",
        "Every key can stand on the command line (`--sac.gamma 0.99`) and, but for `resume`, in a YAML file",
        "(`--config`): once, in its section or dotted (`sac.gamma: 0.99`). A value means the same in both, whatever",
        "YAML 1.1 would make of it: `off` is a word, `010` is ten, `1e5` a whole number. Nothing, `null` and `~`",
        "are null.",
        "Made by `python scripts/write_configuration_table.py`.",
        "",
        "What becomes of another value on `--resume`: `fixed`: the run is refused; `announced`: it is taken and said;",
        "`free`: it is just taken.",
        "",
        "| key | type | default | on resume | meaning |",
        "|---|---|---|---|---|",
    ]
    for key, field in leaf_fields():
        default = "null" if field.default is None else field.default
        kind = type_name(field.annotation).replace("|", " \\| ")
        meaning = " ".join((field.description or "").split())
        lines.append(f"| `{key}` | {kind} | `{default}` | {on_resume(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(None if PAGE.read_text() == table() else f"{PAGE} is out of date; run {sys.argv[0]}")
    PAGE.write_text(table())
