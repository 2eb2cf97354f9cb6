"""Reads YAML as the command line reads options: a scalar is text, and what it means is left to the setting's type.

So a file means what it looks like, which YAML 1.1 does not grant: `off` is a word, `010` is ten, `1:30` no number of
seconds, `1e5` a number, `true` none, and a directory may be called 2026. Only an empty value, `null` and `~` are null.
Mappings, lists, comments, quotes, anchors and merge keys are those of YAML; tags are refused, so nothing is executed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dsrl_async import untrusted
from dsrl_async.untrusted import shown

LARGEST = 256_000
"""Bytes of a file at most; a file with every setting has about 3 kB."""
MOST_VALUES = 10_000
"""Values that a file may hold at most, with those that aliases repeat."""
DEEPEST = 20
"""Upper limit on the depth of values in values."""
NULLS = ("", "~", "null", "Null", "NULL")
MERGE = "<<"
NUMBER = re.compile(r"[+-]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})([eE][+-]?[0-9]{1,3})?")
"""A plain scalar that `guess` takes for a number."""


def read(path: Path) -> Any:
    """What a YAML file says: None, text, and lists and dicts of these, whose keys are text.

    Raises ValueError, in one sentence that names the file, if it cannot be read or is not YAML, says something twice,
    or is larger than any file of settings.
    """
    return parse(untrusted.read_text(path, LARGEST), str(path))


def parse(text: str, source: str) -> Any:
    """What a YAML text says, see `read`; `source` names it in messages."""
    try:
        return _Reader(text).document()
    except yaml.MarkedYAMLError as error:
        words = f"{error.context}: {error.problem}" if error.context else str(error.problem)
        message = f"{' '.join(words.split())}{_line(error.problem_mark)}"
    except yaml.reader.ReaderError as error:
        message = f"it has a character of number {error.character}, which YAML does not allow"
    except _Refused as error:
        message = str(error)
    except (ValueError, OverflowError):  # of `chr`, which PyYAML calls for an escape such as "\UFFFFFFFF"
        message = "it has an escape for a character that does not exist"
    raise ValueError(f"{source} is not valid YAML: {message}")


class Quoted(str):
    """The text of a scalar that stands in quotes, or in a block: it is text whatever it looks like."""

    __slots__ = ()


def guess(value: Any) -> Any:
    """What a value of `parse` means where no setting's type says it: plain scalars that look like numbers, `true` or
    `false` are such, and all others are text."""
    if isinstance(value, dict):
        return {str(key): guess(item) for key, item in value.items()}
    if isinstance(value, list):
        return [guess(item) for item in value]
    if isinstance(value, Quoted):
        return str(value)
    if value in ("true", "false"):
        return value == "true"
    if isinstance(value, str) and NUMBER.fullmatch(value):
        return int(value) if value.lstrip("+-").isdigit() else float(value)
    return value


class _Refused(Exception):
    def __init__(self, problem: str, event: yaml.Event) -> None:
        super().__init__(problem + _line(event.start_mark))


def _line(mark: Any) -> str:
    return f" (line {mark.line + 1})" if mark is not None else ""


class _Reader:
    """Makes values of the events that PyYAML parses a text into, one after another."""

    def __init__(self, text: str) -> None:
        self._events: Iterator[yaml.Event] = yaml.parse(text, yaml.SafeLoader)
        self._anchors: dict[str, tuple[Any, int]] = {}
        """What an anchor names, and how many values that is."""
        self._count = 0

    def document(self) -> Any:
        next(self._events)  # the stream's start
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        value = self._value(next(self._events), 0)
        next(self._events)  # the document's end
        if not isinstance(event := next(self._events), yaml.StreamEndEvent):
            raise _Refused("there is a second document", event)
        return value

    def _value(self, event: yaml.Event, depth: int) -> Any:
        before = self._count
        self._add(1, event)
        if depth > DEEPEST:
            raise _Refused(f"it is nested more than {DEEPEST} deep", event)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise _Refused(f"nothing before it is called {shown(event.anchor)}", event)
            value, count = self._anchors[event.anchor]
            self._add(count - 1, event)
            return copy.deepcopy(value)
        assert isinstance(event, yaml.NodeEvent)
        if (tag := getattr(event, "tag", None)) is not None:
            raise _Refused(f"the tag {shown(tag)} is refused; write the value alone", event)
        if isinstance(event, yaml.ScalarEvent):
            if not is_text(event.value):
                raise _Refused(f"{shown(event.value)} has characters that are no text", event)
            plain = None if event.value in NULLS else event.value
            value = plain if event.style is None else Quoted(event.value)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = [self._value(item, depth + 1) for item in self._until(yaml.SequenceEndEvent)]
        else:
            value = self._mapping(depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, self._count - before)
        return value

    def _mapping(self, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for event in self._until(yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
                raise _Refused("a key must be a word", event)
            key, value = event.value, self._value(next(self._events), depth + 1)
            if key in own:
                raise _Refused(f"the key {shown(key)} is there twice", event)
            own[key] = value
            if key == MERGE and event.style is None:
                for mapping in value if isinstance(value, list) else [value]:
                    if not isinstance(mapping, dict):
                        raise _Refused(f"{MERGE} must be followed by a mapping, such as *name", event)
                    merged = mapping | merged
        if merged:
            del own[MERGE]
        return merged | own

    def _until(self, end: type[yaml.Event]) -> Iterator[yaml.Event]:
        while not isinstance(event := next(self._events), end):
            yield event

    def _add(self, count: int, event: yaml.Event) -> None:
        self._count += count
        if self._count > MOST_VALUES:
            raise _Refused(f"it has more than {MOST_VALUES} values", event)


def is_text(value: str) -> bool:
    """Whether a string has neither a null character nor a half of one, so that a file may have it as its name."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
