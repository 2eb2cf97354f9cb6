"""Code that real processes meet when they start, by way of Python's sitecustomize hook: faults and delays."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

HOOK = """
import pathlib, sys
for module, code in {planted!r}.items():
    if module in sys.orig_argv:
        exec(code, {{}})
        (pathlib.Path(__file__).parent / ("met-" + module)).touch()
"""
DELAY = """
import importlib, time
owner = importlib.import_module({module!r})
*path, name = {function!r}.split(".")
for part in path:
    owner = getattr(owner, part)
original = getattr(owner, name)
def delayed(*arguments, **keywords):
    if {condition}:
        time.sleep({seconds})
    return original(*arguments, **keywords)
setattr(owner, name, delayed)
"""


class Planted:
    """Writes to `directory` what processes started as `python -m MODULE` do first, by module."""

    def __init__(self, directory: Path, planted: Mapping[str, str]) -> None:
        self.directory, self.modules = directory, set(planted)
        (directory / "sitecustomize.py").write_text(HOOK.format(planted=dict(planted)))
        path = os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))
        self.variables = {"PYTHONPATH": path}
        """To be in the environment of those processes."""

    def met(self) -> bool:
        """Whether processes of all the modules were started and went through the code to its end.

        Python goes on after an error in the hook, so a test that does not look plants nothing when a name has changed.
        """
        return self.modules == {path.name.removeprefix("met-") for path in self.directory.glob("met-*")}


def delay(function: str, seconds: float, condition: str = "True") -> str:
    """Code after which calls of `function`, as `module:Class.method`, take so much longer if `condition` holds for
    their `arguments`."""
    module, _, name = function.partition(":")
    return DELAY.format(module=module, function=name, seconds=seconds, condition=condition)
