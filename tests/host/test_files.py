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


def trace(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced and renamed from now on, in order, by file name."""
    done: list[str] = []
    rename = Path.replace

    def note_rename(path: Path, target: Path) -> Path:
        done.append(f"rename {path.name} {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", lambda fd: done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}"))
    monkeypatch.setattr(Path, "replace", note_rename)
    return done


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = trace(monkeypatch)
    files.write_text(tmp_path / "file", "text")
    assert done == ["sync .file.tmp", "rename .file.tmp file", f"sync {tmp_path.name}"]


def test_a_directory_is_on_the_disk_from_the_inside_out_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, beats = trace(monkeypatch), []
    with files.replacing(tmp_path / "directory", lambda: beats.append(len(done))) as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "a").touch()
        (temporary / "b").touch()
    last = ["sync .directory.tmp", "rename .directory.tmp directory", f"sync {tmp_path.name}"]
    assert done[-3:] == last
    assert sorted(done[:-3]) == ["sync a", "sync b", "sync inner"]
    assert done.index("sync a") < done.index("sync inner")
    assert beats == [0, 1, 2, 3]  # a sign of life before each wait for the disk


def test_a_link_in_the_place_of_a_temporary_file_is_removed_and_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").touch()
    files.temporary_path(tmp_path / "file").symlink_to(target)
    files.write_text(tmp_path / "file", "text")
    assert (target / "mine").is_file()
    assert not files.temporary_path(tmp_path / "file").is_symlink()


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    left = files.temporary_path(tmp_path / "file")
    for make in (left.touch, left.mkdir):
        make()
        files.write_text(tmp_path / "file", "text")
        assert contents(tmp_path) == {"file": "text"}
        assert not left.exists()
