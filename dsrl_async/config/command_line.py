"""The command line: an option for every setting, its help, and the sentences about what is wrong with one."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dsrl_async import untrusted
from dsrl_async.config import strict_yaml
from dsrl_async.config.files import PATHS, read_config
from dsrl_async.config.hub import is_of_hub
from dsrl_async.config.load import is_mapping, leaf_fields, read_run_settings, set_key, suggestion, validate
from dsrl_async.config.settings import DELETED_OPTIONS, Config, ConfigError, PolicyConfig, ReplayConfig

COMMANDS = ("launch", "evaluate", "report", "plan", "doctor", "bench")
"""Each is a folder of this package."""

COMMON = (
    *("actors", "seed", "run_dir", "max_minutes", "max_decisions", "stop_at_success", "replay_ratio", "resume"),
    *("serial", "profile", "env.name", "env.layout", "policy.checkpoint", "policy.denoise_steps"),
    "sac.action_magnitude",
)
"""Settings that `launch --help` shows."""

WIDEST = 120
"""Columns of the help at most; longer lines are hard to read."""


def program(command: str) -> str:
    """How to call a command, in the way this process was called: `dsrl-NAME`, or `python -m dsrl_async.NAME`."""
    console_script = Path(sys.argv[0]).name in [f"dsrl-{name}" for name in COMMANDS]
    return f"dsrl-{command}" if console_script else f"python -m dsrl_async.{command}"


def type_name(annotation: Any) -> str:
    """A setting's type as a user would write it, such as `int`, `a|b`, `[float, float]` or `int|null`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return "|".join(str(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return "|".join(type_name(argument) for argument in arguments)
    if origin is dict:
        return "{key: value, ...}"
    if origin in (list, tuple):
        return "[" + ", ".join(type_name(a) for a in arguments) + (", ...]" if origin is list else "]")
    return str(annotation.__name__)


class HelpFormatter(argparse.HelpFormatter):
    """Help that uses the width of the terminal and shows one name of an option that has two."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, WIDEST)
        super().__init__(prog, max_help_position=width // 3, width=width - 2)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = action.option_strings
        action.option_strings = [name for name in names if "_" not in name]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = names


class Parser(argparse.ArgumentParser):
    """Raises as a ConfigError what argparse would print before it ends the process."""

    def __init__(self, *, formatter_class: type[argparse.HelpFormatter] = HelpFormatter, **options: Any) -> None:
        super().__init__(formatter_class=formatter_class, allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        for argument in given:
            option, equals, value = argument.partition("=")
            if option.startswith("--") and equals and value == "--":  # argparse would make an empty list of it
                raise ConfigError(f"{untrusted.shown(option)[1:-1]}: -- is no value")
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> typing.NoReturn:
        _, _, unknown = message.partition("unrecognized arguments: ")
        if unknown.startswith("--"):
            option = unknown.split()[0].partition("=")[0]
            if (key := option.removeprefix("--").replace("-", "_")) in DELETED_OPTIONS:
                raise ConfigError(f"{option} is no longer an option: {DELETED_OPTIONS[key]}")
            known = self._option_string_actions
            message += suggestion(option, known, "options", "--help-all" if "--help-all" in known else "--help")
        raise ConfigError(untrusted.in_one_line(message))


class _HelpAll(argparse.Action):
    """Prints the help of the parser that `build` makes and ends the process, as `--help` does with this parser's."""

    def __init__(self, option_strings: Sequence[str], dest: str, build: Callable[[], Parser], help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)
        self.build = build

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> typing.NoReturn:
        self.build().print_help()
        parser.exit()


def add_help_all(parser: Parser, build: Callable[[], Parser]) -> None:
    """Add `--help-all`, which prints the help of the parser that `build` makes: that with all settings."""
    parser.add_argument("--help-all", action=_HelpAll, build=build, help="show all settings, too, and exit")


def build_parser(all_settings: bool = False) -> Parser:
    """The command line of `launch`: `--config` and one option for every key of `Config`.

    All of them can be given. `--help` shows those that everyone uses, or `all_settings`.
    """
    parser = Parser(
        prog=program("launch"),
        usage="%(prog)s [--config YAML] [--SETTING VALUE ...]",
        description="Steer a frozen flow-matching policy with DSRL, asynchronously.",
        epilog=None if all_settings else "--help-all shows the other settings, such as those of the SAC agent.",
    )
    add_help_all(parser, lambda: build_parser(all_settings=True))
    parser.add_argument("--config", metavar="YAML", help="settings: a file, or the name of one that is shipped")
    fields = dict(leaf_fields())
    add_settings(parser.add_argument_group("settings that most runs use"), {key: fields.pop(key) for key in COMMON})
    add_sections(parser, fields, shown=all_settings)
    return parser


