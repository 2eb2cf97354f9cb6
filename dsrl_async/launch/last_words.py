"""What a person reads at the end of a run: what came out, where it is, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsrl_async.config.command_line import program
from dsrl_async.host import processes
from dsrl_async.host.output import last_lines
from dsrl_async.run import checkpoints
from dsrl_async.run.evaluation.files import find_best
from dsrl_async.run.supervisor import ending

LIMITS = ("max_decisions", "max_minutes", "stop_at_success")
"""Reasons of a run that is done; one that a signal has ended is not."""


def last_words(run_dir: Path, summary: Mapping[str, Any], began: str) -> list[str]:
    """Three lines about a run that has ended, by its `summary`; `began` says what its success rate was before."""
    reason = summary["exit_reason"]
    saved = checkpoints.latest(run_dir)
    where = f"{run_dir}, " + ("no checkpoint" if saved is None else f"last checkpoint {saved.name}")
    if ending.has_failed(reason):
        where += f", log {failed_log(run_dir, ending.what_failed(reason))}"
    return last_lines(what_came_out(summary, began), where, what_next(run_dir, summary, saved))


def what_came_out(summary: Mapping[str, Any], began: str) -> str:
    """Success, decisions and minutes, as far as there are any."""
    reason = summary["exit_reason"]
    parts = []
    if summary.get("success_rate") is not None:
        parts.append(f"success {summary['success_rate']:.1%} of the last {summary['success_episodes']} episodes{began}")
    if (evaluated := (summary.get("evaluation") or {}).get("best")) is not None:
        parts.append(f"{evaluated['success_rate']:.1%} in the best evaluation")
    if summary.get("decisions"):
        parts.append(f"{summary['decisions']:,} decisions in {summary['wall_s'] / 60:.1f} min")
    if not parts:
        parts.append("nothing yet")
    how = "it failed" if ending.has_failed(reason) else f"ended by {reason}"
    return f"{'; '.join(parts)} ({how})"


def what_next(run_dir: Path, summary: Mapping[str, Any], saved: Path | None) -> str:
    """The commands that fit this end, the likeliest first."""
    reason, run = summary["exit_reason"], shlex.quote(str(run_dir))
    resume = f"{program('launch')} --resume {run}"
    if ending.has_failed(reason):
        doctor = f"read the log, and ask {program('doctor')}"
        return doctor if saved is None else f"{doctor}; once that is mended: {resume}"
    if saved is None:
        return f"start again with {program('launch')}: there is nothing to resume from"
    go_on = f"to go on: {resume}" + (" --max-decisions MORE" if reason == "max_decisions" else "")
    if not summary.get("updates"):
        return go_on
    best = " --best" if find_best(run_dir) is not None else ""
    evaluate = f"to see how good it is: {program('evaluate')} --checkpoint {run}{best}"
    return "; ".join([evaluate, go_on] if reason in LIMITS else [go_on, evaluate])


def failed_log(run_dir: Path, sentence: str) -> Path:
    """The log that says more about a failure: the one that its sentence names or quotes, else the supervisor's."""
    found = sorted([*run_dir.glob("logs/*.log"), *run_dir.glob("groups/*/logs/*.log")])
    for log in found:
        if str(log) in sentence:
            return log
    for log in found:
        if log.stem != "supervisor" and processes.last_line(log) in sentence:
            return log
    return run_dir / "logs" / "supervisor.log"
