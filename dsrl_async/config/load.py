"""Reads and checks a configuration, and turns one into YAML."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dsrl_async.config import strict_yaml
from dsrl_async.config.settings import DELETED, Config, ConfigError, OnResume
from dsrl_async.untrusted import shown


def leaf_fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, pydantic FieldInfo) of every setting, in the order in which they are declared."""
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from leaf_fields(annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def is_mapping(field: Any) -> bool:
    """Whether a setting, given by its pydantic FieldInfo, is a mapping whose values may be of any type."""
    return typing.get_origin(field.annotation) is dict


def on_resume(field: Any) -> OnResume:
    """What becomes of a setting that is changed when a run is resumed, by its pydantic FieldInfo."""
    (fate,) = (mark for mark in field.metadata if isinstance(mark, OnResume))
    return fate


def suggestion(unknown: str, known: Iterable[str], what: str, lists: str = "--help-all") -> str:
    """The end of a sentence about a name that nobody knows: the nearest of the `known` ones, or how to list `what`."""
    near = difflib.get_close_matches(unknown, list(known), n=1, cutoff=0.7)
    return f"; did you mean {near[0]!r}?" if near else f"; {lists} lists all {what}"


ON_THE_COMMAND_LINE = {
    "resume": "give it on the command line, --resume RUN; the settings are those of that run",
    "config": "a file cannot name another; merge the two, or give the other's settings on the command line",
    "help_all": "give it on the command line",
}
"""What a file cannot say, and what to do instead."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the settings of a YAML file, nested by section, whose scalars are text (`strict_yaml`).

    Keys may be dotted, such as `sac.gamma: 0.9`. Raises ConfigError with one sentence if that cannot be done.
    """
    try:
        content = strict_yaml.read(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `key: value` lines")
    for key, advice in ON_THE_COMMAND_LINE.items():
        if content.get(key) is not None:
            raise ConfigError(f"{path}: {key} cannot stand in a file; {advice}")
    keys = [key for key, _ in leaf_fields()]
    settings = {key: value for key, value in content.items() if "." not in key}
    for name in {key.rpartition(".")[0] for key in keys} & settings.keys():
        _section(settings, name)
    for key in content.keys() - settings.keys():
        if key not in keys:
            raise ConfigError(_unknown(key))
        section, _, name = key.rpartition(".")
        if name in _section(settings, section):
            raise ConfigError(f"{path} says {key} twice, in its section and with a dot")
        set_key(settings, key, content[key])
    for key in (key for key, field in leaf_fields() if is_mapping(field)):
        section, _, name = key.rpartition(".")
        if section in settings and name in settings[section]:
            settings[section][name] = strict_yaml.guess(settings[section][name])
    return settings


def _section(settings: dict[str, Any], dotted: str) -> dict[str, Any]:
    """A section of nested settings, made if there is none; raises ConfigError if there is a value in its place."""
    for name in dotted.split("."):
        if (child := settings.get(name)) is None:
            child = settings[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{name}: must be a section with keys, not {shown(child)}")
        settings = child
    return settings


def set_key(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key in nested settings; raises ConfigError if a section of it is not one."""
    section, _, name = key.rpartition(".")
    (_section(settings, section) if section else settings)[name] = value


def read_run_settings(run_dir: Path) -> dict[str, Any]:
    """Read the settings that a run was made with, without those that have been deleted since."""
    settings = read_yaml(run_dir / "config.yaml")
    for key in DELETED:
        *sections, name = key.split(".")
        section: Any = settings
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(name, None)
    return settings


def validate(settings: dict[str, Any]) -> Config:
    """Turn nested settings into a `Config`; raises ConfigError naming the first thing that is wrong."""
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from error


def get_key(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _sentence(error: ValidationError) -> str:
    """The first fault that pydantic found, in our words."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if key in DELETED:
        return f"{key} is no longer a setting: {DELETED[key]}"
    if first["type"] == "extra_forbidden":
        return _unknown(key)
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, got {shown(first['input'])}"


def _unknown(key: str) -> str:
    return f"unknown key {shown(key)}" + suggestion(key[:100], (name for name, _ in leaf_fields()), "keys")


def to_yaml(config: Config) -> str:
    """The resolved configuration as the text of a YAML file, without what it resumes."""
    return yaml.dump(config.model_dump(mode="json") | {"resume": None}, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Puts texts in quotes that `strict_yaml.guess` would else take for something else, such as `1e5`."""


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if strict_yaml.guess(text) == text else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _write_text)
