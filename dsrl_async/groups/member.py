"""The process of a group: a run's supervisor with environment workers and an inference process, and an uplink in the
learner's place.

It reads its job from its stdin (see `supervision.Groups`), and ends when the uplink is told that the run stops, with a
SIGTERM, or with its parent. What it writes lies in a directory of its own that is made as a run's is.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dsrl_async.config.load import to_yaml, validate
from dsrl_async.config.settings import Config
from dsrl_async.groups.grants import least_rows
from dsrl_async.groups.reports import begin_with
from dsrl_async.groups.wire import Link
from dsrl_async.host import logs, processes
from dsrl_async.host.files import write_text
from dsrl_async.host.signals import StopRequest
from dsrl_async.run.channel import write_secret
from dsrl_async.run.preflight import check_run
from dsrl_async.run.supervisor import ending
from dsrl_async.run.supervisor.child import Kind
from dsrl_async.run.supervisor.session import Session
from dsrl_async.run.supervisor.supervisor import PROGRAMS, Supervisor
from dsrl_async.shm.counters import Counters
from dsrl_async.shm.memory import create_memory
from dsrl_async.telemetry.console import NoDisplay

logger = logging.getLogger(__name__)

UPLINK = "dsrl_async.groups.uplink"
LANE_ROWS = 256
"""Replay rows of a lane, which wait there to be sent. For DSRL-NA, whose rows are large, as few are there as do."""
NOT_OF_A_GROUP = {"groups": 1, "ray": None, "run_dir": None, "resume": None, "stop_at_success": None}
NOT_OF_A_GROUP |= {"max_minutes": None, "max_decisions": None}
"""Settings that are the whole run's: where it is, and when it ends."""


def config_of(config: Config, group: int) -> dict[str, Any]:
    """The settings of one group of a run, ready for JSON.

    Its episodes and its noise are others than those of the other groups; the learner's machine says when it warms up.
    """
    settings: dict[str, Any] = config.model_dump(mode="json") | NOT_OF_A_GROUP
    settings["seed"] = int(np.random.SeedSequence(config.seed, spawn_key=(group,)).generate_state(1)[0])
    rows = least_rows(config.actors)
    if config.sac.algorithm == "sac":
        rows = max(rows, LANE_ROWS)
    settings["replay"]["capacity"] = max(config.actors * rows, config.replay.warmup_decisions)
    if config.group.gpus == 0:
        settings["device"] = "cpu"  # whatever the machine has
    settings["log"] |= {"loggers": [], "console": "off"}
    settings["group"] |= {"address": None, "ports": None}
    return settings


def main() -> int:
    stop = StopRequest()
    processes.prepare_child(os.getppid(), answers_signals=True)
    job = json.load(sys.stdin)
    processes.name_process(f"group-{job['group']}", f"supervisor of group {job['group']}")
    logs.set_up()
    processes.be_killed_like_others()
    processes.raise_descriptor_limit()
    try:
        summary = run(job, stop)
    except ValueError as error:  # what was given cannot be used; a successor could not either
        print(error, file=sys.stderr)
        return processes.FATAL
    if ending.has_failed(summary["exit_reason"]):
        print(ending.what_failed(summary["exit_reason"]), file=sys.stderr)
        return 1
    return 0


def run(job: dict[str, Any], stop: StopRequest) -> dict[str, Any]:
    """Run a group to its end; returns the summary, which lies in its directory, too."""
    config, run_dir = validate(job["config"]), Path(job["run_dir"])
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    checked = check_run(config)
    config = checked.config
    write_text(run_dir / "config.yaml", to_yaml(config))
    arena = create_memory(config, checked.spec, checked.horizon)
    counters = Counters(arena)
    begin_with(counters, job["counters"])
    counters.control_granted[0] = -1
    decisions_before = counters.decisions()
    link_fd = write_secret(Link.of_plain(job["link"]))
    known = {"group": job["group"], "incarnation": job["incarnation"]}
    of_uplink = {**known, "decisions_before": decisions_before, "window_rows": config.group.window_rows}
    programs = dict(PROGRAMS)
    del programs[Kind.LEARNER]
    for kind, (module, settings) in job.get("programs", {}).items():
        programs[Kind(kind)] = processes.Program(module, {"of_group": known, **settings})
    programs[Kind.UPLINK] = processes.Program(UPLINK, {**of_uplink, "link_fd": link_fd}, (link_fd,))
    session = Session(checked, run_dir, stop, NoDisplay(), arena)
    summary = Supervisor(session, programs).run()
    write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


if __name__ == "__main__":
    sys.exit(main())
