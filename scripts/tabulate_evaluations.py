"""Prints a Markdown table of evaluations, by task: successes, success rates and their 95 % intervals (Wilson).

    python scripts/tabulate_evaluations.py base.json seed-0.json seed-1.json --oracle oracle.json

The files hold what `python -m dsrl_async.evaluate` prints as JSON, of the same tasks; `--oracle` what
scripts/studies/measure_oracle.py prints: the share of scenes from which at least one attempt succeeds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dsrl_async.host.command import guard
from dsrl_async.untrusted import read_object

Column = dict[Any, str]
"""The cell of each task, and of `all`."""


def cell(successes: int, episodes: int, figures: dict[str, Any]) -> str:
    return f"{successes} of {episodes} ({figures['ci95_low']:.0%} to {figures['ci95_high']:.0%})"


def of_evaluation(path: Path) -> tuple[Column, dict[int, str]]:
    """The column of an evaluation, and the instruction of each task. Raises ValueError if it is none."""
    result = read_object(path)
    try:
        column = {part["task"]: cell(part["successes"], part["episodes"], part) for part in result["tasks"]}
        rate = f"**{result['success_rate']:.1%}**, " + cell(result["successes"], result["episodes"], result)
        return column | {"all": rate}, {part["task"]: part["instruction"] for part in result["tasks"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an evaluation result: it lacks {error}") from None


def of_oracle(path: Path) -> dict[str, Column]:
    """A column for each rule of drawing noise. Raises ValueError if it is no oracle."""
    columns: dict[str, Column] = {}
    try:
        for rule, figures in read_object(path).items():
            parts: dict[Any, Any] = {int(task): part for task, part in figures["tasks"].items()}
            parts["all"] = figures
            columns[f"oracle, noise {rule}"] = {
                task: cell(part["scenes"]["successes"], part["scenes"]["number"], part["scenes"])
                for task, part in parts.items()
            }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an oracle's result: it lacks {error}") from None
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluations", nargs="+", type=Path, metavar="JSON", help="results, named by their files")
    parser.add_argument("--oracle", type=Path, metavar="JSON", help="what the oracle has found")
    arguments = parser.parse_args()
    columns: dict[str, Column] = {}
    instructions: dict[int, str] = {}
    for path in arguments.evaluations:
        columns[path.stem], told = of_evaluation(path)
        instructions |= told
    if arguments.oracle is not None:
        columns |= of_oracle(arguments.oracle)
    print("| task | " + " | ".join(columns) + " |\n" + "|---" * (1 + len(columns)) + "|")
    rows: list[tuple[Any, str]] = [(task, f"{task}, {instructions[task]}") for task in sorted(instructions)]
    for task, name in [*rows, ("all", "all")]:
        print(f"| {name} | " + " | ".join(column.get(task, "") for column in columns.values()) + " |")
    print()


if __name__ == "__main__":
    sys.exit(guard(main))
