"""The command: `python -m dsrl_async.launch [--config YAML] [--key value ...]`.

Checks everything first, then runs; progress goes to stderr, and at the end three lines: what came out, where it is,
what to do next. The last line on stdout is the run's summary as one JSON object, unless both are a terminal: then it is
only in `summary.json`. Exit codes: 0 after a limit or a signal (the run ended as asked, with a checkpoint), 1 after a
failure, 2 for input that cannot be run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsrl_async.config.command_line import load_config, make_demonstrations_absolute, make_paths_absolute
from dsrl_async.config.load import to_yaml
from dsrl_async.config.settings import Config
from dsrl_async.groups.checks import check_groups, whole_run
from dsrl_async.groups.supervision import run_groups
from dsrl_async.host import logs
from dsrl_async.host.command import what_is_wrong
from dsrl_async.host.files import write_text
from dsrl_async.host.output import is_for_a_person, print_to_person, say
from dsrl_async.host.processes import Program
from dsrl_async.host.signals import StopRequest
from dsrl_async.launch.last_words import last_words
from dsrl_async.run import checkpoints, preflight
from dsrl_async.run.preflight import CheckedRun
from dsrl_async.run.supervisor import ending
from dsrl_async.run.supervisor.child import Kind
from dsrl_async.run.supervisor.session import Session
from dsrl_async.run.supervisor.supervisor import PROGRAMS, Supervisor
from dsrl_async.shm import order
from dsrl_async.telemetry.console import make_console
from dsrl_async.telemetry.loggers import check_loggers

logger = logging.getLogger(__name__)


def main(argv: Sequence[str], programs: Mapping[Kind, Program] = PROGRAMS) -> int:
    """Check everything, then run; returns the exit code. `programs` are those of `Supervisor`.

    Raises:
        ValueError: the run cannot be started so; ConfigError is one.
        KeyboardInterrupt: a signal came before anything was started.
        RuntimeError: the run has failed; its summary is written and printed.
    """
    stop = StopRequest()
    config = load_config(argv)
    make_paths_absolute(config.policy)
    make_demonstrations_absolute(config.replay)

    def heed_stop() -> None:
        if stop.reason:
            raise KeyboardInterrupt

    wait = make_console(config).wait
    with wait("looking for the loggers"):
        check_loggers(config)
    preflight.check_films(config)
    checked = preflight.check_run(config, meanwhile=heed_stop, wait=wait)
    with wait("reading the demonstrations"):
        checked = preflight.check_demonstrations(checked)
    config = checked.config
    with wait("looking at the machine"):
        if config.grouped:
            check_groups(checked)
        else:
            preflight.check_memory(checked)
            preflight.check_devices(config)
            preflight.check_gpu_memory(checked)
        preflight.check_compiler(config)
        preflight.check_descriptors(config)
        if not config.serial:
            preflight.check_channel()
    heed_stop()  # nothing was started yet
    run_dir, lock = preflight.open_run_directory(config)
    with lock:
        try:
            summary = run(checked, run_dir, stop, programs)
        except ValueError:  # what was given cannot be used, and nothing was started
            raise
        except Exception as error:
            logger.exception("error in the run")
            summary = {"run_dir": str(run_dir), "exit_reason": ending.failure(what_is_wrong(error))}
            tell(config, run_dir, summary)
    with contextlib.suppress(OSError):
        write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    if config.log.console == "off" or not is_for_a_person():
        say(json.dumps(summary))  # if nobody takes it, the run did what it was for all the same
    if ending.has_failed(summary["exit_reason"]):
        raise RuntimeError(ending.what_failed(summary["exit_reason"]))
    return 0


def run(
    checked: CheckedRun, run_dir: Path, stop: StopRequest, programs: Mapping[Kind, Program] = PROGRAMS
) -> dict[str, Any]:
    """Run in an opened run directory; returns the summary, about which a person is told.

    Raises:
        ValueError: a checkpoint cannot be used; nothing was started.
        Exception: of any other kind, if the run cannot be set up.
    """
    config = checked.config
    with contextlib.closing(make_console(config)) as console:
        logs.set_up(console.handler, logs.LogFile(run_dir / "logs" / "supervisor.log"))
        with console.wait("reading the policy's files to know them again"):
            made_with, changes = preflight.made_with(checked), []
        if config.resume is not None:
            changes = preflight.check_resume(config, run_dir)
            changes += preflight.check_made_with(run_dir, made_with, checked.policy.place)
        session = Session(whole_run(checked), run_dir, stop, console)
        preflight.record_made_with(run_dir, made_with)
        write_text(run_dir / "config.yaml", to_yaml(config))
        logger.info("run directory: %s", run_dir)
        if (told := preflight.memory_of_algorithm(checked)) is not None:
            logger.info(told)
        for warning in checked.warnings:
            logger.warning(warning)
        if changes:
            logger.info("resumed with changes: %s", ", ".join(changes))
        if (untried := order.warning(platform.machine())) is not None:
            logger.warning(untried)
        try:
            if config.serial:
                with console.wait("importing PyTorch"):
                    from dsrl_async.run.supervisor.serial import run_serial

                summary = run_serial(session)
            elif config.grouped:
                summary = run_groups(session, config, programs)
            else:
                summary = Supervisor(session, programs).run()
        except Exception as error:
            logger.exception("error in the run")  # the command itself says no more than a sentence
            summary = session.finish(ending.failure(what_is_wrong(error)), {})
        if session.resumed_from is not None:
            summary["resumed"] = {"from": str(session.resumed_from), "changes": changes}
        checkpoints.remove_recovery(run_dir)
        saved = checkpoints.latest(run_dir)
        if saved is not None and not checkpoints.has_replay(saved):
            logger.warning("the last checkpoint has no replay buffer, for want of room: a resume warms up again")
    tell(config, run_dir, summary, session.monitor.began())
    return summary


def tell(config: Config, run_dir: Path, summary: dict[str, Any], began: str = "") -> None:
    """Print the last words about a run to stderr; nothing there may keep the run from ending."""
    if config.log.console != "off":
        with contextlib.suppress(OSError, ValueError):
            print_to_person(last_words(run_dir, summary, began))
