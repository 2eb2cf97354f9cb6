"""After a start there is always an end: its reason, its summary, its exit code."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.commands import call
from support.launched import SMALL, Launched

from dsrl_async.config.settings import Config
from dsrl_async.envs import EnvironmentSpec
from dsrl_async.run import checkpoints
from dsrl_async.run.supervisor import ending
from dsrl_async.run.supervisor.session import Session
from dsrl_async.run.supervisor.supervisor import Supervisor
from dsrl_async.telemetry.console import NoDisplay


class Ended:
    """A process that has ended."""

    pid = 1

    def __init__(self, returncode: int) -> None:
        self.returncode = returncode

    def poll(self) -> int:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        return self.returncode

    def kill(self) -> None:
        pass


@pytest.fixture
def session(small_config: Config, spec: EnvironmentSpec, tmp_path: Path) -> Session:
    for name in ("logs", "checkpoints"):
        (tmp_path / name).mkdir()
    (tmp_path / "config.yaml").touch()
    run: Any = SimpleNamespace(config=small_config, spec=spec, horizon=10, demonstration_rows=0)
    stop: Any = SimpleNamespace(reason=None, warnings=0)
    return Session(run, tmp_path, stop, NoDisplay())


def ended(session: Session, monkeypatch: pytest.MonkeyPatch, returncode: int | None = 0, **methods: Any) -> str:
    """The reason of a run whose supervisor has these `methods`, and whose learner ended so."""
    run = Supervisor(session)
    assert run.learner is not None
    run.learner.popen = None if returncode is None else Ended(returncode)
    for name, method in ({"_watch": lambda: "max_minutes"} | methods).items():
        monkeypatch.setattr(run, name, method)
    summary = run.run()
    assert summary.keys() >= {"run_dir", "restarts", "lost_updates"}
    return str(summary["exit_reason"])


def fail(error: BaseException) -> Any:
    def method(*_: Any) -> None:
        raise error

    return method


def test_an_end_as_asked(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(session, monkeypatch) == "max_minutes"


@pytest.mark.parametrize("error", [MemoryError("no more"), ValueError("no more"), OSError("no more"), KeyError("more")])
@pytest.mark.parametrize("where", ["_watch", "_stop_children"])
def test_errors_of_the_supervisor_itself_are_the_reason(
    where: str, error: Exception, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = ended(session, monkeypatch, **{where: fail(error)})
    ended_for = "" if where == "_watch" else " (max_minutes)"
    assert reason == f"failed: {type(error).__name__} in the supervisor{ended_for}: {error}"


def test_the_first_cause_is_named_first(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    both = ended(session, monkeypatch, _watch=fail(ValueError("first")), _stop_children=fail(ValueError("second")))
    assert both == "failed: ValueError in the supervisor: first; ValueError in the supervisor: second"


@pytest.mark.parametrize(
    ("returncode", "why"),
    [
        (None, "there was no learner"),
        (-9, "the learner was killed by SIGKILL"),
        (1, "OSError: no space left"),
    ],
)
def test_no_last_checkpoint_is_a_failure(
    returncode: int | None, why: str, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    (session.run_dir / "logs" / "learner.log").write_text("Traceback\nOSError: no space left\n")
    monkeypatch.setattr(Supervisor, "_stop_children", lambda _: None)
    nothing = "no checkpoint was written at the end"
    assert ended(session, monkeypatch, returncode) == f"failed: {nothing} (max_minutes): {why}; nothing was saved"
    broken = ended(session, monkeypatch, returncode, _watch=lambda: ending.failure("actor-000 broke"))
    assert broken == f"failed: actor-000 broke; {nothing}: {why}; nothing was saved"


def test_figures_that_cannot_be_had_leave_a_summary(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((session, "tick"), (session.monitor, "summary"), (session.monitor, "close")):
        with monkeypatch.context() as planted:
            planted.setattr(owner, name, fail(MemoryError()))
            assert ended(session, planted) == "max_minutes"


def test_a_directory_that_is_gone_is_a_reason(session: Session) -> None:
    assert session.reason_to_stop() is None
    (session.run_dir / "config.yaml").rename(session.run_dir / "moved")
    assert session.reason_to_stop() == f"failed: the run directory {session.run_dir} is gone, or its config.yaml"


@pytest.mark.parametrize("serial", [False, True])
@pytest.mark.parametrize("error", [MemoryError(), ValueError("restored rows do not fit"), OSError("disk"), KeyError(7)])
def test_whatever_breaks_a_run_there_is_one_line_and_a_summary(
    error: Exception, serial: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = "serial.run_serial" if serial else "supervisor.Supervisor.run"
    monkeypatch.setattr(f"dsrl_async.run.supervisor.{run}", fail(error))
    done = call("launch", *["--serial"] * serial, "--log.console", "off", "--run-dir", str(tmp_path / "run"))
    summary = json.loads(done.stdout)
    assert done.code == 1
    assert done.stdout.count("\n") == 1
    assert ending.has_failed(summary["exit_reason"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert done.stderr == f"error: {ending.what_failed(summary['exit_reason'])}\n"
    assert summary["decisions"] == 0


@pytest.mark.parametrize(("error", "code"), [(ValueError("damaged"), 2), (MemoryError(), 1), (OSError("full"), 1)])
def test_what_cannot_be_begun_is_the_inputs_fault_or_a_failure(
    error: Exception, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsrl_async.launch.command.Session", fail(error))
    done = call("launch", "--log.console", "off", "--run-dir", str(tmp_path / "run"))
    assert done.code == code
    assert done.stdout.count("\n") == (code == 1)
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "run" / "summary.json").is_file() == (code == 1)


def test_a_signal_before_the_start_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dsrl_async.launch.command.preflight.check_descriptors", lambda _: signal.raise_signal(signal.SIGTERM)
    )
    done = call("launch", "--run-dir", str(tmp_path / "run"))
    assert (done.code, done.stdout, done.stderr) == (130, "", "interrupted\n")
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_is_deleted_ends_the_run_and_stays_so(tmp_path: Path) -> None:
    """Its logs and checkpoints are made anew while it is there itself."""
    run = Launched(tmp_path / "run", *SMALL, "--checkpoint.interval-minutes", "0.01")
    run.wait_learning()
    for name in ("logs", "checkpoints"):
        shutil.rmtree(run.run_dir / name, ignore_errors=True)
    victim = run.children("worker")[0]
    victim.kill()
    run.wait_for(lambda _: checkpoints.find(run.run_dir) is not None)
    run.wait_for(lambda _: len(run.children("worker")) == 2 and victim.pid not in [w.pid for w in run.children()])
    shutil.rmtree(run.run_dir, ignore_errors=True)
    shutil.rmtree(run.run_dir, ignore_errors=True)  # somebody may have been writing
    run.children("worker")[0].kill()
    result = run.finish()
    assert result["returncode"] == 1
    reason = f"the run directory {run.run_dir} is gone, or its config.yaml; nothing was saved"
    assert result["exit_reason"] == f"failed: {reason}"
    assert result["updates"] >= 5
    assert run.left_over() == []
    assert not run.run_dir.exists()


def test_reasons_as_asked_have_not_failed() -> None:
    assert not any(map(ending.has_failed, ("max_minutes", "interrupted", "stop_at_success")))
    assert ending.what_failed(ending.failure("it broke")) == "it broke"
