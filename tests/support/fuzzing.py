"""What every reader of files is held to, whatever stands in them, and the changes that are made to valid ones.

DSRL_FUZZ_EXAMPLES=100000 python -m pytest -s --timeout 0 tests/config/test_fuzz.py tests/envs/test_fuzz.py
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("DSRL_FUZZ_EXAMPLES", "40"))
SECONDS = 3.0
"""CPU time that a file may take. A valid one takes milliseconds."""
FORBIDDEN = {
    *("exec", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class"),
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "socket.connect", "ctypes.dlopen"),
}
"""Audit events that reading a file must not cause."""
RESULTS: Counter[str] = Counter()
"""How many inputs of a format were accepted, and refused. By hand, they are printed at the end."""
if EXAMPLES > 1000:
    atexit.register(lambda: print(f"\n{dict(RESULTS)}", file=sys.__stderr__))

fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

_allowed: str | None = None
_seen: list[str] = []


def _watch(event: str, arguments: tuple) -> None:
    if _allowed is None:
        return
    if event in FORBIDDEN:
        _seen.append(f"{event} {arguments[:1]}")
    if event == "open" and isinstance(arguments[0], str | bytes):
        path = os.fsdecode(arguments[0])
        if not path.startswith(_allowed):
            _seen.append(f"open {path}")


sys.addaudithook(_watch)
for encoding in ("utf-8-sig", "latin1", "ascii", "cp437", "raw-unicode-escape", "unicode-escape"):
    codecs.lookup(encoding)  # which imports a module the first time


@contextlib.contextmanager
def judged(name: str, directory: Path, names: str = "") -> Iterator[None]:
    """Holds a reader to its promises: no exception but a ValueError of one sentence in time, and nothing else opened.

    The sentence has to contain `names`. Files in `directory` may be opened.
    """
    global _allowed
    _seen.clear()
    begin, _allowed = time.process_time(), str(directory)
    outcome = "accepted"
    try:
        yield
    except ValueError as error:
        outcome = "refused"
        sentence = str(error)
        assert "\n" not in sentence, repr(sentence)
        assert 5 < len(sentence) < 1500, repr(sentence)
        assert names in sentence, repr(sentence)
    finally:
        _allowed = None
    assert time.process_time() - begin < SECONDS
    assert not (seen := list(_seen)), seen
    RESULTS[f"{name}: {outcome}"] += 1


def changed(content: bytes, chance: random.Random, words: Sequence[bytes] = ()) -> bytes:
    """Content with a few changes: bits, bytes, slices, and `words` of its format."""
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        size = len(content)
        begin = chance.randrange(size + 1)
        end = min(size, begin + chance.choice((0, 1, 1, 2, 4, 16, 64, 256)))
        piece = content[begin:end]
        kind = chance.randrange(10)
        if kind < 4 and words:
            piece = chance.choice(words)
            end = (
                begin + len(piece) if chance.random() < 0.5 else end
            )  # in the place of as many bytes, or more or fewer
        elif kind == 4:
            piece = bytes(chance.randrange(256) for _ in range(chance.choice((1, 1, 2, 8))))
        elif kind == 5 and piece:
            piece = bytes([piece[0] ^ 1 << chance.randrange(8)]) + piece[1:]
        elif kind == 6:
            piece = piece * chance.choice((2, 3, 50))
        elif kind == 7:
            piece = chance.choice((b"\0", b"\xff", b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\xff\xff\xff\x7f"))
        elif kind == 8:
            other = chance.randrange(size + 1)
            piece = content[other : other + 64]
        else:
            piece = b""
        content = content[:begin] + piece + content[end:]
    return content[: chance.randrange(len(content) + 1)] if chance.random() < 0.05 else content


def changed_lines(content: bytes, chance: random.Random, words: Sequence[bytes]) -> bytes:
    """Content in which lines are taken out, repeated, moved, or end in a word of the format."""
    lines = content.splitlines(keepends=True)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(lines))
        kind = chance.randrange(5)
        if kind == 0:
            del lines[at]
            lines = lines or [b""]
        elif kind == 1:
            lines.insert(chance.randrange(len(lines)), lines[at])
        elif kind == 2:
            lines[at] = lines[at].partition(b":")[0] + b": " + chance.choice(words) + b"\n"
        elif kind == 3:
            lines[at] = chance.choice(words) + b"\n"
        else:
            lines[at] = b"  " * chance.randrange(3) + lines[at].lstrip()
    return b"".join(lines)
