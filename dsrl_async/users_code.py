"""Code that users bring: their modules are imported, and what goes wrong in them is told with their own line."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsrl_async.untrusted import in_one_line, shown

FAULTS = (Exception, SystemExit)
"""What a user's code may raise; Ctrl-C is not its own."""


class Found(NamedTuple):
    """What a setting names."""

    function: Callable[..., Any]
    """A function, or a class."""
    path: str
    """Its name in the module."""
    module: str
    file: str


def check_path(key: str, name: str) -> None:
    """Raises ValueError unless the value of the setting `key` is like `package.module:function`."""
    module, colon, path = name.partition(":")
    if colon and (module.endswith(".py") or "/" in module):
        module = module.removesuffix(".py").strip("./").replace("/", ".")
        raise ValueError(f"{key}: {name} names a file; name the module, like {module}:{path}")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), *path.split("."))):
        raise ValueError(f"{key}: {shown(name)} is not like package.module:function")


def find(key: str, name: str, target: str) -> Found:
    """What the setting `key` calls `name`, which is the `target`, like `package.module:function`.

    Raises ValueError, naming the setting or the user's line, if there is no such function or class.
    """
    module_name, _, path = target.partition(":")
    module = _import(key, name, module_name)
    try:
        function = functools.reduce(getattr, path.split("."), module)
    except AttributeError:
        raise ValueError(f"{key}: {module.__file__} has no {path}, which {name} names") from None
    if not callable(function):
        raise ValueError(f"{key}: {path} in {module.__file__} is no function, but {shown(function)}")
    return Found(function, path, module_name, str(module.__file__))


def call(
    key: str, name: str, found: Found, arguments: Sequence[Any], options: Mapping[str, Any], sentences: bool = False
) -> Any:
    """What the function returns for `arguments` and `options`; the latter are those of the setting beside `key`.

    Raises ValueError, naming the user's line, if it cannot take them or raises something. With `sentences`, a
    ValueError of the function is a sentence for the user, and its line is not named.
    """
    try:
        signature = inspect.signature(found.function)
    except (TypeError, ValueError):  # some that are written in C have none
        pass
    else:
        try:
            signature.bind(*arguments, **options)
        except TypeError as error:
            section, takes = key.partition(".")[0], ", ".join(list(signature.parameters)[len(arguments) :])
            raise ValueError(f"{section}.options: {error}; {name} takes {takes or 'no options'}") from None
    try:
        return found.function(*arguments, **options)
    except FAULTS as error:
        if sentences and type(error) is ValueError:
            said, section = in_one_line(error), key.partition(".")[0]
            raise ValueError(said if said.startswith(f"{section}.") else f"{key}: {said}") from error
        raise ValueError(f"{key}: {blamed(error, found.module)}") from error


def see_working_directory() -> None:
    """Have modules found in the working directory, as `python -m` has: a console script has not."""
    with contextlib.suppress(OSError):  # it was deleted
        directory = os.getcwd()
        if "" not in sys.path and directory not in sys.path:
            sys.path.insert(0, directory)


def _import(key: str, name: str, module_name: str) -> Any:
    """The module of what the setting `key` calls `name`. Raises ValueError as `find` does."""
    see_working_directory()
    try:
        module = importlib.import_module(module_name)
    except FAULTS as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            where = f"the working directory {os.getcwd()}" if os.path.isdir(os.curdir) else "the working directory"
            raise ValueError(
                f"{key}: there is no module {missing} for {name}, neither installed, nor on PYTHONPATH, nor in "
                f"{where}; start from the directory that has it, or install it"
            ) from None
        raise ValueError(f"{key}: {blamed(error, module_name)}") from error
    if getattr(module, "__file__", None) is None:
        raise ValueError(f"{key}: {module_name} is a directory without a module's code; name a module in it")
    return module


def blamed(error: BaseException, module: str) -> str:
    """What a user's code has raised, and where: `my_env.py, line 12: ZeroDivisionError: division by zero`.

    The line is the last one of the user's own code on the way to the error: of the package of `module`, or of whatever
    is neither installed nor Python's.
    """
    kind, message = type(error).__name__, in_one_line(error)
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{_short(error.filename)}, line {error.lineno}: {kind}: {error.msg}"
    said = f"{kind}: {message}" if message else kind
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, ValueError) and frames and _is_in(frames[-1][0], PACKAGE):
        return message  # a sentence of this package
    top = sys.modules.get(module.partition(".")[0])
    own = getattr(top, "__file__", None)
    own = os.path.dirname(own) if own is not None and hasattr(top, "__path__") else own
    of_user = [frame for frame in frames if _is_users(frame[0], own)]
    elsewhere = [frame for frame in frames if not _is_in(frame[0], PACKAGE) and not frame[0].startswith("<")]
    for file, line in reversed(of_user or elsewhere):
        return f"{_short(file)}, line {line}: {said}"
    return said


PACKAGE = str(Path(__file__).resolve().parent)
LIBRARIES = ("site-packages", "dist-packages")


def _is_users(file: str, own: str | None) -> bool:
    if file.startswith("<") or _is_in(file, PACKAGE):
        return False
    if own is not None and _is_in(file, own):
        return True
    return not (set(Path(file).parts) & set(LIBRARIES)) and not any(
        _is_in(file, sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")
    )


def _is_in(file: str, place: str) -> bool:
    return file == place or file.startswith(place + os.sep)


def _short(file: str) -> str:
    """A path as seen from the working directory, if it is in it."""
    with contextlib.suppress(OSError):
        if _is_in(file, os.getcwd()):
            return os.path.relpath(file)
    return file
