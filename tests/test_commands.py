"""The five commands: how they are called, how they exit, and what they say then."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.commands import call, run_with_arguments
from support.launched import SMALL
from support.paths import ROOT

from dsrl_async import __main__ as overview
from dsrl_async.config.command_line import COMMANDS
from dsrl_async.config.settings import ConfigError
from dsrl_async.doctor.checks import Finding, Status
from dsrl_async.host import command
from dsrl_async.run.supervisor.session import Session

SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
GIVEN = ["--env-ms", "60", "--device-ms", "1:7", "--cores", "4", "--memory-gib", "8"]
"""What `plan` needs to know."""


def console_script(directory: Path, name: str) -> Path:
    """A file like the one that pip writes for a console script."""
    module, function = SCRIPTS[name].split(":")
    path = directory / name
    call = f"if __name__ == '__main__':\n    sys.exit({function}())\n"
    path.write_text(f"import sys\nfrom {module} import {function}\n{call}")
    return path


# ---- how they exit


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("launch", ["--actorz", "3"], "did you mean '--actors'"),
        ("launch", ["--actors", "0"], "actors"),
        ("evaluate", ["--episode", "3"], "did you mean '--episodes'"),
        ("launch", ["--sac.log_std_max=--"], "--sac.log_std_max: -- is no value"),
        ("evaluate", ["--out=--"], "--out: -- is no value"),
        ("bench", ["scale", "--compression=--"], "--compression: -- is no value"),
        ("evaluate", ["--episodes", "1000000000000"], "--episodes must be at most 1000000"),
        (
            "evaluate",
            ["--suite", "libero_spatial", "--init-states", "0-99999999999"],
            "'0-99999999999' is too large",
        ),
        ("launch", ["--learner.threads", "100000"], "learner.threads: input should be less than or equal to 1024"),
        ("launch", ["--evaluation.episodes", "1000000000000"], "evaluation.episodes: input should be less than"),
        ("launch", ["--inference.batch-wait-ms", "1e300"], "inference.batch_wait_ms: input should be less than"),
        ("evaluate", ["--episodes", "0"], "--episodes must be at least 1"),
        ("plan", [], "--env-ms is missing"),
        ("plan", [*GIVEN, "--actors", "0"], "actors"),
        ("doctor", ["--time-limit-s", "0"], "--time-limit-s must be positive"),
        ("bench", [], "NAME"),
        ("bench", ["nothing"], "invalid choice: 'nothing'"),
        ("bench", ["scale", "--compression", "fast"], "invalid float value: 'fast'"),
    ],
)
def test_input_that_cannot_be_used(name: str, arguments: list[str], words: str) -> None:
    done = call(name, *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "arguments", "fails", "codes"),
    [
        ("launch", [], "launch.command.run", {OSError: 1, RuntimeError: 1, ValueError: 2}),
        ("evaluate", [], "evaluate.command.evaluate", {OSError: 1, RuntimeError: 1, ValueError: 2}),
        ("plan", GIVEN, "plan.command.judge", {OSError: 2, RuntimeError: 1, ValueError: 2}),
        ("doctor", [], "doctor.command.examine", {OSError: 1, RuntimeError: 1, ValueError: 2}),
        ("bench", ["scale"], "bench.scale.run", {OSError: 1, RuntimeError: 1, ValueError: 2}),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_an_exit_code(
    name: str,
    arguments: list[str],
    fails: str,
    codes: dict[type[BaseException], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    module, _, function = f"dsrl_async.{fails}".rpartition(".")
    importlib.import_module(module)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    for kind, code in codes.items():
        error: BaseException = kind("it broke")
        monkeypatch.setattr(f"{module}.{function}", fail)
        done = call(name, *arguments)
        assert (done.code, done.stderr.splitlines()[-1]) == (code, "error: it broke"), kind
    error = KeyboardInterrupt()
    done = call(name, *arguments)
    assert (done.code, done.stderr.splitlines()[-1]) == (130, "interrupted")


@pytest.mark.parametrize(
    ("reason", "code"), [("max_decisions", 0), ("interrupted", 0), ("failed: the policy process died", 1)]
)
def test_a_run_that_ended_as_asked_is_a_success(
    reason: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsrl_async.launch.command.run", lambda *_: {"exit_reason": reason})
    done = call("launch")
    assert (done.code, json.loads(done.stdout)) == (code, {"exit_reason": reason})


def test_a_serial_run_that_breaks_leaves_the_traceback_in_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Session) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("dsrl_async.run.supervisor.serial.run_serial", fail)
    done = call("launch", "--serial", "--log.console", "off", "--run-dir", str(tmp_path / "run"))
    assert (done.code, done.stderr) == (1, "error: shapes do not fit\n")
    assert "Traceback" in caplog.text


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("problem", 1)])
def test_doctor_exits_with_its_verdict(status: Status, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsrl_async.doctor.command.examine", lambda *_: [Finding("memory", status, "so it is")])
    assert call("doctor").code == code
    assert call("doctor", "--json").code == code


# ---- what they say


@contextlib.contextmanager
def nobody_reads() -> Iterator[None]:
    """Standard output is a pipe whose other end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    output = os.fdopen(writer, "w")
    with contextlib.redirect_stdout(output):
        yield
    with contextlib.suppress(BrokenPipeError):
        output.close()


def test_output_that_nobody_reads_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with nobody_reads():
        assert command.guard(lambda: print("hello") or 0) == 1
    assert capsys.readouterr().err == "error: [Errno 32] Broken pipe\n"


