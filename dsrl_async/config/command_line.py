"""The command line: one option for every setting, and the sentences for what is wrong with one."""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from dsrl_async.config.load import leaf_fields, read_run_settings, read_yaml, set_key, suggestion, validate
from dsrl_async.config.settings import DELETED, Config, ConfigError, PolicyConfig


def type_name(annotation: Any) -> str:
    """A setting's type as a user would write it: `int`, `a|b`, `[float, float]`, `int|null`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return "|".join(str(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return "|".join(type_name(argument) for argument in arguments)
    if origin in (list, tuple):
        return "[" + ", ".join(type_name(a) for a in arguments) + (", ...]" if origin is list else "]")
    return str(annotation.__name__)


class Parser(argparse.ArgumentParser):
    """What argparse would print before it ends the process is raised as a ConfigError."""

    def error(self, message: str) -> typing.NoReturn:
        _, _, unknown = message.partition("unrecognized arguments: ")
        if unknown.startswith("--"):
            option = unknown.split()[0].partition("=")[0]
            if (key := option.removeprefix("--").replace("-", "_")) in DELETED:
                raise ConfigError(f"{option} is no longer an option: {DELETED[key]}")
            message += suggestion(option, self._option_string_actions, "options")
        raise ConfigError(message)


def build_parser() -> argparse.ArgumentParser:
    """The command line: `--config` and one option for every key of `Config`."""
    parser = Parser(
        prog="python -m dsrl_async.launch",
        description="Steer a frozen flow-matching policy with DSRL, asynchronously.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="YAML", help="file with settings; options override it")
    add_setting_options(parser, leaf_fields())
    return parser


def add_setting_options(parser: argparse._ActionsContainer, fields: Iterable[tuple[str, Any]]) -> None:
    """One option for each of the settings `fields`, as from `leaf_fields`; `override` takes what they give."""
    for key, field in fields:
        flag = key.replace("_", "-")
        names = [f"--{flag}"] if flag == key else [f"--{flag}", f"--{key}"]
        default = "null" if field.default is None else str(field.default).replace("%", "%%")
        parser.add_argument(
            *names,
            dest=key,
            default=argparse.SUPPRESS,
            metavar=type_name(field.annotation).upper() if field.annotation in (int, float, str) else "VALUE",
            help=f"{(field.description or '').replace('%', '%%')} ({type_name(field.annotation)}; default {default})",
            nargs="?" if field.annotation is bool else None,
            const="true" if field.annotation is bool else None,
        )


def load_config(argv: Sequence[str]) -> Config:
    """Build the configuration of a run from command-line arguments (without the program's name).

    Raises:
        ConfigError: with one sentence, for an unknown option or key, a wrong type or value, a combination that
            cannot work, or a configuration file that cannot be read.
    """
    options = vars(build_parser().parse_args(list(argv)))
    path, run = options.pop("config", None), options.get("resume")
    settings: dict[str, Any] = {}
    if run is not None:
        for name in ("config", "run_dir"):
            if path if name == "config" else name in options:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} cannot be combined with --resume: a resumed run keeps its own")
        if not (Path(run) / "config.yaml").is_file():
            raise ConfigError(
                f"--resume {run}: not a run directory, since it has no config.yaml; give one like runs/NAME"
            )
        settings = read_run_settings(Path(run))
        if not settings:
            raise ConfigError(f"--resume {run}: its config.yaml is empty; restore it, or start a new run")
        settings["run_dir"] = run
    elif path is not None:
        settings = read_yaml(Path(path))
    override(settings, options)
    return validate(settings)


def override(settings: dict[str, Any], options: Mapping[str, str]) -> None:
    """Put the text of command-line options, by dotted key, into nested settings."""
    for key, text in options.items():
        set_key(settings, key, parse_value(key, text))


def parse_value(key: str, text: str) -> Any:
    """Turn an option's text into what YAML would give; plain scalars are left to the typed validation."""
    if text == "null":
        return None
    if text.startswith(("[", "{")):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: {text!r} is not a valid list") from error
    return text


def make_paths_absolute(policy: PolicyConfig) -> None:
    """So that the run can be resumed and evaluated from elsewhere."""
    for name in ("checkpoint", "tokenizer", "norm_stats"):
        if (path := getattr(policy, name)) is not None:
            setattr(policy, name, str(Path(path).absolute()))
