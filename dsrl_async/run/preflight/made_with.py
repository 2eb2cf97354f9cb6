"""What a run was made with beside its settings: the policy itself, the simulator's version, a user's environment.

It stands in `<run>/made_with.json` from the first start on. Runs of earlier versions have none.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from dsrl_async.config.settings import ConfigError
from dsrl_async.host.files import write_text
from dsrl_async.pi0.identity import differences
from dsrl_async.run.preflight.checked_run import CheckedRun
from dsrl_async.untrusted import read_json, shown

logger = logging.getLogger(__name__)

FILE = "made_with.json"


def made_with(run: CheckedRun) -> dict[str, Any]:
    """The contents of the file for a run that starts now; raises ConfigError if the policy cannot be read any more."""
    try:
        policy = run.policy.identity(run.spec.prompts)
    except OSError as error:
        raise ConfigError(f"policy.checkpoint: {error.filename} cannot be read: {error.strerror}") from error
    found = {"policy": policy, "packages": run.environment.versions()}
    if run.environment.file is not None:
        found["environment"] = {"file": run.environment.file, "spec": run.spec._asdict()}
    return found


def record_made_with(run_dir: Path, found: dict[str, Any]) -> None:
    """Write the file."""
    write_text(run_dir / FILE, json.dumps(found, indent=2) + "\n")


def check_made_with(run_dir: Path, now: dict[str, Any], policy: Path | str) -> list[str]:
    """Check that a run is resumed with its own policy; returns what else has changed, such as `mujoco 3.3.2 -> 3.17.0`.

    `policy` is the directory of the policy that `now` describes. That a run has no such file is logged.

    Raises:
        ConfigError: it is another policy, or the file is damaged.
    """
    path = run_dir / FILE
    if not path.is_file():
        logger.warning("with which policy the run was made was not recorded; it goes on with %s", policy)
        return []
    try:
        before = read_json(path)
    except ValueError as error:
        raise ConfigError(f"{error}; restore it, or remove it to resume whatever the policy is") from error
    if not (
        isinstance(before, dict)
        and isinstance(before.get("policy"), dict)
        and isinstance(before["policy"].get("config", {}), dict)
        and isinstance(before.get("packages"), dict)
    ):
        raise ConfigError(f"{path} is damaged; restore it, or remove it to resume whatever the policy is")
    if differing := list(differences(before["policy"], now["policy"])):
        raise ConfigError(
            f"policy.checkpoint: {policy} is not the policy that the resumed run was made with, it differs in "
            f"{', '.join(differing)}; give that policy with policy.checkpoint, or start a new run"
        )
    names = sorted(before["packages"].keys() | now["packages"].keys())
    versions = [(name, before["packages"].get(name), now["packages"].get(name)) for name in names]
    versions += _check_environment(before.get("environment"), now.get("environment"))
    return [f"{name} {old or 'none'} -> {new or 'none'}" for name, old, new in versions if old != new]


def _check_environment(before: Any, now: Any) -> list[tuple[str, str, str]]:
    """What else is worth comparing of a user's environment; raises ConfigError if it has other shapes now."""
    if not (isinstance(before, dict) and isinstance(before.get("spec"), dict) and isinstance(now, dict)):
        return []  # nobody has noted it
    for field, value in now["spec"].items():
        old = before["spec"].get(field)
        if old != (list(value) if isinstance(value, tuple) else value):
            raise ConfigError(
                f"env.name: the {field} of the environment in {now['file']} is {shown(value)}, and was {shown(old)} "
                "when the resumed run was made; make it so again, or start a new run"
            )
    return [("environment", str(before.get("file")), now["file"])]
