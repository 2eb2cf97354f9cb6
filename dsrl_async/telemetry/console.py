"""What the user sees of a run: a live display in a terminal, plain lines elsewhere.

Everything goes to stderr; stdout is for the run's JSON summary.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dsrl_async.config.settings import Config
from dsrl_async.host.waiting import Say, silence, waiting
from dsrl_async.telemetry.monitor import View
from dsrl_async.telemetry.screen import Screen, duration, evaluation_of, graphs_of, loading_of, ratio_of, warm_up

PLAIN_INTERVAL_S = 5.0  # shortest time between two plain lines of figures
WAITING_INTERVAL_S = 30.0  # and between two that say that the same is still waited for


class Display(Protocol):
    """Shows views of a run. `contextlib.closing` makes sure that the terminal is restored."""

    handler: logging.Handler
    """Handler for the root logger: it writes messages above the live display or between the plain lines."""

    def wait(self, what: str) -> AbstractContextManager[Say]:
        """Say what this process does inside of the `with`, before there are views."""

    def update(self, view: View) -> None:
        """Show the newest view."""

    def close(self) -> None:
        """Leave the last view on the screen and restore the terminal. A second call does nothing."""


def make_console(config: Config) -> Display:
    """The display that `config.log.console` asks for. `auto` is live if stderr is a capable terminal."""
    mode = config.log.console
    console = Console(stderr=True, force_terminal=True if mode == "live" else None)
    if mode == "off":
        return NoDisplay()
    if mode == "live" or (mode == "auto" and console.is_terminal and not console.is_dumb_terminal):
        return LiveDisplay(config, console)
    return PlainDisplay(config)


class NoDisplay:
    """Shows nothing, not even log messages."""

    def __init__(self) -> None:
        self.handler: logging.Handler = logging.NullHandler()

    def wait(self, what: str) -> AbstractContextManager[Say]:
        return silence(what)

    def update(self, view: View) -> None:
        pass

    def close(self) -> None:
        pass


class PlainDisplay:
    """Prints a line every PLAIN_INTERVAL_S or `log.interval_s`, whichever is longer, and one for the last view.

    Before the first decision of a launch it prints one whenever a process goes on to another step of its start.
    """

    def __init__(self, config: Config) -> None:
        self.handler: logging.Handler = logging.StreamHandler(sys.stderr)
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        self._config = config
        self._due_s = 0.0
        self._waiting: View | None = None
        self._steps: list[tuple[str, str]] | None = None  # what was waited for in the last view

    def wait(self, what: str) -> AbstractContextManager[Say]:
        return waiting(what, Console(stderr=True, force_terminal=False))

    def update(self, view: View) -> None:
        self._waiting = view
        steps = [(wait.who, wait.doing) for wait in view.waits] if is_starting(view) else None
        if view.wall_s >= self._due_s or steps != self._steps:
            # Ticks come a little early or late; half an interval of grace keeps every fifth one of 1 s.
            interval = max(PLAIN_INTERVAL_S if steps is None else WAITING_INTERVAL_S, self._config.log.interval_s)
            self._due_s = view.wall_s + interval - self._config.log.interval_s / 2
            self._steps = steps
            self._print()

    def close(self) -> None:
        if self._waiting is not None:
            self._print()

    def _print(self) -> None:
        assert self._waiting is not None
        with contextlib.suppress(OSError):  # the run goes on when nobody reads stderr any more
            print(plain_line(self._config, self._waiting), file=sys.stderr, flush=True)
        self._waiting = None


class Messages(logging.Handler):
    """Writes messages above the live display, in lines that the terminal wraps: a command in them can be copied."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        level = (f"{record.levelname:<7}", "red" if record.levelno >= logging.WARNING else "blue")
        with contextlib.suppress(OSError):
            self._console.print(
                Text.assemble((time, "bright_black"), " ", level, f" {self.format(record)}"), soft_wrap=True
            )


class LiveDisplay:
    """A panel at the bottom of the terminal, redrawn with every view; log messages scroll by above it."""

    def __init__(self, config: Config, console: Console) -> None:
        self.handler: logging.Handler = Messages(console)
        self._config = config
        self._console = console
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=False)

    def wait(self, what: str) -> AbstractContextManager[Say]:
        return waiting(what, self._console)

    def update(self, view: View) -> None:
        if not self._live.is_started:
            self._live.start()
            atexit.register(self.close)  # an uncaught exception must not leave the cursor hidden
        with contextlib.suppress(OSError):  # the run goes on when the terminal is closed
            self._live.update(Screen(self._config, view), refresh=True)

    def close(self) -> None:
        atexit.unregister(self.close)
        with contextlib.suppress(OSError):
            self._live.stop()


def is_starting(view: View) -> bool:
    """Whether this launch has taken no decision yet, and it is known what it waits for."""
    return bool(view.waits) and view.overall.decisions_per_s == 0


def plain_line(config: Config, view: View) -> str:
    """The main figures in one line, with recent rates; what has no data yet is not there."""
    recent, waits = view.recent, [str(wait) for wait in view.waits]
    begin = f"[{duration(view.wall_s)}] "
    if is_starting(view):
        return f"{begin}starting: {'; '.join(waits)}"
    parts = []
    if view.success_rate is not None:
        parts.append(f"success {view.success_rate:.1%} of last {view.success_episodes}")
    for name, count, rate in (
        ("episodes", view.episodes, None),
        ("env steps", view.env_steps, recent.env_steps_per_s),
        ("decisions", view.decisions, recent.decisions_per_s),
        ("updates", view.updates, recent.updates_per_s),
    ):
        if count > 0:
            parts.append(f"{name} {count:,}" + ("" if rate is None else f" ({rate:,.1f}/s)"))
    if view.warming_up is not None:
        parts.append(f"warm-up {warm_up(view)} before the first update")
    elif view.updates > 0:
        parts += [f"ratio {ratio_of(config, view, '/')}", f"lag {recent.policy_lag:.1f}"]
    if view.groups:
        parts.append(f"groups {' + '.join(f'{group.decisions_per_s:,.1f}' for group in view.groups)}/s")
    if recent.batch_size > 0:
        parts.append(f"batch {recent.batch_size:.1f} fill {recent.batch_fill:.0%}")
    if evaluation := evaluation_of(view):
        parts.append(f"evaluation {evaluation}")
    if loading := loading_of(view):
        parts.append(f"policy {loading}")
    if graphs := graphs_of(view):
        parts.append(f"CUDA graphs: {graphs}")
    if view.remaining_s is not None:
        parts.append(f"left {duration(view.remaining_s)}")
    if waits:
        parts.append(f"starting: {'; '.join(waits)}")
    return begin + " | ".join(parts)
