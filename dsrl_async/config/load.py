"""Reads and checks a configuration, and turns one into YAML."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dsrl_async.config.settings import DELETED, Config, ConfigError, OnResume


def leaf_fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, pydantic FieldInfo) of every setting, in the order in which they are declared."""
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from leaf_fields(annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def on_resume(field: Any) -> OnResume:
    """What becomes of a setting that is changed when a run is resumed, by its pydantic FieldInfo."""
    (fate,) = (mark for mark in field.metadata if isinstance(mark, OnResume))
    return fate


def suggestion(unknown: str, known: Iterable[str], what: str, lists: str = "--help-all") -> str:
    """The end of a sentence about a name that nobody knows: the nearest of the `known` ones, or how to list `what`."""
    near = difflib.get_close_matches(unknown, list(known), n=1, cutoff=0.7)
    return f"; did you mean {near[0]!r}?" if near else f"; {lists} lists all {what}"


class Loader(yaml.SafeLoader):
    """YAML 1.2 in what it takes for a boolean: `graphs: off` is a word, as it is on the command line."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [resolver for resolver in resolvers if resolver[0] != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; raises ConfigError with one sentence if that cannot be done."""
    try:
        settings = yaml.load(path.read_text(), Loader)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold `key: value` lines")
    return settings


def set_key(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key in nested settings; raises ConfigError if a section of it is not one."""
    *sections, name = key.split(".")
    for section in sections:
        child = settings.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{section} must be a section with keys, not {child!r}")
        settings = child
    settings[name] = value


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
        config = Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from error
    for key, field in leaf_fields():
        value = get_key(config, key)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}: must be a finite number ({field.annotation})")
    return config


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
        return f"unknown key {key!r}" + suggestion(key, (name for name, _ in leaf_fields()), "keys")
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, got {first['input']!r}"


def to_yaml(config: Config) -> str:
    """The resolved configuration as the text of a YAML file, without what it resumes."""
    return yaml.safe_dump(config.model_dump(mode="json") | {"resume": None}, sort_keys=False)
