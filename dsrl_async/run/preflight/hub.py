"""Policies and tokenizers from the Hugging Face hub: they are downloaded before a run starts, in a process of its own.

The settings then name the commit, and everyone else sees a directory of the hub's cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from dsrl_async.config.hub import FROM_HUB, HubName, hub_name
from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.host import processes
from dsrl_async.host.files import write_text
from dsrl_async.untrusted import read_object

POLL_S = 0.2


def do_nothing() -> None:
    """Nobody wants to interrupt."""


def fetch_policy(config: Config, meanwhile: Callable[[], object] = do_nothing) -> Config:
    """Download what the settings name on the hub, unless it is there; returns the settings with the commits.

    `meanwhile` is called now and then, and may raise, which ends the download; the next one goes on from there.

    Raises:
        ConfigError: it cannot be had. The message is one sentence.
    """
    pinned = {}
    for setting in FROM_HUB:
        given = getattr(config.policy, setting)
        if given is None or (name := hub_name(given)) is None:
            continue
        try:
            pinned[setting] = str(name if complete(name, setting) else _download(name, setting, meanwhile))
        except ValueError as error:
            raise ConfigError(f"policy.{setting}: {error}") from error
    return config.model_copy(update={"policy": config.policy.model_copy(update=pinned)})


def complete(name: HubName, setting: str) -> bool:
    """Whether all that a download for this setting of `policy` fetches is in the cache."""
    if not name.pinned:
        return False
    try:
        files = read_object(_record(name, setting))["files"]
        return all((name.directory / file).stat().st_size == size for file, size in files.items())
    except (ValueError, KeyError, AttributeError, OSError):
        return False


def _record(name: HubName, setting: str) -> Path:
    """Where it stands which files of a commit a download has fetched: the hub's cache does not say what is missing."""
    return name.folder / "dsrl_async" / f"{name.revision}-{setting}.json"


def write_record(name: HubName, setting: str, files: Mapping[str, int]) -> None:
    """Note that these files of a commit, with these sizes in bytes, are in the cache."""
    path = _record(name, setting)
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps({"files": dict(files)}, indent=2) + "\n")


def _download(name: HubName, setting: str, meanwhile: Callable[[], object]) -> HubName:
    """Download in a process of its own, which shows its progress on stderr; returns the name with its commit.

    So the hub's library and its threads are in no process that starts others, and what hangs can be ended.
    """
    job = json.dumps({"parent": os.getpid(), "name": name, "setting": setting})
    process = subprocess.Popen(
        [sys.executable, "-m", "dsrl_async.run.preflight.download", job],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    try:
        while True:
            try:
                output, _ = process.communicate(timeout=POLL_S)
                break
            except subprocess.TimeoutExpired:
                meanwhile()
    finally:
        processes.kill_all([process])
    lines = output.decode(errors="replace").splitlines()
    if process.returncode or not lines:
        meanwhile()  # Ctrl-C reaches both
        raise ValueError(f"downloading {name} ended with {processes.how_ended(process.returncode)}; try again")
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise ValueError(answer["error"])
    return HubName(name.repository, answer["commit"])
