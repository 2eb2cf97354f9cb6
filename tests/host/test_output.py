"""Standard descriptors that are missing, and output that nobody takes."""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsrl_async.host.output import MOST_WAITING, DetachedOutput, say

PIPE_BYTES = 4096


@pytest.fixture
def pipe() -> Iterator[tuple[int, io.TextIOWrapper]]:
    """A small pipe: the descriptor to read, and a stream to write."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    with os.fdopen(writer, "w") as stream:
        yield reader, stream
        with contextlib.suppress(OSError):
            os.close(reader)


def test_a_pipe_that_nobody_reads_makes_nobody_wait(pipe: tuple[int, io.TextIOWrapper]) -> None:
    reader, stream = pipe
    output = DetachedOutput(stream)
    begin = time.monotonic()
    for number in range(10_000):
        print(f"line {number:05}", file=output, flush=True)
    assert not output.finish(0.1)
    assert time.monotonic() - begin < 2.0
    read = b""
    while len(read) < MOST_WAITING:
        read += os.read(reader, 1 << 20)
    lines = read.decode().splitlines()
    assert lines == [f"line {number:05}" for number in range(len(lines))]  # the first ones, in their order
    os.close(reader)
    assert not output.finish(5.0)  # before the descriptor's number is another one's


def test_what_is_read_arrives_whole(pipe: tuple[int, io.TextIOWrapper]) -> None:
    reader, stream = pipe
    output, text = DetachedOutput(stream), "ähnlich " * 5000
    output.write(text)
    read = b""
    while len(read) < len(text.encode()):
        read += os.read(reader, 1000)
    assert read.decode() == text
    assert output.finish(5.0)


def test_a_descriptor_that_does_not_block_loses_nothing(pipe: tuple[int, io.TextIOWrapper]) -> None:
    reader, stream = pipe
    os.set_blocking(stream.fileno(), False)
    output = DetachedOutput(stream)
    output.write("x" * 3 * PIPE_BYTES)
    time.sleep(0.1)
    read = b""
    while len(read) < 3 * PIPE_BYTES:
        read += os.read(reader, 1000)
    assert output.finish(5.0)


@pytest.mark.parametrize("reads", [True, False])
def test_a_result_is_said_within_its_time(reads: bool, pipe: tuple[int, io.TextIOWrapper]) -> None:
    reader, stream = pipe
    if not reads:
        os.set_blocking(stream.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            for _ in itertools.count():
                os.write(stream.fileno(), b"x")
        os.set_blocking(stream.fileno(), True)
    begin = time.monotonic()
    with contextlib.redirect_stdout(stream):
        assert say("result", patience_s=0.3) is reads
    assert time.monotonic() - begin < 2.0
    assert not reads or os.read(reader, 100) == b"result\n"


def test_a_result_that_nobody_will_read_is_no_error(pipe: tuple[int, io.TextIOWrapper]) -> None:
    reader, stream = pipe
    os.close(reader)
    with contextlib.redirect_stdout(stream):
        assert not say("result")


PRINTS = """
import os, sys
from dsrl_async.host import output
from dsrl_async.host.command import guard
output.PATIENCE_S = output.LAST_WORDS_S = 0.3
def command():
    for number in range(int(sys.argv[1])):
        print("line", number)
    if sys.argv[2] == "forks":
        if not os.fork():
            sys.stdout.write("child\\n")  # at once: what a print writes in two parts the parent may come between
            sys.stdout.flush()
            os._exit(0)
        os.wait()
    if sys.argv[2] == "helps":
        sys.exit(0)
    if sys.argv[2] == "fails":
        raise ValueError("wrong")
sys.exit(guard(command))
"""


def prints(lines: int, what: str, stdout: int) -> tuple[int, str]:
    """Exit code and stderr of a command that prints so many lines."""
    called = [sys.executable, "-c", PRINTS, str(lines), what]
    done = subprocess.run(called, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=30)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [("ends", 1, "error: nobody has read what was printed\n"), ("helps", 0, ""), ("fails", 2, "error: wrong\n")],
)
def test_a_command_ends_though_nobody_reads_what_it_prints(
    what: str, code: int, words: str, pipe: tuple[int, io.TextIOWrapper]
) -> None:
    assert prints(10_000, what, pipe[1].fileno()) == (code, words)


@pytest.mark.parametrize(("what", "code", "words"), [("ends", 1, "error: [Errno 32] Broken pipe\n"), ("helps", 0, "")])
def test_a_command_whose_reader_is_gone_says_so_in_one_sentence(
    what: str, code: int, words: str, pipe: tuple[int, io.TextIOWrapper]
) -> None:
    os.close(pipe[0])
    assert prints(10_000, what, pipe[1].fileno()) == (code, words)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        assert prints(1, "ends", full.fileno()) == (1, "error: [Errno 28] No space left on device\n")


def test_all_arrives_what_a_command_prints_and_forks_print(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        assert prints(20_000, "forks", file.fileno()) == (0, "")
    text = (tmp_path / "out").read_text()
    assert text.count("child\n") == 1  # somewhere
    assert text.replace("child\n", "") == "".join(f"line {number}\n" for number in range(20_000))


MISSING = [closed for count in (1, 2, 3) for closed in itertools.combinations(range(3), count)]
SHOW = """
import os, sys
from dsrl_async.host.command import guard
def command():
    first = os.open("/dev/null", os.O_RDONLY)
    print("said", file=sys.stderr)
    print("result")
    stat = [os.fstat(number).st_rdev for number in range(3)]
    open(sys.argv[1], "w").write(repr((first, [os.get_inheritable(number) for number in range(3)], stat)))
    return 0
sys.exit(guard(command))
"""


@pytest.mark.parametrize("closed", MISSING)
def test_missing_standard_descriptors_are_opened(closed: tuple[int, ...], tmp_path: Path) -> None:
    close = " ".join(f"{number}{'<' if number == 0 else '>'}&-" for number in closed)
    shell = ["sh", "-c", f'exec "$@" {close}', "sh", sys.executable, "-c", SHOW, str(tmp_path / "found")]
    done = subprocess.run(shell, stdin=subprocess.PIPE, capture_output=True, timeout=60)
    assert done.returncode == 0, done
    first, inheritable, devices = eval((tmp_path / "found").read_text())
    assert first > 2
    assert inheritable == [True] * 3
    null = os.stat("/dev/null").st_rdev
    assert [number for number, device in enumerate(devices) if device == null] == list(closed)
    assert done.stdout == (b"" if 1 in closed else b"result\n")
    assert done.stderr == (b"" if 2 in closed else b"said\n")
