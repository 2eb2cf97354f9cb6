"""The shell scripts say what they do before they do it, and why an installation fails; Python and pip are played."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.paths import ROOT

SCRIPTS = (
    *("docs", "reproduce_libero", "reproduce_libero_suite", "reproduce_tabletop", "run", "run_aloha_sim"),
    *("setup", "test"),
)
PYTHON = r"""#!/usr/bin/env bash
# A Python that makes environments with itself in them, whose pip says what PIP_SAYS holds and fails if that says ERROR.
case "$*" in
    "-c import sys"*) exit "${TOO_OLD:-0}" ;;
    "-c import ensurepip"*) exit 0 ;;
    "-c import pip"*) [ "$(basename "$(dirname "$0")")" = bin ] ;;
    "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip install "*)
        echo "${@: -1}" >>"$(dirname "$0")/../asked"
        echo "$PIP_SAYS"
        sleep "${PIP_TAKES_S:-0}"
        [[ $PIP_SAYS != *ERROR* ]]
        ;;
    *) echo "ran: $*" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what an installation needs, in which nothing was installed."""
    root = tmp_path / "checkout"
    root.mkdir()
    shutil.copy(ROOT / "pyproject.toml", root)
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    python = tmp_path / "python3"
    python.write_text(PYTHON)
    python.chmod(0o755)
    for name, text in {"curl": "exit 1", "df": "printf 'x\\nx x x %s\\n' ${FREE_MB:-50000}"}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return root


def bash(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    tools = checkout.parent
    variables = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHON": str(tools / "python3"),
        "PIP_SAYS": "Collecting numpy",
    }
    return subprocess.run(
        ["bash", *command],
        cwd=checkout,
        env=os.environ | variables | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("name", [*SCRIPTS, "references/setup"])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_installs_nothing(checkout: Path, name: str, option: str) -> None:
    before = sorted(checkout.rglob("*"))
    done = bash(checkout, f"scripts/{name}.sh", option)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"bash scripts/{name}.sh" in done.stdout.split("Usage:")[1]
    assert "#" not in done.stdout
    assert "source" not in done.stdout or name == "setup"
    assert sorted(checkout.rglob("*")) == before


def test_every_script_is_looked_at() -> None:
    sourced = ["reproduction"]  # holds functions of others
    assert sorted(path.stem for path in (ROOT / "scripts").glob("*.sh")) == sorted([*SCRIPTS, *sourced])


def test_it_installs_once_and_says_what_it_does(checkout: Path) -> None:
    done = bash(checkout, "scripts/run.sh", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ran: -m dsrl_async.launch --seed 3\n"
    assert (checkout / ".venv/asked").read_text().splitlines() == ["torch", f"{checkout}[report,video]"]
    for words in (
        "installing dsrl_async[report,video] into",
        "1 of 3",
        "2 of 3: torch, the build for",
        "3 of 3",
        " MB\n",
    ):
        assert words in done.stderr
    again = bash(checkout, "scripts/run.sh", "--help")
    assert (again.stdout, again.stderr) == ("ran: -m dsrl_async.launch --help\n", "")
    other = bash(checkout, "scripts/setup.sh", "libero")
    assert "source .venv/bin/activate" in other.stdout
    os.utime(checkout / "pyproject.toml", (2e9, 2e9))
    assert "installing" in bash(checkout, "scripts/run.sh").stderr


def test_a_terminal_shows_that_it_goes_on(checkout: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {"PATH": f"{checkout.parent}:{os.environ['PATH']}", "PYTHON": str(checkout.parent / "python3")}
    environment |= {"PIP_SAYS": "Collecting numpy", "PIP_TAKES_S": "1.5"}
    done = subprocess.run(["bash", "scripts/setup.sh"], cwd=checkout, env=os.environ | environment, stderr=theirs)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode == 0
    assert re.search(r"\r\x1b\[K  1 s, \d+ MB: Collecting numpy\r\x1b\[K", shown)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"TOO_OLD": "1"}, "Python 3.11 or later is needed; install it, or set PYTHON to one"),
        ({"PYTHON": "/nowhere/python"}, "Python 3.11 or later is needed; install it, or set PYTHON to one"),
        ({"FREE_MB": "800"}, "GB, and there are 800 MB free"),
        (
            {"PIP_SAYS": "WARNING: Retrying: NameResolutionError\nERROR: No matching distribution"},
            "pip cannot reach its",
        ),
        ({"PIP_SAYS": "ERROR: Could not install: [Errno 28] No space left on device"}, "there is no space left on the"),
        ({"PIP_SAYS": "ERROR: one\n  ERROR: another"}, "pip has failed: ERROR: another (all that it said: "),
        ({"PIP_SAYS": "ERROR: Operation cancelled by user"}, "interrupted; the same command goes on"),
    ],
)
def test_why_it_fails_is_one_sentence(checkout: Path, environment: dict[str, str], words: str) -> None:
    done = bash(checkout, "scripts/run.sh", **environment)
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if "rror:" in line.lower()]
    assert error == done.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error
    assert done.stdout == ""
    if "PIP_SAYS" not in environment:
        assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    "command", [("reproduce_tabletop", "--minutes", "5"), ("setup", "libero", "video"), ("run_aloha_sim", "--out", "x")]
)
def test_arguments_that_mean_nothing_install_nothing(checkout: Path, command: tuple[str, ...]) -> None:
    done = bash(checkout, f"scripts/{command[0]}.sh", *command[1:])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert not (checkout / ".venv").exists()


TRAIN = r"""
python() { # plays a run of 100 decisions, which is interrupted after as many as STEPS_AT_ONCE
    [ "$1" = -m ] || { command python3 "$@"; return; }
    echo "$*" >>asked
    mkdir -p run-3/checkpoints
    local made=$(($(decisions run-3) + ${STEPS_AT_ONCE:-100}))
    [ -n "${DIES_EARLY:-}" ] || mkdir "run-3/checkpoints/$made-$made"
    [ -n "${DIES_EARLY:-}" ] || echo "{\"decisions\": $made}" >run-3/summary.json
}
python=python out=.
"""


def test_a_training_goes_on_begins_again_or_stays(tmp_path: Path) -> None:
    def train(**environment: str) -> int:
        script = f"set -euo pipefail; source {ROOT}/scripts/reproduction.sh; {TRAIN} train run-3 100 --one two"
        environment = {**os.environ, **environment}
        return subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, timeout=60).returncode

    begin = "-m dsrl_async.launch --one two --seed 3 --run-dir run-3 --max-decisions 100 --log.console plain"
    resume = "-m dsrl_async.launch --resume run-3 --max-decisions 100 --log.console plain"
    assert train(DIES_EARLY="1") == 1
    (tmp_path / "run-3" / "metrics.jsonl").write_text("")
    assert train(STEPS_AT_ONCE="60") == 1
    assert not (tmp_path / "run-3" / "metrics.jsonl").exists(), "a directory without checkpoint would be refused"
    assert train(STEPS_AT_ONCE="60") == 0
    assert train() == 0
    assert (tmp_path / "asked").read_text().splitlines() == [begin, begin, resume]
