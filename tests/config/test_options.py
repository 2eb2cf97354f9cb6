"""`env.options`: a mapping whose values nobody's type explains, in a file and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsrl_async.config.command_line import load_config
from dsrl_async.config.load import read_yaml, to_yaml, validate
from dsrl_async.config.settings import ConfigError

MEANT = [
    ("{size: 64, scale: 0.5}", {"size": 64, "scale": 0.5}),
    ("{size: '64', word: off, path: 2026-01-01}", {"size": "64", "word": "off", "path": "2026-01-01"}),
    ("{a: 1e-3, b: -2, c: +3, d: .5, e: 1., f: 010}", {"a": 1e-3, "b": -2, "c": 3, "d": 0.5, "e": 1.0, "f": 10}),
    ("{a: true, b: false, c: null, d: ~, e: yes}", {"a": True, "b": False, "c": None, "d": None, "e": "yes"}),
    ("{a: \"true\", b: 'null', c: 1.2.3, d: 1_000}", {"a": "true", "b": "null", "c": "1.2.3", "d": "1_000"}),
    ("{keys: [a/b, 3], of: {deep: [1, {x: 'y'}]}}", {"keys": ["a/b", 3], "of": {"deep": [1, {"x": "y"}]}}),
    ("{}", {}),
    ("null", {}),
]


@pytest.mark.parametrize(("text", "meant"), MEANT)
def test_a_value_means_what_it_looks_like_on_the_command_line_and_in_a_file(
    tmp_path: Path, text: str, meant: dict[str, Any]
) -> None:
    given = load_config(["--env.options", text]).env.options
    assert (given, str(given)) == (meant, str(meant))  # 1 and True are equal
    for number, content in enumerate((f"env:\n  options: {text}\n", f"env.options: {text}\n")):
        (tmp_path / f"{number}.yaml").write_text(content)
        assert str(load_config(["--config", str(tmp_path / f"{number}.yaml")]).env.options) == str(meant)


def test_a_section_of_a_file_is_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "env:\n  name: my_env:make\n  options:\n    size: 64\n    names: &these\n      - a\n    more: *these\n"
    )
    assert load_config(["--config", str(path)]).env.options == {"size": 64, "names": ["a"], "more": ["a"]}
    path.write_text("env:\n  options:\n    # size: 64\n")
    assert load_config(["--config", str(path)]).env.options == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("size=64", r"env\.options: must be a mapping, such as \{key: value\}, not 'size=64'"),
        ("[size]", r"env\.options: must be a mapping, such as \{key: value\}, not '\[size\]'"),
        ("{size: 64", r"env\.options: '\{size: 64' is not a valid mapping, such as \{key: value\}"),
        ("{size:64}", r"env\.options: 'size:64' cannot be the name of a keyword argument"),
        ("{my-size: 64}", r"env\.options: 'my-size' cannot be the name of a keyword argument"),
        ("{size: 1e999}", r"env\.options: size must be made of text, finite numbers, true, false, null, lists and"),
    ],
)
def test_what_is_no_mapping_is_one_sentence(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^{words}"):
        load_config(["--env.options", text])


def test_values_from_python_are_taken_as_they_are() -> None:
    assert validate({"env": {"options": {"size": "64"}}}).env.options == {"size": "64"}
    for value in (object(), float("nan"), (1, 2), {1: 2}, b"x", 2**63, 10**400):
        with pytest.raises(ConfigError, match=r"^env\.options: size must be made of text"):
            validate({"env": {"options": {"size": value}}})


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))


@settings(max_examples=50, deadline=None)
@example({"text": ["1e5", "010", "1.", "true", "null", "~", "", "off", "a: b", "1:30", "\n"], "number": 1e22})
@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), values, max_size=4))
def test_a_runs_options_are_the_same_when_it_is_resumed(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("run") / "config.yaml"
    path.write_text(to_yaml(validate({"env": {"options": options}})))
    assert repr(validate(read_yaml(path)).env.options) == repr(options)
