"""The bottleneck report as text, JSON, TensorBoard scalars and a picture."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from dsrl_async.telemetry.monitor import json_safe
from dsrl_async.telemetry.profile.bottleneck import Diagnosis, RunProfile

LEAST_SHARE = 0.005
"""The text leaves out smaller shares."""
WAIT_COLOUR = "#d9d9d9"
LABELLED_SHARE = 0.08
"""From this share on, a bar of the picture has room for its name."""


def text(profile: RunProfile, diagnosis: Diagnosis) -> str:
    """The report as text of at most 120 columns."""
    return "\n".join([*textwrap.wrap(diagnosis.sentence, 110), "", *_lines(profile)]) + "\n"


def _lines(profile: RunProfile) -> Iterator[str]:
    seconds = max(profile.seconds, 1e-9)
    rates = [
        f"{count / seconds:,.1f} {name}/s"
        for name, count in (
            ("decisions", profile.decisions),
            ("env steps", profile.env_steps),
            ("updates", profile.updates),
        )
    ]
    since = "since the warm-up" if profile.warmed_up else "of the warm-up"
    yield f"{profile.seconds:,.1f} s {since}: {', '.join(rates)}"
    yield (
        f"{profile.batch_size:.1f} observations per batch, {profile.batch_fill:.0%} of its rows used; "
        f"an observation waits {profile.queue_wait_ms:.1f} ms for its batch"
    )
    yield ""
    yield "share of a process's time"
    for kind, process in profile.processes.items():
        if process.phases:
            shares = {name: share for name, share in process.phases.items() if share >= LEAST_SHARE}
            ordered = sorted(shares.items(), key=lambda item: -item[1])
            words = [f"{name.replace('_', ' ')} {share:.1%}" for name, share in ordered]
            rest = 1 - sum(process.phases.values())
            words += [f"other {rest:.1%}"] if rest >= LEAST_SHARE else []
            title = f"  {_title(kind, process.count):<14}"
            yield from textwrap.wrap("  ".join(words), 118, initial_indent=title, subsequent_indent=" " * len(title))
    yield ""
    yield f"{'CPU':<16}{'cores used':>12}{'waits for a core':>18}{'memory':>18}"
    for kind, process in profile.system_processes.items():
        each = " each" if process.count > 1 else ""
        yield (
            f"  {_title(kind, process.count):<14}{process.cores:>12.2f}{process.queued:>17.0%} "
            f"{f'{process.memory_mb:,.0f} MB{each}':>18}"
        )
    yield f"  {'other programs':<14}{profile.cores_of_others:>12.2f}"
    cores = " ".join(f"{share:.0%}" for share in profile.core_shares)
    busy = f"{cores} busy; {profile.cpus} of them may be kept busy"
    yield from textwrap.wrap(busy, 118, initial_indent=f"  {'each core':<14}  ", subsequent_indent=" " * 18)
    for index, gpu in enumerate(profile.gpus):
        used, total = gpu.memory_used / 1e9, gpu.memory_total / 1e9
        busy = "how busy is not known" if gpu.utilization is None else f"{gpu.utilization:.0%} busy"
        yield f"GPU {index}, {gpu.name}: {busy}, {used:.1f} of {total:.1f} GB used"


def _title(kind: str, count: int) -> str:
    return f"{kind} x{count}" if count > 1 else kind


def as_json(profile: RunProfile, diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything in the report, ready for JSON."""
    derived = {"cores": profile.cores, "cores_of_others": profile.cores_of_others, "free_cores": profile.free_cores}
    report: dict[str, Any] = json_safe({**diagnosis._asdict(), **asdict(profile), **derived})
    report["core_shares"] = [round(share, 4) for share in profile.core_shares]
    report["gpus"] = [gpu._asdict() for gpu in profile.gpus]
    return report


def scalars(profile: RunProfile) -> dict[str, float]:
    """TensorBoard values: shares of time, cores, and GPUs."""
    values = {"profile/cores/other_programs": profile.cores_of_others}
    for kind, process in profile.processes.items():
        values |= {f"profile/{kind}/{name}": share for name, share in process.phases.items()}
    for kind, process in profile.system_processes.items():
        values |= {f"profile/cores/{kind}": process.cores, f"profile/waits_for_a_core/{kind}": process.queued}
    values |= {f"profile/core_busy/{core}": share for core, share in enumerate(profile.core_shares)}
    for index, gpu in enumerate(profile.gpus):
        if gpu.utilization is not None:
            values[f"profile/gpu_busy/{index}"] = gpu.utilization
        values[f"profile/gpu_memory_gb/{index}"] = gpu.memory_used / 1e9
    return values


def draw_phases(axes: Any, phases: Mapping[str, Mapping[str, float]]) -> None:
    """Draw a bar for each kind of process, by its title: what share of its time each phase took, with waits in grey."""
    for row, shares in enumerate(phases.values()):
        left = 0.0
        for index, (name, share) in enumerate(shares.items()):
            colour = WAIT_COLOUR if name.startswith("wait_") else f"C{index}"
            axes.barh(row, share, left=left, color=colour, edgecolor="white")
            if share >= LABELLED_SHARE:
                words = f"{name.replace('_', ' ')}\n{share:.0%}"
                axes.text(left + share / 2, row, words, ha="center", va="center", fontsize=8)
            left += share
    axes.set_yticks(range(len(phases)), list(phases))
    axes.set(xlim=(0, 1))
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def picture(profile: RunProfile, diagnosis: Diagnosis) -> tuple[bytes, int, int]:
    """A PNG file, its width and its height in pixels: a bar per kind of process, with waits in grey, and the cores.

    Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    kinds = {kind: process for kind, process in profile.processes.items() if process.phases}
    figure = Figure(figsize=(10, 4.2), dpi=100, layout="constrained")
    above, below = figure.subplots(2, height_ratios=[3, 1.2])
    draw_phases(above, {_title(kind, process.count): process.phases for kind, process in kinds.items()})
    above.set(title="share of a process's time")
    left = 0.0
    used = {kind: process.cores for kind, process in profile.system_processes.items()}
    for index, (kind, cores) in enumerate({**used, "other programs": profile.cores_of_others}.items()):
        below.barh(0, cores, left=left, color=f"C{index}", edgecolor="white", label=f"{kind} {cores:.2f}")
        left += cores
    below.set(xlim=(0, max(profile.cpus, left)), yticks=[], title=f"cores used, of {profile.cpus}")
    below.legend(ncols=5, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.35), frameon=False)
    figure.suptitle(textwrap.fill(diagnosis.sentence, 105), fontsize=10)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    width, height = (round(inches * figure.dpi) for inches in figure.get_size_inches())
    return png.getvalue(), width, height