def test_a_run_is_no_failure_because_nobody_reads_its_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsrl_async.launch.command.run", lambda *_: {"exit_reason": "max_decisions"})
    with nobody_reads():
        assert run_with_arguments("launch") == 0


def test_an_error_without_words_has_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise RuntimeError

    assert command.guard(fail) == 1
    assert capsys.readouterr().err == "error: RuntimeError\n"


def test_an_interrupt_is_one_whatever_became_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    assert command.guard(fail) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_what_nobody_expects_keeps_its_traceback() -> None:
    def fail() -> int:
        raise ImportError("no module named so")

    with pytest.raises(ImportError, match="no module named so"):
        command.guard(fail)


def test_development_mode_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise ValueError("it broke")

    monkeypatch.setattr(command.sys, "flags", SimpleNamespace(dev_mode=True))
    with pytest.raises(ValueError, match="it broke"):
        command.guard(fail)


# ---- how they are called


def test_each_command_has_a_console_script() -> None:
    assert list(SCRIPTS) == [f"dsrl-{name}" for name in COMMANDS]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_console_script_is_the_command_and_names_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, function = SCRIPTS[f"dsrl-{name}"].split(":")
    main = getattr(importlib.import_module(module), function)
    for program, usage in ((f"/venv/bin/dsrl-{name}", f"dsrl-{name}"), (module, f"python -m dsrl_async.{name}")):
        monkeypatch.setattr(sys, "argv", [program, "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            main()
        assert capsys.readouterr().out.startswith(f"usage: {usage} ")


def test_a_console_script_runs_the_processes_of_a_run(tmp_path: Path) -> None:
    script = console_script(tmp_path, "dsrl-launch")
    arguments = [*SMALL, "--log.console", "plain", "--max-decisions", "20", "--run-dir", "run"]
    done = subprocess.run(
        [sys.executable, script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["decisions"] == 20
    assert "to go on: dsrl-launch --resume" in done.stderr


@pytest.mark.parametrize("called", [*COMMANDS, "dsrl-launch"])
def test_interrupt_while_modules_are_imported_is_no_mistake(called: str, tmp_path: Path) -> None:
    what = ["-m", f"dsrl_async.{called}"] if called in COMMANDS else [str(console_script(tmp_path, called))]
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *what], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    slow = b"pydantic" if called == "report" else b"numpy"
    while slow not in (line := process.stderr.readline()):
        assert line, f"{slow.decode()} was never imported"
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1].decode()
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "interrupted"
    assert process.returncode == 130


def test_the_package_says_what_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dsrl_async/__main__.py"])
    assert overview.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    for name in COMMANDS:
        (line,) = (line for line in lines if line.startswith(f"python -m dsrl_async.{name} "))
        assert line.endswith(".")
    monkeypatch.setattr(sys, "argv", ["dsrl_async/__main__.py", "launch"])
    with pytest.raises(ConfigError, match=r"^launch means nothing here"):
        overview.main()


OF_THEIR_OWN = {
    "dsrl_async/host/tether.py",  # processes that a command starts, with pipes and logs for their output
    "dsrl_async/host/probe.py",
    "dsrl_async/run/preflight/download.py",
    "dsrl_async/run/inference/server.py",
    "dsrl_async/run/learner/learner.py",
    "dsrl_async/run/worker/template.py",
    "dsrl_async/run/inversion/process.py",
    "dsrl_async/groups/downlink.py",
    "dsrl_async/groups/member.py",
    "dsrl_async/groups/placer.py",
    "dsrl_async/groups/uplink.py",
    "dsrl_async/evaluate/member.py",
    "dsrl_async/bench/env.py",
    "dsrl_async/bench/simulated/device.py",
    "dsrl_async/bench/simulated/learner.py",
    "dsrl_async/bench/systems/transport_process.py",
    "dsrl_async/bench/systems/policy.py",
    "dsrl_async/bench/systems/lock_step_process.py",
    "scripts/gpu_report_sections.py",
    "dsrl_async/pi0/roofline.py",  # for developers: below `host`, or without anything that is printed
    "dsrl_async/pi0/synthetic.py",
    "scripts/chaos.py",
    "scripts/faults_ray.py",
    "scripts/make_aloha_checkpoint.py",
    "scripts/write_configuration_table.py",
    "scripts/write_troubleshooting.py",
}


def test_every_program_has_the_frame_of_a_command() -> None:
    """So that it hangs at no pipe, ends in no traceback because of one, and has its standard descriptors."""
    files = [*(ROOT / "dsrl_async").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in files}
    programs = {name for name, text in texts.items() if '\nif __name__ == "__main__":' in text}
    framed = {name for name in programs if "guard(" in texts[name] or "partial(run_command, " in texts[name]}
    assert len(framed) > 12
    assert programs - framed == OF_THEIR_OWN


def test_a_pipe_that_is_closed_leaves_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    called = [sys.executable, "-m", "dsrl_async"]
    done = subprocess.run(called, stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "error: [Errno 32] Broken pipe\n")


def test_an_interrupt_that_python_loses_while_it_imports_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callbacks of the import system, among others, drop whatever is raised in them."""

    def import_module(name: str) -> object:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return SimpleNamespace(main=lambda arguments: 0)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(command, "importlib", SimpleNamespace(import_module=import_module))
    try:
        assert command.run_command("launch") == 130
    finally:
        signal.signal(signal.SIGINT, before)
