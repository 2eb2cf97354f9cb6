"""What a person reads at the end of an evaluation: what came out, where it is, and what to do next."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from typing import Any

from dsrl_async.config.command_line import program
from dsrl_async.host.output import last_lines


def last_words(options: argparse.Namespace, suites: Mapping[str, Mapping[str, Any]], wall_s: float) -> list[str]:
    """Three lines about the results by suite and policy."""
    results = [(suite, policy, result) for suite, of in suites.items() for policy, result in of.items()]
    parts = [(f"{suite}, " if len(suites) > 1 else "") + rate(policy, result) for suite, policy, result in results]
    kept = f"episodes and results in {options.out}"
    where = [kept if options.out else "kept nowhere: --out DIR keeps episodes and results"]
    if options.video:
        where.append(f"films in {options.video}")
    came_out = f"{'; '.join(parts)} (in {wall_s / 60:.1f} min)"
    return last_lines(came_out, ", ".join(where), what_next(options, {policy for _, policy, _ in results}))


def rate(policy: str, result: Mapping[str, Any]) -> str:
    interval = f"95% interval {result['ci95_low']:.1%} to {result['ci95_high']:.1%}"
    return f"{policy} policy {result['success_rate']:.1%} of {result['episodes']} episodes ({interval})"


def what_next(options: argparse.Namespace, played: set[str]) -> str:
    """The command that tells more than this evaluation did."""
    if not options.checkpoint:
        return f"steer the policy with {program('launch')}, then compare: {program('evaluate')} --checkpoint RUN"
    checkpoint = f"--checkpoint {shlex.quote(options.checkpoint)}"
    if played == {"steered"}:
        return f"the frozen policy in the same episodes: {program('evaluate')} {checkpoint} --base"
    if played == {"base"}:
        return f"the steered policy in the same episodes: {program('evaluate')} {checkpoint}"
    if options.out:
        run, out = shlex.quote(options.checkpoint), shlex.quote(options.out)
        return f"a page to keep or to send: {program('report')} {run} --evaluation {out}"
    return f"films: {program('evaluate')} {checkpoint} --video films"