def add_sections(parser: Parser, fields: Mapping[str, Any], shown: bool) -> None:
    """Add an option for each of the settings `fields`, in a group for each section; `--help` can do without them."""
    of_section: dict[str, dict[str, Any]] = {}
    for key, field in fields.items():
        of_section.setdefault(key.rpartition(".")[0], {})[key] = field
    for section, own in of_section.items():
        kind = Config.model_fields[section].annotation if section else Config
        assert kind is not None
        assert kind.__doc__ is not None
        add_settings(parser.add_argument_group(kind.__doc__.removesuffix(".")), own, shown)


def add_settings(parser: argparse._ActionsContainer, fields: Mapping[str, Any], shown: bool = True) -> None:
    """Add an option for each of the settings `fields`, by dotted key; `override` takes what they give."""
    for key, field in fields.items():
        flag = key.replace("_", "-")
        kind = type_name(field.annotation).removesuffix("|null")
        scalar = kind in ("bool", "float", "int", "str")
        facts = [] if scalar else [kind.replace("|", " | ")]
        if field.default is not None:
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            facts.append(f"default {str(default).lower()}")
        words = f"{field.description} ({'; '.join(facts)})" if facts else field.description
        parser.add_argument(
            *dict.fromkeys((f"--{flag}", f"--{key}")),
            dest=key,
            default=argparse.SUPPRESS,
            metavar=kind.upper() if scalar else "VALUE",
            help=words.replace("%", "%%") if shown else argparse.SUPPRESS,
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
        run_dir = find_run(Path(run))
        settings = read_run_settings(run_dir)
        if not settings:
            raise ConfigError(f"--resume {run}: its config.yaml is empty; restore it, or start a new run")
        settings["run_dir"] = str(run_dir)
    elif path is not None:
        settings = read_config(path)
    override(settings, options)
    return validate(settings)


def find_run(given: Path) -> Path:
    """The run directory that `given` is, or that it lies in as a checkpoint; raises ConfigError if there is none.

    A run's checkpoints are where one finds them in it, wherever links lead to from there.
    """
    if os.path.isfile(given / "config.yaml"):
        return given
    for place in (given.absolute(), given.resolve()):
        for checkpoints in (place, place.parent):
            if checkpoints.name == "checkpoints" and os.path.isfile(checkpoints.parent / "config.yaml"):
                return checkpoints.parent
    raise ConfigError(
        f"--resume {given}: not a run directory, since it has no config.yaml, nor a checkpoint in one; give one like "
        "runs/NAME or runs/NAME/checkpoints/UPDATES-DECISIONS"
    )


def override(settings: dict[str, Any], options: Mapping[str, str]) -> None:
    """Put the text of command-line options, by dotted key, into nested settings."""
    for key, text in options.items():
        set_key(settings, key, parse_value(key, text))


def parse_value(key: str, text: str) -> Any:
    """Turn an option's text into what `read_yaml` would give; scalars are left to the typed validation."""
    if text == "null":
        return None
    mapping = is_mapping(dict(leaf_fields())[key])
    if text.startswith("{" if mapping else "["):
        try:
            value = strict_yaml.parse(text, key)
        except ValueError as error:
            kind = "mapping, such as {key: value}" if mapping else "list"
            raise ConfigError(f"{key}: {untrusted.shown(text)} is not a valid {kind}") from error
        return strict_yaml.guess(value) if mapping else value
    return text


def make_demonstrations_absolute(replay: ReplayConfig) -> None:
    """As `make_paths_absolute`, for the files of demonstrations."""
    if replay.demonstrations is not None:
        replay.demonstrations = [str(Path(path).absolute()) for path in replay.demonstrations]


def make_paths_absolute(policy: PolicyConfig) -> None:
    """Make relative paths absolute, so that the run can be resumed and evaluated from elsewhere."""
    for name in PATHS:
        path = getattr(policy, name)
        if path is not None and not is_of_hub(name, path):
            setattr(policy, name, str(Path(path).absolute()))
