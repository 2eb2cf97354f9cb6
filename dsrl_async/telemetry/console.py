"""What the user sees of a run: a live display in a terminal, plain lines elsewhere.

Everything goes to stderr; stdout is for the run's JSON summary.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.logging import RichHandler
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dsrl_async.config.settings import Config
from dsrl_async.telemetry.monitor import View

PLAIN_INTERVAL_S = 5.0  # shortest time between two plain lines
SPARKS = "▁▂▃▄▅▆▇█"
PHASE_CELLS = 16  # width of the bar of phases
LEGEND_CELLS = 30  # width of the legend beside it
COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red", "white")


class Display(Protocol):
    """Shows views of a run. `contextlib.closing` makes sure that the terminal is restored."""

    handler: logging.Handler
    """Handler for the root logger: it writes messages above the live display or between the plain lines."""

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

    def update(self, view: View) -> None:
        pass

    def close(self) -> None:
        pass


class PlainDisplay:
    """Prints a line every PLAIN_INTERVAL_S or `log.interval_s`, whichever is longer, and one for the last view."""

    def __init__(self, config: Config) -> None:
        self.handler: logging.Handler = logging.StreamHandler(sys.stderr)
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        self._config = config
        self._due_s = 0.0
        self._waiting: View | None = None

    def update(self, view: View) -> None:
        self._waiting = view
        if view.wall_s >= self._due_s:
            # Ticks come a little early or late; half an interval of grace keeps every fifth one of 1 s.
            interval = max(PLAIN_INTERVAL_S, self._config.log.interval_s)
            self._due_s = view.wall_s + interval - self._config.log.interval_s / 2
            self._print()

    def close(self) -> None:
        if self._waiting is not None:
            self._print()

    def _print(self) -> None:
        assert self._waiting is not None
        with contextlib.suppress(OSError):  # the run goes on when nobody reads stderr any more
            print(plain_line(self._config, self._waiting), file=sys.stderr, flush=True)
        self._waiting = None


class LiveDisplay:
    """A panel at the bottom of the terminal, redrawn with every view; log messages scroll by above it."""

    def __init__(self, config: Config, console: Console) -> None:
        self.handler: logging.Handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
        self.handler.setFormatter(logging.Formatter("%(message)s"))  # the handler shows time and level itself
        self._config = config
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=False)
        self._live.start()
        atexit.register(self.close)  # an uncaught exception must not leave the cursor hidden

    def update(self, view: View) -> None:
        with contextlib.suppress(OSError):  # the run goes on when the terminal is closed
            self._live.update(render(self._config, view), refresh=True)

    def close(self) -> None:
        atexit.unregister(self.close)
        with contextlib.suppress(OSError):
            self._live.stop()


def plain_line(config: Config, view: View) -> str:
    """The main figures in one line, with recent rates."""
    recent = view.recent
    parts = [
        f"[{_duration(view.wall_s)}] success {_percent(view.success_rate)} of last {view.success_episodes}",
        f"episodes {view.episodes:,}",
        f"env steps {view.env_steps:,} ({recent.env_steps_per_s:,.1f}/s)",
        f"decisions {view.decisions:,} ({recent.decisions_per_s:,.1f}/s)",
        f"updates {view.updates:,} ({recent.updates_per_s:,.1f}/s)",
        f"ratio {_ratio(config, view, '/')}",
        f"lag {recent.policy_lag:.1f}",
        f"batch {recent.batch_size:.1f} fill {recent.batch_fill:.0%}",
    ]
    if evaluation := _evaluation(view):
        parts.append(f"evaluation {evaluation}")
    if loading := _loading(view):
        parts.append(f"policy {loading}")
    if graphs := _graphs(view):
        parts.append(f"CUDA graphs: {graphs}")
    if view.remaining_s is not None:
        parts.append(f"left {_duration(view.remaining_s)}")
    return " | ".join(parts)


def render(config: Config, view: View) -> RenderableType:
    """The live display, for terminals of at least 80 columns."""
    title = f"[bold]dsrl_async[/]  {config.env.name}, {config.actors} actor{'s' * (config.actors > 1)}"
    body = Group(_progress(view), Text(), _figures(config, view), Text(), _processes(view))
    return Panel(body, title=title, title_align="left", border_style="bright_black", width=80)


def _progress(view: View) -> RenderableType:
    elapsed = Text.assemble((_duration(view.wall_s), "bold"), " elapsed")
    if view.progress is None:
        return elapsed
    row = Table.grid(padding=(0, 2))
    left = "" if view.remaining_s is None else f"{_duration(view.remaining_s)} left"
    row.add_row(elapsed, ProgressBar(total=1.0, completed=view.progress, width=32), _percent(view.progress), left)
    return row


def _figures(config: Config, view: View) -> Table:
    recent, overall, metrics = view.recent, view.overall, view.metrics
    table = Table.grid(padding=(0, 1))
    table.add_column(style="bright_black", min_width=10)
    table.add_column(no_wrap=True)

    def counted(count: int, rate: float, mean: float, more: str = "") -> Text:
        return Text.assemble(
            (f"{count:>12,}", "bold"), f"{rate:>11,.1f}/s", (f"   mean {mean:,.1f}/s{more}", "bright_black")
        )

    goal = "" if config.stop_at_success is None else f", goal {config.stop_at_success:.0%}"
    table.add_row(
        "success",
        Text.assemble(
            (f"{_percent(view.success_rate):>6}", "bold green"),
            (f" of the last {view.success_episodes}{goal}  ", "bright_black"),
            (sparkline(view.success_history, 24 if goal else 32), "green"),
        ),
    )
    table.add_row("episodes", Text(f"{view.episodes:>12,}", "bold"))
    table.add_row("env steps", counted(view.env_steps, recent.env_steps_per_s, overall.env_steps_per_s))
    table.add_row("decisions", counted(view.decisions, recent.decisions_per_s, overall.decisions_per_s))
    table.add_row("updates", counted(view.updates, recent.updates_per_s, overall.updates_per_s))
    table.add_row(
        "ratio",
        f"{_ratio(config, view, ' of ')}   policy lag {recent.policy_lag:.1f} updates",
    )
    table.add_row(
        "batches",
        f"{recent.batch_size:.1f} rows, {recent.batch_fill:.0%} full, waited {recent.queue_wait_ms:.1f} ms",
    )
    table.add_row("replay", f"{view.replay_size:,} rows, {view.replay_utilization:.0%} of the ring")
    if evaluation := _evaluation(view):
        table.add_row("evaluation", evaluation)
    if loading := _loading(view):
        table.add_row("policy", loading)
    if graphs := _graphs(view):
        table.add_row("graphs", Text(graphs, "bold red" if "failed" in view.cuda_graphs.values() else ""))
    if metrics:
        names = ("train/sac/critic_loss", "train/actor/entropy", "train/sac/alpha")
        parts = [f"{name.split('/')[-1].replace('_', ' ')} {metrics[name]:.4g}" for name in names if name in metrics]
        table.add_row("agent", "   ".join(parts))
    return table


def _processes(view: View) -> Table:
    table = Table.grid(padding=(0, 1))
    table.show_header, table.header_style = True, "bright_black"
    table.add_column(no_wrap=True)
    table.add_column("CPU", justify="right", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("time", no_wrap=True)
    table.add_column(no_wrap=True)
    kinds = ["actor", "inference", "learner", "supervisor"]
    if "template" in view.processes:
        kinds.insert(1, "template")
    if "evaluation" in view.processes:
        kinds.insert(1, "evaluation")
    for kind in kinds:
        count = view.processes.get(kind, 0)
        megabytes = view.memory_mb["actor_mean" if kind == "actor" else kind]
        bar, legend = phase_bar(view.recent.phases.get(kind, {}))
        table.add_row(
            Text(f"{kind} ×{count}" if kind in ("actor", "evaluation") else kind),
            f"{view.cpu_percent[kind]:.0f}%" if kind in view.cpu_percent else "–",
            _memory(megabytes),
            bar,
            legend,
        )
    return table


def phase_bar(phases: dict[str, float]) -> tuple[Text, Text]:
    """A stacked bar of PHASE_CELLS, in which waits are shaded, and a legend of the largest shares in LEGEND_CELLS."""
    bar, legend = Text(), Text()
    scale = PHASE_CELLS / max(1.0, sum(phases.values()))
    styles = {}
    edge = 0.0
    for (name, share), colour in zip(phases.items(), COLOURS, strict=False):
        waiting = name.startswith("wait")
        styles[name] = "bright_black" if waiting else colour
        cells = round(edge + share * scale) - round(edge)
        bar.append(("░" if waiting else "█") * cells, styles[name])
        edge += share * scale
    for name, share in sorted(phases.items(), key=lambda item: -item[1]):
        words = f"{name.replace('_', ' ')} {share:.0%}"
        gap = "  " if legend else ""
        if share < 0.005 or len(legend) + len(gap) + len(words) > LEGEND_CELLS:
            break  # a smaller phase must not take its place
        legend.append(gap).append(words, styles[name])
    return bar, legend


def sparkline(values: tuple[float, ...], width: int) -> str:
    """At most `width` block characters for evenly spaced values in [0, 1], of which the last is always shown."""
    step = max(1, -(-len(values) // width))
    return "".join(SPARKS[min(int(value * len(SPARKS)), len(SPARKS) - 1)] for value in values[::-1][::step][::-1])


def _ratio(config: Config, view: View, of: str) -> str:
    """The replay ratio and its target, or the progress of the warm-up before the first update."""
    if view.updates == 0 and view.decisions <= config.replay.warmup_decisions:
        return f"warm-up {view.decisions:,}{of}{config.replay.warmup_decisions:,} decisions"
    return f"{view.replay_ratio:.3f}{of}{config.replay_ratio:g}"


def _evaluation(view: View) -> str:
    """The last evaluation, the best, and how far the one is that is going on; empty without evaluation."""
    if (shown := view.evaluation) is None:
        return ""
    parts = []
    if shown.success_rate is not None:
        parts.append(f"{_percent(shown.success_rate)} at {shown.decisions:,}")
    if shown.best_success_rate is not None:
        parts.append(f"best {_percent(shown.best_success_rate)} at {shown.best_decisions:,}")
    if shown.played is not None:
        parts.append(f"now {shown.played}/{shown.episodes}")
    return ", ".join(parts) or f"of {shown.episodes} episodes"


def _loading(view: View) -> str:
    """How far the policy is loaded; empty once it is, and before it is known."""
    if view.policies_ready == view.policies:
        return ""
    return f"ready for {view.policies_ready} of {view.policies} batch sizes and prompt lengths"


def _graphs(view: View) -> str:
    """How policy and learner run on a GPU; empty on the CPU."""
    return ", ".join(f"{name} {state}" for name, state in view.cuda_graphs.items() if state != "none")


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def _memory(megabytes: float) -> str:
    """Megabytes in at most eight characters."""
    if megabytes >= 10_000:
        return f"{megabytes / 1000:,.1f} GB"
    return f"{megabytes:,.0f} MB" if megabytes else "–"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
