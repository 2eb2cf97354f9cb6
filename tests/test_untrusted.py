"""Files that come from elsewhere: pipes, devices, huge, deep and ambiguous ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dsrl_async.untrusted import check_regular, parse_json, read_bytes, read_json, read_text


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text('{"größe": [1, 2]}', encoding="utf-8-sig")
    assert read_json(path) == {"größe": [1, 2]}
    assert check_regular(path) == path.stat().st_size


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "missing", "null character", "loop", "forbidden"])
def test_what_is_no_regular_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "it"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "directory":
            path.mkdir()
        case "null character":
            path = tmp_path / "a\0b"
        case "loop":
            path.symlink_to(path)
        case "forbidden":
            path.write_text("{}")
            path.chmod(0)
            if os.access(path, os.R_OK):
                pytest.skip("root may read everything")
    for read in (check_regular, read_bytes, read_text, read_json):
        with pytest.raises(ValueError, match="cannot be read"):
            read(path)


def test_only_files_of_plausible_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        read_bytes(path, 1000)
    assert check_regular(path) == 1 << 40


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply|is not JSON"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is there twice"),
        ("9" * 10_000, "is not JSON"),
        ("{", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_json_that_cannot_be_understood_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text, "config.json")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="not a text file in UTF-8"):
        read_text(path)
