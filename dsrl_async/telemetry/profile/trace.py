"""The spans of all processes as one file in Chrome's trace-event format, which Perfetto (ui.perfetto.dev) opens.

Format: "Trace Event Format", Google, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
Timestamps are microseconds of CLOCK_MONOTONIC, which all processes of a machine share, as do other profilers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dsrl_async.shm.arena import Arena
from dsrl_async.shm.spans import TRACKS, newest_spans

LONGEST_S = 30.0
"""Upper limit on the length of a trace."""
MACHINE, INFERENCE, LEARNER, FIRST_WORKER = 1, 2, 3, 10
"""Process numbers in the trace. Real ones would change when a process is replaced."""
PLACES = {
    "actor": ("actor", FIRST_WORKER, 1, "phases"),
    "inference": ("inference", INFERENCE, 1, "phases"),
    "inference_stage": ("inference", INFERENCE, 2, "stages"),
    "learner": ("learner", LEARNER, 1, "phases"),
    "learner_stage": ("learner", LEARNER, 2, "stages"),
}
"""Track -> kind of process, its number and the thread in the trace, and the thread's name."""


def chrome_trace(arena: Arena, until_ns: int, samples: Iterable[tuple[int, str, dict[str, float]]]) -> dict[str, Any]:
    """The stretch before `until_ns` that every process's spans cover, at most LONGEST_S, ready for JSON.

    `samples` are (time in ns, name, series -> value) and are drawn as curves. A span's `step` is the number of its
    decision, batch or update.
    """
    begin_ns = until_ns - round(LONGEST_S * 1e9)
    tracks = []  # kind, process, thread, process name, track name, span names, spans
    for track, names in TRACKS.items():
        for ring in range(len(arena[f"span/{track}"])):
            spans = newest_spans(arena, track, ring)
            if len(spans) and arena[f"span/{track}_count"][ring] >= arena[f"span/{track}"].shape[1]:
                begin_ns = max(begin_ns, int(spans[0, 1]))  # earlier spans have been overwritten
            kind, process, thread, track_title = PLACES[track]
            title = f"actor-{ring:03d}" if kind == "actor" else kind
            tracks.append((kind, process + ring, thread, title, track_title, names, spans))
    events: list[dict[str, Any]] = [_name("process_name", MACHINE, 0, "machine")]
    for kind, process, thread, title, track_title, names, spans in tracks:
        if thread == 1:
            events.append(_name("process_name", process, thread, title))
        events.append(_name("thread_name", process, thread, track_title))
        inside = spans[(spans[:, 1] >= begin_ns) & (spans[:, 2] <= until_ns)]
        events += [
            {
                "ph": "X",
                "name": names[name],
                "cat": kind,
                "pid": process,
                "tid": thread,
                "ts": start_ns / 1e3,
                "dur": (end_ns - start_ns) / 1e3,
                "args": {"step": step},
            }
            for name, start_ns, end_ns, step in inside.tolist()
        ]
    events += [
        {"ph": "C", "name": name, "pid": MACHINE, "tid": 0, "ts": time_ns / 1e3, "args": series}
        for time_ns, name, series in samples
        if begin_ns <= time_ns <= until_ns
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}
