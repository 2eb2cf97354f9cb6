"""Logs that cannot be opened, and their last lines."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
from support.full_disk import full_disk

from dsrl_async.host.files import open_to_append
from dsrl_async.host.logs import LogFile, open_log
from dsrl_async.host.processes import LONGEST_MESSAGE, how_ended, last_line


def is_null(fd: int) -> bool:
    try:
        return os.fstat(fd).st_rdev == os.stat(os.devnull).st_rdev
    finally:
        os.close(fd)


def test_a_log_is_appended_to_and_its_directory_made_anew(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "learner.log"
    for _ in range(2):
        fd = open_log(log)
        os.write(fd, b"line\n")
        os.close(fd)
    assert log.read_text() == "line\nline\n"
    assert not is_null(open_log(log))


def test_no_process_does_without_a_log_or_waits_for_it(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "link.log").symlink_to(victim)
    (tmp_path / "dangling.log").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.log")
    (tmp_path / "directory.log").mkdir()
    for name in ("link.log", "dangling.log", "pipe.log", "directory.log", "gone/logs/x.log"):
        assert is_null(open_log(tmp_path / name)), name
    assert victim.read_text() == "mine"
    assert not (tmp_path / "nothing").exists()
    assert not (tmp_path / "gone").exists()  # a run directory that was deleted stays so


def test_only_files_are_opened_to_append(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for name, number in (("link", errno.ELOOP), ("pipe", errno.EINVAL)):
        with pytest.raises(OSError, match=name) as caught:
            open_to_append(tmp_path / name)
        assert caught.value.errno == number


def test_a_message_that_does_not_fit_the_disk_is_missing_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = LogFile(tmp_path / "log")
    with full_disk(0):
        handler.handle(logging.makeLogRecord({"msg": "one"}))
    handler.handle(logging.makeLogRecord({"msg": "two"}))
    handler.close()
    assert (tmp_path / "log").read_text().endswith("two\n")
    assert capsys.readouterr().err == ""


def test_the_last_line_is_bounded_and_never_waited_for(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    before = log.stat().st_size
    assert last_line(log, before) == "it left no message"
    log.write_text("before\n" + "x" * 3_000_000 + "\nValueError: it broke\n\n")
    assert last_line(log, before) == "ValueError: it broke"
    log.write_text("x" * 3_000_000)
    assert last_line(log) == "x" * LONGEST_MESSAGE
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "gone", "."):
        assert last_line(tmp_path / name) == "it left no message"


def test_how_a_process_ended_has_words_for_every_signal() -> None:
    assert [how_ended(code) for code in (3, -9, -40)] == ["exit code 3", "killed by SIGKILL", "killed by signal 40"]
