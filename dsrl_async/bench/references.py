"""The programs that this project is compared with: scripts/references, each in an environment of its own."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENTS = ROOT / ".reference"


def reference_command(environment: str, script: str, without: str) -> list[str]:
    """The command that runs a script of scripts/references in an environment.

    Raises ValueError if that does not exist. `without` are the options that measure without the reference.
    """
    directory, scripts = ENVIRONMENTS / environment, ROOT / "scripts" / "references"
    if not (directory / "complete").exists():
        raise ValueError(
            f"the environment {directory} is not there; make it with 'bash {scripts / 'setup.sh'} {environment}', or "
            f"measure without it with '{without}'"
        )
    return [str(directory / "bin" / "python"), str(scripts / script)]
