"""What a user writes under `env.options` for an adapter of this package, checked one by one.

Each function returns the value of an option, or raises ValueError with a sentence that names the option.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from dsrl_async.untrusted import in_one_line, shown


def refusal(name: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"env.options: {name} must be {wanted}, not {shown(value)}")


def text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise refusal(name, "a text", value)
    return value


def texts(name: str, value: Any) -> tuple[str, ...]:
    """One text, or a list of them."""
    values = value if isinstance(value, list | tuple) else [value]
    if not values or not all(isinstance(item, str) and item.strip() for item in values):
        raise refusal(name, "a text or a list of texts", value)
    return tuple(values)


def whole(name: str, value: Any, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise refusal(name, f"a whole number of at least {least}", value)
    return value


def number(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise refusal(name, "a number", value)
    return float(value)


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise refusal(name, "true or false", value)
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise refusal(name, "a mapping, such as {key: value}", value)
    return dict(value)


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise refusal(name, f"one of {', '.join(choices)}", value)
    return str(value)


def function(name: str, value: Any) -> Callable[..., Any]:
    """The function that `package.module:function` names. Its module is imported."""
    module_name, _, path = text(name, value).partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise refusal(name, "like package.module:function", value)
    try:
        found = functools.reduce(getattr, path.split("."), importlib.import_module(module_name))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"env.options: {name}: {value} cannot be had: {in_one_line(error)}") from error
    if not callable(found):
        raise refusal(name, "a function", found)
    return found
