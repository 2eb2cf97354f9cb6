"""Models of the Hugging Face hub, as settings name them, and where the hub's cache keeps them.

`owner/name` is a model of the hub unless there is such a file or directory here, and `owner/name@REVISION` always is; a
path that begins with a point or a slash, or has not exactly one slash, never is. A run's configuration names the
commit, `owner/name@` and 40 digits, of which everyone can tell the directory. Nothing here uses the hub's library or
the network.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

FROM_HUB = ("checkpoint", "tokenizer")
"""The settings of `policy` that may name a model of the hub."""
_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"({_WORD}/{_WORD})(?:@([A-Za-z0-9_](?:[A-Za-z0-9_./-]{{0,200}}[A-Za-z0-9_])?))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubName(NamedTuple):
    """A model of the hub at a revision: a branch, a tag or a commit; None is the newest of the main branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never becomes another one."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def folder(self) -> Path:
        """Where the cache keeps all that it has of the model."""
        return cache() / f"models--{self.repository.replace('/', '--')}"

    @property
    def directory(self) -> Path:
        """The directory with the files of a commit."""
        assert self.pinned
        return self.folder / "snapshots" / str(self.revision)


def hub_name(text: str) -> HubName | None:
    """The model of the hub that a setting means, None if it means a path."""
    found = _NAME.fullmatch(text)
    if found is None or ".." in text or "--" in text or (found[2] is None and os.path.lexists(text)):
        return None
    return HubName(found[1], found[2])


def is_of_hub(setting: str, value: str) -> bool:
    """Whether the value of a setting of `policy` is a model of the hub, and no path."""
    return setting in FROM_HUB and hub_name(value) is not None


def local_path(text: str) -> str:
    """The path that a setting means: the directory of a commit of the hub, or what it says."""
    name = hub_name(text)
    return str(name.directory) if name is not None and name.pinned else text


def cache() -> Path:
    """The directory of the hub's cache, by the variables that its library heeds."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if not given:
        home = os.environ.get("HF_HOME")
        if not home:
            home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
        given = os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(given))).absolute()


def endpoint() -> str:
    """The address of the hub."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
