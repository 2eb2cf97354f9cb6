"""Faults of the product that the harness must find before its zeros count: patches, by the module that they change."""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

Patch = Callable[[ModuleType], None]


def noise_after_head(module: ModuleType) -> None:
    """A row counts as complete for 5 ms before its noise is there."""
    append = module.ReplayRing.append

    def late(self: Any, lane: int, noise: Any, *arguments: Any, **keywords: Any) -> None:
        row = (int(self.head[lane]) - 1) % self.rows_per_lane
        append(self, lane, self.rows["noise"][lane, row].copy(), *arguments, **keywords)
        time.sleep(0.005)
        self.rows["noise"][lane, row] = noise

    module.ReplayRing.append = late


def early_name(module: ModuleType) -> None:
    """Files and directories are written under their own names, so that a kill leaves half of them there."""

    @contextlib.contextmanager
    def replacing(path: Path, *rest: Any) -> Iterator[Path]:
        yield path

    module.replacing = replacing  # type: ignore[attr-defined]


def stale_answer(module: ModuleType) -> None:
    """An answer goes to whatever request is there now, though another process may have made it."""
    answer = module.Slots.answer

    def accepted(self: Any, lanes: Any, numbers: Any, *arguments: Any, **keywords: Any) -> Any:
        return answer(self, lanes, self.request_id[lanes].copy(), *arguments, **keywords)

    module.Slots.answer = accepted


def hang_in_stop(module: ModuleType) -> None:
    """The learner gives signs of life and never ends, once a stop has begun."""
    save = module.save

    def endless(*arguments: Any, **keywords: Any) -> Any:
        given = inspect.signature(save).bind(*arguments, **keywords).arguments
        while given["counters"].stop > 0:
            given["beat"]()
            time.sleep(0.1)
        return save(*arguments, **keywords)

    module.save = endless  # type: ignore[attr-defined]


def leaked_child(module: ModuleType) -> None:
    """A child process outlives its parent."""
    import ctypes

    prepare_child = module.prepare_child

    def unbound(*arguments: Any, **keywords: Any) -> None:
        prepare_child(*arguments, **keywords)
        ctypes.CDLL(None).prctl(1, 0)  # PR_SET_PDEATHSIG

    module.prepare_child = unbound  # type: ignore[attr-defined]


def leaked_descriptor(module: ModuleType) -> None:
    """Each start of a child process leaves an open file in the supervisor."""
    begin = module.Child.begin

    def wasteful(self: Any) -> None:
        os.open("/dev/null", os.O_RDONLY)
        begin(self)

    module.Child.begin = wasteful


def wrong_reason(module: ModuleType) -> None:
    """What befell the learner is told of the inference process, and the other way round."""
    name = module.Child.name.fget
    exchanged = {"learner": "inference", "inference": "learner"}
    module.Child.name = property(lambda self: exchanged.get(name(self), name(self)))


def no_sync(module: ModuleType) -> None:
    """Files are renamed into their places without having been written to the disk; see `hook.patch_files`."""


PLANTS: dict[str, dict[str, Patch]] = {
    "noise_after_head": {"dsrl_async.shm.replay": noise_after_head},
    "early_name": {"dsrl_async.host.files": early_name},
    "no_sync": {"dsrl_async.host.files": no_sync},
    "stale_answer": {"dsrl_async.shm.slots": stale_answer},
    "hang_in_stop": {"dsrl_async.run.checkpoints": hang_in_stop},
    "leaked_child": {"dsrl_async.host.processes": leaked_child},
    "leaked_descriptor": {"dsrl_async.run.supervisor.child": leaked_descriptor},
    "wrong_reason": {"dsrl_async.run.supervisor.child": wrong_reason},
}
EXPECTED = {
    "noise_after_head": "drawn rows",
    "early_name": "checkpoint",
    "no_sync": "renamed before it was synced",
    "stale_answer": "foreign answer",
    "hang_in_stop": "hang",
    "leaked_child": "leak",
    "leaked_descriptor": "descriptors",
    "wrong_reason": "false report",
}
"""The kind of finding that each planted fault is."""
