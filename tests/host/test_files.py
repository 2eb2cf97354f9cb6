"""Files are there whole or not at all, also when the disk is full or the writer is killed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.full_disk import full_disk

from dsrl_async.host import files


def contents(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_a_file_is_replaced(tmp_path: Path) -> None:
    for text in ("one", "two"):
        files.write_text(tmp_path / "file", text)
        assert contents(tmp_path) == {"file": text}


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    files.write_text(tmp_path / "file", "old")
    with pytest.raises(OSError, match="File too large"), full_disk(1000):
        files.write_text(tmp_path / "file", "new" * 1000)
    assert contents(tmp_path) == {"file": "old"}


def test_a_full_disk_leaves_no_half_directory(tmp_path: Path) -> None:
    def write() -> None:
        with files.replacing(tmp_path / "directory") as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner" / "small").write_text("written")
            (temporary / "large").write_text("x" * 3000)

    with pytest.raises(OSError, match="File too large"), full_disk(1000):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_what_cannot_be_brought_to_the_disk_or_renamed_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    files.write_text(tmp_path / "file", "old")

    def fail(*arguments: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os if failing == "fsync" else Path, failing, fail)
    with pytest.raises(OSError, match="the disk is full"):
        files.write_text(tmp_path / "file", "new")
    assert contents(tmp_path) == {"file": "old"}


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "file", []

    def note(fd: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{fd}"), path.exists()))

    monkeypatch.setattr(os, "fsync", note)
    files.write_text(path, "text")
    assert synced == [(str(files.temporary_path(path)), False)]


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    left = files.temporary_path(tmp_path / "file")
    for make in (left.touch, left.mkdir):
        make()
        files.write_text(tmp_path / "file", "text")
        assert contents(tmp_path) == {"file": "text"}
        assert not left.exists()
