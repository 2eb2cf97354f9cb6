"""Goes through all suites of the installed LIBERO, and says what they have and which of them cannot be played.

    python scripts/studies/check_libero_suites.py [--suite 'libero_spatial*'] [--policy DIR] [--compile one|all]

prints a Markdown table and, as JSON on the last line, the totals. `--policy` names a policy whose tokenizer is asked
for the words that it does not know. `--compile` also compiles the scene of one task of each suite, or of all, resets it
to the first initial state and takes one step, which takes some ten seconds of a core for each.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from dsrl_async.config.settings import EnvConfig
from dsrl_async.envs import environment_record, libero_files, make_environment
from dsrl_async.host.command import guard
from dsrl_async.pi0.files import find_policy
from dsrl_async.pi0.tokenizer import unknown_words


def settings_of(suite: str, **settings: Any) -> dict[str, Any]:
    return EnvConfig.model_validate({"name": suite, "render_quality": "fast", **settings}).model_dump()


def compile_scene(suite: str, task: int) -> str:
    """What is wrong with the scene of a task, or nothing."""
    try:
        environment = make_environment(settings_of(suite, task_ids=[task], settling_steps=0))
        environment.reset(0, 0)
        environment.step_chunk(np.zeros((1, 7), np.float32))
        environment.close()
    except (ValueError, AssertionError) as error:
        return f"task {task}: {error}"
    return ""


def examine(suite: str, tokenizer: Any, compiled: str | None) -> dict[str, Any]:
    """What a suite has."""
    record = environment_record(settings_of(suite))
    row: dict[str, Any] = {"tasks": 0, "states": [], "told": 0, "unknown": [], "compiled": 0, "wrong": ""}
    try:
        names = libero_files.task_names(suite)
        row["tasks"] = len(names)
        prompts = record.spec().prompts
        row["told"] = sum(told != libero_files.instruction(name) for told, name in zip(prompts, names, strict=True))
        if tokenizer is not None:
            row["unknown"] = sorted({word for prompt in prompts for word in unknown_words(tokenizer, prompt)})
        record.check()
        row["states"] = [len(libero_files.init_states(suite, task)) for task in range(len(names))]
    except ValueError as error:
        row["wrong"] = str(error)
        return row
    for task in {"one": range(1), "all": range(len(names))}.get(compiled or "", range(0)):
        row["wrong"] = row["wrong"] or compile_scene(suite, task)
        row["compiled"] += 1
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="*", metavar="PATTERN", help="only the suites that fit it")
    parser.add_argument("--policy", metavar="DIR", help="a policy's directory")
    parser.add_argument(
        "--compile", choices=("one", "all"), help="compile the scene of one task of each suite, or of all"
    )
    options = parser.parse_args()
    tokenizer = find_policy(Path(options.policy)).tokenizer if options.policy else None
    suites = [suite for suite in libero_files.suites() if fnmatch.fnmatch(suite, options.suite)]
    print("| suite | tasks | initial states of each | not told the name | unknown words | wrong |\n" + "|---" * 6 + "|")
    rows = []
    for suite in suites:
        rows.append(row := examine(suite, tokenizer, options.compile))
        states = ", ".join(str(count) for count in sorted(Counter(row["states"])))
        unknown = ", ".join(row["unknown"])
        print(f"| {suite} | {row['tasks']} | {states} | {row['told']} | {unknown} | {row['wrong']} |", flush=True)
    whole = [row for row in rows if not row["wrong"]]
    totals = {
        "suites": len(rows),
        "tasks": sum(row["tasks"] for row in rows),
        "init_states": sum(sum(row["states"]) for row in rows),
        "not_told_the_name": sum(row["told"] for row in rows),
        "compiled": sum(row["compiled"] for row in rows),
        "wrong": len(rows) - len(whole),
    }
    print(json.dumps(totals))


if __name__ == "__main__":
    sys.exit(guard(main))
