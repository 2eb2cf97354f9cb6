"""Says what a command waits for as long as it has nothing else to show."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

PATIENCE_S, AGAIN_S = 1.5, 30.0
"""After so many seconds it is said where there is no terminal, and again each time after so many more."""

Say = Callable[[str], None]
"""Takes new words for what is waited for."""


@contextlib.contextmanager
def waiting(what: str, console: Console | None = None) -> Iterator[Say]:
    """Say on stderr what this process does inside of the `with`, and for how long.

    On a terminal that is a line that goes away; elsewhere it is only said if it takes long.
    """
    console = console or Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
            task = progress.add_task(what)
            yield lambda words: progress.update(task, description=words)
        return
    words, begin, done = [what], time.monotonic(), threading.Event()

    def tell() -> None:
        patience_s = PATIENCE_S
        while not done.wait(patience_s):
            with contextlib.suppress(OSError):
                console.print(f"{words[0]}, {time.monotonic() - begin:.0f} s so far", soft_wrap=True, highlight=False)
            patience_s = AGAIN_S

    thread = threading.Thread(target=tell, name="waiting", daemon=True)
    thread.start()
    try:
        yield lambda new: words.__setitem__(0, new)
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def silence(what: str) -> Iterator[Say]:
    """Say nothing."""
    yield lambda words: None
